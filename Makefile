# Two commands on a fresh machine with Python >= 3.12: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LIBTPU := $(VENV)/libtpu
WORKERS ?= 2

.PHONY: demo test lint format types notebooks docs lock clean install

install: $(INSTALLED)

# Trains the small models of the demo on this machine and writes runs/demo/report.md.
demo: $(INSTALLED)
	$(BIN)/python -m experiments.demo --gin_file=configs/demo.gin --run_dir=runs/demo

test: $(INSTALLED) $(LIBTPU)
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup
	JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax $(BIN)/python -m pytest --nbmake colab

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/pyrefly check

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Writes the notebooks in colab/ from their paired scripts.
notebooks: $(INSTALLED)
	$(BIN)/jupytext --sync colab/*.py

# Writes the generated tables of README.md.
docs: $(INSTALLED)
	$(BIN)/python -m experiments.readme

# Writes constraints.txt: the versions that the two commands install.
lock:
	rm -rf $(VENV)
	$(MAKE) install CONSTRAINTS=
	$(MAKE) $(LIBTPU) CONSTRAINTS=
	$(BIN)/pip freeze --exclude-editable > constraints.txt
	$(BIN)/pip freeze --path $(LIBTPU) >> constraints.txt
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .cache build dist

CONSTRAINTS ?= --constraint constraints.txt
$(INSTALLED): pyproject.toml $(wildcard constraints.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "lcattn needs Python >= 3.12; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable ".[test]"
	@touch $@

# The compiler for TPUs (built for Linux on x86-64 only; elsewhere the tests that need it are skipped).
# It lies beside Python's packages, where only those tests find it: a program that can import it
# looks for a TPU whenever it starts.
$(LIBTPU): $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps \
	  --target $@ "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'"
	@mkdir -p $@ && touch $@
