# make demo     one scene in eight emotions, an edited picture, and a plot of the inner loop, under outputs/
# make app      a page in the browser to make and edit pictures; APP_ARGS are its options
# make test     the test suite
# make lint     what .ci/run checks besides: ruff and mypy
# make style    format and sort imports
# make fix-copies   write what the pipeline files and modular/block.py share anew
# make figures  how large the pipeline files are
#
# Each command first makes $(VENV) with the versions of constraints.txt, where that is missing or out of date.
# TORCH_INSTALL_ARGS are pip's arguments for PyTorch. The default takes the build that your package index offers first:
# on macOS and Windows one for the CPU, on Linux one for CUDA, which runs on the CPU just as well but is a large
# download. For the small one, append "--index-url" and the address of the CPU wheels that PyTorch's installation
# page names.

PYTHON ?= python3
VENV ?= .venv
TORCH_INSTALL_ARGS ?= torch==2.13.0
DEMO_ARGS ?=
APP_ARGS ?=
PYTEST_ARGS ?= -n auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo app test lint quality style fix-copies figures install

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_INSTALL_ARGS)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[demo,eval,test,train]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py $(DEMO_ARGS)

app: $(STAMP)
	$(BIN)/python examples/app.py $(APP_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fix-copies: $(STAMP)
	$(BIN)/python utils/fix_copies.py

figures: $(STAMP)
	$(BIN)/python utils/figures.py
