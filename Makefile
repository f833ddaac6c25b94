# Every chore in one word; `make` lists them. Each word makes the environment it needs first.
PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --editable
OUT ?= demo_out
JOBS ?= 2
PYTEST := $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile
# Their numbers are compared with transformers': compiled as users compile. The other tests compile quickly (tests/xla_flags.py).
PARITY := $(addprefix tests/test_,bf16.py gradients.py parity.py random_models.py train_curve.py)
QUICK := QUICK_COMPILE=1 $(PYTEST) $(addprefix --ignore ,$(PARITY))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak lint bench figure notebook clean

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*  ## ' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "PYTHON=$(PYTHON) (3.11 or newer) makes the environment, VENV=$(VENV) is where it lives; JOBS=$(JOBS) test processes."

demo: $(VENV)/.installed  ## build a small checkpoint, convert it, ask about a picture, print the parity with transformers; then ask one that learnt to see
	$(RUN) examples/demo.py --out $(OUT)
	$(RUN) examples/easy_vqa_demo.py

test: $(VENV)/.installed-test  ## the tests that take seconds each
	$(QUICK)
	$(PYTEST) $(PARITY)

test-slow: $(VENV)/.installed-test  ## the tests that take minutes each
	$(QUICK) -m slow
	$(PYTEST) -m slow $(PARITY)

soak: $(VENV)/.installed-test  ## hundreds of cases; the log stays in docs/soak.log
	$(RUN) -m pytest -m soak --verbose --timeout 0 | tee docs/soak.log

lint: $(VENV)/.installed-test  ## ruff and pyright
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.installed-test  ## every row of speed beside transformers: benchmarks/table.md, .json, .png; quiet machine, ten minutes
	$(RUN) -m benchmarks.table --growth --torch-compile

figure: $(VENV)/.installed-test  ## measure again and redraw the figure of the README
	$(RUN) docs/plot_parity.py

notebook: $(VENV)/.installed-test  ## execute notebooks/parity.ipynb; MODEL=directory for another checkpoint than the small one
	$(RUN) notebooks/execute.py

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(OUT) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "make: $(PYTHON) is Python %d.%d, expected 3.11 or newer; name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# The stamps are as old as the installation: a change of pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) '.[test]'
	@touch $(VENV)/.installed $@
