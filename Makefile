# On a fresh machine with Python 3.11+ and make: `make run`, `make test`, `make check`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Installed once for each state of these files, however their times change.
INSTALL_FILES := requirements.txt $(wildcard requirements/*.txt) pyproject.toml
INSTALLED := $(VENV)/.installed-$(firstword $(shell cat $(INSTALL_FILES) | cksum))

# One figure for all files of this tree, new ones included; empty outside a git checkout.
TREE = $(shell git ls-files -coz --exclude-standard 2>/dev/null | sort -z \
	| xargs -0 cksum 2>/dev/null | cksum | tr ' ' '-')
TESTED = $(VENV)/.tested-$(TREE)

# Tests wait more than they compute: one process more than there are cores, two at least. Files
# stay whole, for tests of a file share servers; the longest ones begin (tests/conftest.py).
TEST_PROCESSES ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1) + 1 )))

.PHONY: help run test lint check audit prove npm clean

help:
	@echo "make run    start everything on this machine: databases, provider sandbox, API, worker"
	@echo "make test   the whole test suite; PYTEST_ARGS='-x -n 0' adds options, here: one at a time"
	@echo "make check  black, flake8, mypy, import-linter, bandit, pip check, pytest"
	@echo "make audit  asks a public database for known vulnerabilities of the pins; needs the internet"
	@echo "make prove  break everything at random for MINUTES=5, and write docs/proof.md"
	@echo "make npm    what the tests with the provider's JavaScript client need (asks for Node)"
	@echo "make clean  remove the environment and caches; your data in .data stay"

# PORT=8001 chooses the API's port.  One command and no shell, so that a SIGTERM for make
# reaches the supervisor.
run: $(INSTALLED)
	@$(BIN)/mediagen up

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -rs -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)
	@rm -f $(VENV)/.tested-* && git rev-parse --git-dir >/dev/null 2>&1 && touch $(TESTED) || true

lint: $(INSTALLED)
	@$(BIN)/black --quiet --check . || { $(BIN)/black --check . ; exit 1; }
	@$(BIN)/flake8
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/bandit --quiet --recursive --configfile pyproject.toml app worker sandbox
	@$(PIP) check >$(VENV)/pip-check.log || { cat $(VENV)/pip-check.log; exit 1; }
	@echo "black, flake8, mypy, import-linter, bandit and pip have nothing to say."

check: lint
	@if [ -e "$(TESTED)" ]; then \
		echo "pytest passed on exactly these files already; rm $(VENV)/.tested-* to run it again."; \
	else \
		$(MAKE) --no-print-directory test; \
	fi

# In an environment of its own, for its many requirements are none of ours.
audit: $(INSTALLED)
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
		$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	@$(VENV)/audit/bin/pip-audit --requirement requirements/constraints.txt --no-deps --disable-pip

# MINUTES=30 SEED=1 RUNS=3: the faults of a seed are always the same.
prove: $(INSTALLED)
	@$(BIN)/python -m tests.prove --minutes $(or $(MINUTES),5) --runs $(or $(RUNS),1) \
		$(if $(SEED),--seed $(SEED)) --lost-answers $(or $(LOST_ANSWERS),10000) \
		--write docs/proof.md

npm:
	@if ! command -v npm >/dev/null; then \
		echo "Node is not installed: the tests with the provider's JavaScript client are left out."; \
	elif [ -f tests/contracts/npm/package-lock.json ]; then \
		cd tests/contracts/npm && npm ci --silent --no-audit --no-fund; \
	fi

clean:
	@rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .hypothesis .import_linter_cache \
		htmlcov .coverage tests/contracts/npm/node_modules
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED):
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is not there: install Python 3.11 or newer, or name it: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11: name a newer one, for example: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python's venv module does not work: install it (Debian: apt install python3-venv)"; exit 2; }
	@echo "Installing the pinned requirements into $(VENV): once, about a minute"
	@{ $(PIP) install -r requirements.txt && $(PIP) install --no-deps --no-build-isolation -e . ; } \
		> $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
	@rm -f $(VENV)/.installed-* && touch $@
