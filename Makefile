# make run    the whole path on this machine, embedded broker included; ARGS="--seconds 30" passes options on
# make test   every test but the slow ones        make test-slow   the slow ones
# make check  lint, types and tests: what CI runs  make proto      regenerate the protobuf code
# make fuzz   hunt in the decoders of bytes from outside; ARGS="segment --runs 1000000"
# make chaos  the fault campaign: any kill, the same model; ARGS="--kills 200 --seed 7"
# make env    only the environment: pinned, CPU by default; a second call reuses it
#
# DEVICE=cuda installs the GPU builds. TORCH_INDEX=<index of PyTorch's CPU wheels> spares the CUDA
# libraries that PyPI's own torch brings along (docs/operations.md).

PYTHON ?= python3.11
VENV ?= .venv
DEVICE ?= cpu
TORCH_INDEX ?=
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(DEVICE)

.PHONY: run test test-slow fuzz chaos check lint types proto env clean

run: $(READY)
	$(BIN)/python -m trainer run $(if $(findstring --preset,$(ARGS))$(findstring --config,$(ARGS))$(findstring --data,$(ARGS)),,--preset quickstart) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(ARGS)

chaos: $(READY)
	$(BIN)/python -m tests.chaos $(ARGS)

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m proto.generate --check

types: $(READY)
	$(BIN)/mypy

proto: $(READY)
	$(BIN)/python -m proto.generate

env: $(READY)

$(READY): requirements/torch.txt requirements/torchrec-$(DEVICE).txt requirements/lock.txt
	@echo "making $(VENV): PyTorch and what goes with it, some minutes (see docs/operations.md, Install)"
	sh requirements/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/torchrec-$(DEVICE).txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/lock.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
