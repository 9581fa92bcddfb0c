#!/usr/bin/env bash
# make test-sglang: the tests of a real SGLang on a CPU, each file in a process of its own.
#   tests/sglang/run.sh PYTHON ENVIRONMENT [pytest's arguments]
# The environment, 3 GB, is made once. Where the network refuses the download, that is said and nothing is tested; any
# other failure fails.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=$1 environment=$2
shift 2

here=tests/sglang
ready="$environment/.ready-$(cat pyproject.toml setup.py $here/requirements.txt $here/run.sh csrc/* | sha256sum | cut -c1-16)"
log="$environment/install.log"

install() {
	"$python" -m venv "$environment" &&
		"$environment/bin/pip" --disable-pip-version-check install --quiet -r $here/requirements.txt &&
		# Without what they require, which is for CUDA.
		"$environment/bin/pip" --disable-pip-version-check install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0 &&
		# Its compiled part is for CUDA, too; SGLang imports the rest for models that are not tested here.
		: >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py" &&
		"$environment/bin/pip" --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable . &&
		rm -f "$environment"/.ready-* && touch "$ready"
}

if [ ! -e "$ready" ]; then
	mkdir -p "$environment"
	echo "test-sglang: installing SGLang into $environment"
	if ! install >"$log" 2>&1; then
		tail -n 20 "$log"
		if grep -qE "No matching distribution|Connection|Network is unreachable|timed out|Proxy|HTTP error|No space left" "$log"; then
			echo "test-sglang: SKIPPED, nothing was tested: SGLang could not be downloaded ($log)"
			exit 0
		fi
		echo "test-sglang: the installation failed ($log)"
		exit 1
	fi
fi

failed=()
for file in rows whole started commands; do
	"$environment/bin/python" -m pytest --confcutdir=$here -p no:cacheprovider -p no:logging -W ignore --show-capture=no -q \
		--durations 5 $here/$file.py "$@" || failed+=("$file")
done
if [ ${#failed[@]} -gt 0 ]; then
	echo "test-sglang: failed in ${failed[*]}"
	exit 1
fi
