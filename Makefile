# `make demo` and `make test` need nothing but a Python; they make their own environment in .venv the first time.
PYTHON ?= python3
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
PYTEST_ARGS ?=
comma := ,
# The builder and the registry of TensorRT that need no GPU have wheels for this platform only.
EXTRAS := cpu,dev$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)tensorrt-test)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: venv demo test lint dev clean

venv: $(INSTALLED)

# torch goes first and alone: together with the rest, pip may prefer a CUDA build over a CPU wheel that is at hand.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "mla-compile needs Python 3.11 to 3.13; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: venv
	$(BIN)/python examples/demo.py

# The test models are tiny: one thread per process, several processes.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# mypy and lint-imports read files instead of importing, so they find passes/ and runtime/ only through the links.
lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dev: venv
	@ln -sfn ../passes mla_compile/passes
	@ln -sfn ../runtime mla_compile/runtime

clean:
	rm -f mla_compile/passes mla_compile/runtime
	rm -rf $(VENV) build dist *.egg-info demo-out .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
