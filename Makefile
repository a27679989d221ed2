# Two targets matter: `make demo` (the main job on a real model) and `make test`.
PYTHON ?= python3
VENV ?= .venv
VENV_OPTIMUM ?= .venv-optimum
BIN := $(VENV)/bin
# Text that the studies are of, where a developer has it beside the checkout; the tests find it themselves.
DATA := $(abspath ../shared/data)
ifneq ($(wildcard $(DATA)/c4_sample300.jsonl),)
studies: export SAAP_DATA ?= $(DATA)
endif

.PHONY: coverage demo studies test test-slow test-optimum lint wheel clean

demo: $(VENV)/.demo
	$(BIN)/saap run smollm2-135m -o out/demo --speedup 1.3 --quick

# Three workers, one thread of a library each: what two cores hold, for some tests wait for a board or a browser.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not device"

# 760273a had 94.7 % of the lines and 90.3 % of the branches (this process only; tests start many others).
coverage: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not device" --cov --cov-branch

test-slow: $(VENV)/.test
	$(BIN)/pytest -q -m "slow"

# The cells of the field that are missing (hours for all of them), and the tables of its page.
studies: $(VENV)/.test
	$(BIN)/python -m studies.field.study run
	$(BIN)/python -m studies.field.study table --write

# Optimum as a client and a peer, with transformers 4: optimum-onnx does not allow 5 yet.
test-optimum: $(VENV_OPTIMUM)/.test
	$(VENV_OPTIMUM)/bin/pytest -q -m "not slow and not device" -k optimum tests/export tests/bench/runtimes

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[bench,prune,export]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install -q -e '.[bench,prune,export,dev]'
	touch $@

$(VENV_OPTIMUM)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV_OPTIMUM)
	$(VENV_OPTIMUM)/bin/pip install -q --upgrade pip
	$(VENV_OPTIMUM)/bin/pip install -q -e '.[bench,prune,export,optimum]' pytest hypothesis
	touch $@

# What is installed elsewhere while the name is not on the package index.
wheel: $(VENV)/bin/pip
	rm -f dist/saap-*.whl
	$(BIN)/pip wheel -q --no-deps -w dist .
	@echo "here:       pip install 'saap[prune,export] @ file://$$(echo $(CURDIR)/dist/saap-*.whl)'"
	@echo "on a board: scp $$(echo dist/saap-*.whl) USER@BOARD: && ssh USER@BOARD \"pip install './$$(basename dist/saap-*.whl)[bench]'\""

# Every version that the tests ran with, for installs that shall be the same again: pip install -c constraints.txt ...
constraints.txt: $(VENV)/.test
	echo "# Made by make constraints.txt: Linux x86-64, $$($(BIN)/python --version), $$(date +%F)" > $@
	$(BIN)/pip freeze --exclude-editable --exclude pip >> $@

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
