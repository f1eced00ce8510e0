# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python 3.11, git and a C++ compiler, nothing else.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
TYPED := build/typed/sglang_diffxkv

# kernels/ must not hide the PyPI package of that name (see setup.py).
export PYTHONSAFEPATH := 1
# SGLang's processes import thousands of modules each: never without their bytecode.
unexport PYTHONDONTWRITEBYTECODE
# Where `make env` has put uv, if there was none: models are downloaded with it.
export PATH := $(PATH):$(CURDIR)/.uv/bin

.PHONY: demo demo-router test test-fast bench compile-kernels bench-gpu gpu-pack gpu-run sanitize lint types format env clean

# MODEL=smollm2 brings a model that people use, MODEL=/folder takes a checkpoint that is there.
demo: env
	$(BIN)/sglang-diffxkv demo $(if $(MODEL),--model $(MODEL))

# Two replicas behind SGLang's router; the pictures go to build/. ARGS="--output FOLDER" elsewhere.
demo-router: env
	$(BIN)/sglang-diffxkv demo-router $(ARGS)

ifdef ARGS
test: env
	$(BIN)/python -m pytest $(ARGS)
else
# The tests of servers keep little more than one core busy: the others run beside them, and after
# them servers that nobody else uses. Those of kernels are a process of their own: without a GPU it
# is one of Triton's interpreter. Their failures are printed when they happen, their log at the end.
OWN_SERVERS := $(addprefix tests/server/test_,public_reports.py sglang_kits.py tp.py host_level.py \
	window_layers.py)
test: env
	@mkdir -p build
	@(export OMP_NUM_THREADS=1; failed=0; \
		for tests in tests/kernels tests/unit "$(OWN_SERVERS)"; do \
			$(BIN)/python -m pytest $$tests || failed=1; \
		done; exit $$failed) >build/others.log & \
	$(BIN)/python -m pytest tests/server $(addprefix --ignore=,$(OWN_SERVERS)); servers=$$?; \
	wait $$!; others=$$?; cat build/others.log; exit $$((servers | others))
endif

# Unit tests that take seconds, in two processes: under two minutes on two cores.
POOLS := $(addprefix tests/unit/test_,store.py allocator.py tp.py demotion.py policy.py workspace.py)
FAST := pytest -q -m "not slow and not server"
test-fast: env
	@export OMP_NUM_THREADS=1; $(BIN)/python -m $(FAST) $(POOLS) & \
	OMP_NUM_THREADS=1 $(BIN)/python -m $(FAST) tests/unit $(addprefix --ignore=,$(POOLS)); rest=$$?; \
	wait $$!; pools=$$?; exit $$((pools | rest))

BENCHES := kernels.decode kernels.extend kernels.formats \
	serving.capacity serving.sharing serving.throughput serving.demotion serving.cost \
	serving.scale serving.scale_store serving.speculation serving.soak serving.levels \
	accuracy.kl accuracy.ddid accuracy.quantizers accuracy.budgets

# The servers that benches start are programs of their own, which the current folder cannot disturb.
bench: env
	set -e; for bench in $(BENCHES); do PYTHONSAFEPATH= $(BIN)/python -m bench.$$bench; done
	PYTHONSAFEPATH= $(BIN)/python -m bench.serving.capacity --weights heavy-hitters \
		--requests 44 --output 96 --name capacity_heavy_hitters
	$(BIN)/sglang-diffxkv eval --output bench/results/accuracy.json
	$(BIN)/sglang-diffxkv eval --policies snapkv,xkv,streaming,diffxkv,diffkv,uniform \
		--tasks niah_multikey,kv_lookup,vt,recall --lengths 1024 --samples 25 \
		--target-compression 2.5,4,6,8 --output bench/results/accuracy_targets.json
	$(BIN)/sglang-diffxkv eval --policies k8v4,int4,snapkv,diffkv,diffxkv --lengths 1024 --samples 203 \
		--tasks shared_prefix,recomputed_prefix --output bench/results/shared_prefix.json

# No GPU needed: the Triton kernels, compiled for four architectures with two versions of Triton.
# ARGS=--check compiles only what is not on record, and a sample of what is.
compile-kernels: env
	env -u TRITON_INTERPRET PYTHONSAFEPATH= $(BIN)/python -m bench.gpu.compile $(ARGS)

# Verifies and times the kernels. PYTHON is any that has torch and Triton: it needs no environment.
bench-gpu:
	PYTHON=$(PYTHON) bench/gpu/run.sh bench.gpu $(ARGS)

# The fifteen-minute run on a machine without network: bench/gpu/README.md has the calls.
gpu-pack:
	PYTHON=$(PYTHON) bench/gpu/run.sh bench.gpu.remote.pack

CALL ?= first
gpu-run:
	PYTHON=$(PYTHON) bench/gpu/run.sh bench.gpu.remote $(CALL) $(ARGS)

# The kernels on small inputs under compute-sanitizer; TOOL is memcheck, racecheck or initcheck.
# Tensors are allocated one by one, so that memcheck knows where each ends.
TOOL ?= memcheck
sanitize:
	@command -v compute-sanitizer >/dev/null || { echo "skipped: no compute-sanitizer here"; exit 0; }; \
	$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
		{ echo "skipped: no GPU that $(PYTHON) can use"; exit 0; }; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 RUN="compute-sanitizer --tool $(TOOL) --error-exitcode 1 --target-processes all" \
		PYTHON=$(PYTHON) bench/gpu/run.sh bench.gpu.verify --small $(ARGS)

lint: $(DEV_STAMP) types
	$(BIN)/ruff format --check
	$(BIN)/ruff check

# mypy sees kernels/ and patches/ where they are imported: inside the package.
types: $(DEV_STAMP)
	rm -rf build/typed && mkdir -p $(TYPED)
	ln -s $(CURDIR)/sglang_diffxkv/* $(CURDIR)/kernels $(CURDIR)/patches $(TYPED)
	$(BIN)/mypy build/typed examples

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

env: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	PYTHON=$(PYTHON) ./.ci/env test
	touch $@

$(DEV_STAMP): $(STAMP)
	PYTHON=$(PYTHON) ./.ci/env dev
	touch $@

clean:
	rm -rf .venv .uv .triton build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
