# Every target sets up what it needs: a virtual environment in .venv, from requirements-dev.txt.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false
# A worker a core; where a test takes more threads, those that wait for one another must not spin.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
TESTS ?= not slow

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-latest test-lowest audit mutants style format space base

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

demo: .venv/.installed  ## a private adapter for real handwritten digits, from nothing (about six minutes)
	$(BIN)/python examples/digits/demo.py

test: .venv/.installed  ## run the tests but the slowest (12 to 20 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $$(nproc) --dist worksteal -m "$(TESTS)"

test-all: .venv/.installed  ## run all tests (half an hour or more)
	$(MAKE) test TESTS=

test-latest:  ## make test with the newest of everything but torch: which pins can move?
	$(PYTHON) -m venv .venv-latest
	sed '/^-r/d; /^torch==/!s/==.*//' requirements.txt requirements-dev.txt > .venv-latest/requirements.txt
	.venv-latest/bin/pip install --quiet --upgrade -r .venv-latest/requirements.txt
	@echo "newer than the pins:"
	@.venv-latest/bin/pip freeze -r .venv-latest/requirements.txt | sed '/^##/,$$d; /^#/d; s/+.*//; s/_/-/g' \
		| grep -vixF -f requirements.txt -f requirements-dev.txt || echo none
	$(ONE_THREAD) .venv-latest/bin/python -m pytest -n $$(nproc) --dist worksteal -m "not slow"

test-lowest:  ## make test with the older versions in requirements-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	sed '/^-r/d' requirements.txt requirements-dev.txt \
		| grep -vE "^($$(sed '/^#/d; s/==.*//' requirements-lowest.txt | paste -sd '|'))==" > .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install --quiet -r .venv-lowest/requirements.txt -r requirements-lowest.txt
	$(ONE_THREAD) .venv-lowest/bin/python -m pytest -n $$(nproc) --dist worksteal -m "not slow"

audit: .venv/.installed  ## prove a lower bound on epsilon, and catch the loop broken on purpose (about eight minutes)
	$(BIN)/python audit_privacy.py --mutants

mutants: .venv/.installed  ## break the code that the guarantee rests on, 300 times: do the tests notice? (hours)
	$(BIN)/pip install --quiet cosmic-ray==8.7.0 pytest-cov==7.1.0
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py trace
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py run

style: .venv/.installed  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed  ## fix what `make style` complains about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

space: .venv/.installed  ## a Space of the Hub that plans budgets and verifies statements, in runs/space
	rm -rf runs/space && mkdir -p runs/space
	cp -r utils examples/space/app.py examples/space/README.md CITATION.cff runs/space/
	find runs/space -name __pycache__ -prune -exec rm -r {} +
	sed '/^#/d; /^pillow==/s/==.*//' requirements.txt > runs/space/requirements.txt  # gradio has its own
	sed -n 's/^sdk_version: /gradio==/p' examples/space/README.md >> runs/space/requirements.txt

base: .venv/.installed  ## remake the public base model in runs/digits/base (about half an hour)
	$(BIN)/python examples/digits/draw_public.py --output_dir runs/digits/public
	$(BIN)/accelerate launch --num_processes 1 \
		--num_cpu_threads_per_process $$(nproc) pretrain_ldm.py --config examples/digits/base.yaml
