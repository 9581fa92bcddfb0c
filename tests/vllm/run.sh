#!/usr/bin/env bash
# make test-vllm: the tests of a real vLLM on a CPU, each file in a process of its own.
#   tests/vllm/run.sh PYTHON ENVIRONMENT [pytest's arguments]
# The environment, 3.5 GB, is made once. Where the network refuses the download, that is said and nothing is tested; any
# other failure fails.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=$1 environment=$2
shift 2

here=tests/vllm
ready="$environment/.ready-$(cat pyproject.toml setup.py $here/requirements.txt csrc/* | sha256sum | cut -c1-16)"
log="$environment/install.log"

install() {
	"$python" -m venv "$environment" &&
		"$environment/bin/pip" --disable-pip-version-check install --quiet -r $here/requirements.txt &&
		# Builds for other versions of torch, which transformers would import where they are.
		"$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec &&
		"$environment/bin/pip" --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable . &&
		rm -f "$environment"/.ready-* && touch "$ready"
}

if [ ! -e "$ready" ]; then
	mkdir -p "$environment"
	echo "test-vllm: installing vLLM into $environment"
	if ! install >"$log" 2>&1; then
		tail -n 20 "$log"
		if grep -qE "No matching distribution|Connection|Network is unreachable|timed out|Proxy|HTTP error|No space left" "$log"; then
			echo "test-vllm: SKIPPED, nothing was tested: vLLM could not be downloaded ($log)"
			exit 0
		fi
		echo "test-vllm: the installation failed ($log)"
		exit 1
	fi
fi

failed=()
for file in v1 v2 processes commands served served_v2 server; do
	"$environment/bin/python" -m pytest --confcutdir=$here -p no:cacheprovider -p no:logging -W ignore --show-capture=no -q \
		--durations 5 $here/$file.py "$@" || failed+=("$file")
done
if [ ${#failed[@]} -gt 0 ]; then
	echo "test-vllm: failed in ${failed[*]}"
	exit 1
fi
