# What a user of a clean clone types. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
PIP_NOISE := ^(Requirement already|Collecting|Processing|Looking in|  (Preparing|Checking|Building|Attempting|Found existing))
CSRC := $(shell find csrc -type f 2>/dev/null)
INSTALLED := $(VENV)/.jdkd-installed
BUILT := $(VENV)/.jdkd-built

# The demo: sizes of its data and its three jobs. A finished job is not run again; an interrupted one carries on. One
# class and few scenes: a base of minutes learns most of it, while of ten classes it learned little in that time.
DEMO ?= runs/demo
DEMO_SEED ?= 0
DEMO_DATA ?= --train 150 --val 200 --size 128 --one-class
DEMO_BASE ?= --model fcos --backbone resnet18 --norm batch --width 0.5 --fpn 64 --min-size 128 --max-size 128 \
	--steps 3000 --batch-size 4
DEMO_SEARCH ?= --steps 2500 --batch-size 4 --target-latency 0.75 --latency-seconds 2

PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: help setup test lint format figures docs bench demo clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT)  ## make VENV (.venv) from nothing: torch, the CUDA compiler, jdkd with its extension compiled

$(VENV)/bin/python:
	@echo "== $(VENV): a new virtual environment"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jdkd needs Python 3.11 or later, and $(PYTHON) is %d.%d: set PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install the package python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing torch and the tools, as constraints.txt pins them (2 GB the first time)"
	@$(PIP) install --progress-bar on -c constraints.txt "setuptools" "wheel" "ninja" "torch" \
		"cuda-toolkit[nvcc,cccl,crt,nvvm]" 2>&1 | { grep -vE '$(PIP_NOISE)' || true; }
	@echo "== installing jdkd, editable"
	@JDKD_BUILD_EXT=0 $(PIP) install -c constraints.txt --no-build-isolation --config-settings editable_mode=compat \
		-e ".[detect,export,dev]" 2>&1 \
		| { grep -vE '$(PIP_NOISE)' || true; }
	@touch $@

$(BUILT): $(INSTALLED) setup.py $(CSRC)
	@echo "== compiling jdkd._C"
	@$(PY) setup.py --quiet build_ext --inplace 2>&1 | sed -uE 's#^(\[[0-9]+/[0-9]+\]) .* -c ([^ ]+) -o .*#\1 \2#; /^(g\+\+|c\+\+) .* -shared /d; /No CUDA runtime is found/d'
	@$(PY) -m jdkd.env
	@touch $@

test: setup  ## run the tests
	$(PY) -m pytest $(PYTEST_ARGS)

lint: setup  ## ruff, and mypy on what is public
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup  ## let ruff sort imports, mend what it safely can, and lay out the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

figures: setup  ## write the tables and pictures of README and docs from the committed result files
	$(PY) -m benchmarks.readme

docs: setup  ## build the site into site/; a warning is an error
	@$(PY) -c 'import material, mkdocstrings' 2>/dev/null \
		|| $(PIP) install -c constraints.txt "mkdocs-material" "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: setup  ## benchmarks against what people run today, on the device at hand
	$(PY) -m benchmarks.run

demo: setup  ## digit scenes, a base detector, the joint search; all under runs/demo, resumable
	$(VENV)/bin/jdkd data digits $(DEMO)/data $(DEMO_DATA) --seed $(DEMO_SEED) --resume
	$(VENV)/bin/jdkd train --data $(DEMO)/data --out $(DEMO)/base $(DEMO_BASE) --seed $(DEMO_SEED) --resume
	$(VENV)/bin/jdkd search --base $(DEMO)/base --data $(DEMO)/data --out $(DEMO)/search $(DEMO_SEARCH) \
		--seed $(DEMO_SEED) --resume

clean:  ## remove what was built; VENV and runs/ stay
	rm -rf build dist site *.egg-info jdkd/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f $(BUILT)
