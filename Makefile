# Needs make and Python 3.11 or newer; another interpreter: make run PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: run test lint settings docs clean

run: $(VENV)/.run ## fit the default simulated data; the last line says where the results are
	$(VENV)/bin/python train.py

test: $(VENV)/.test ## all tests, on two cores; those that need a GPU skip themselves where there is none
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

settings: $(VENV)/.test ## defaults and comments in conf/ and docs/settings.md, as the package declares them
	$(VENV)/bin/python docs/make_settings.py

docs: $(VENV)/.docs ## the site, in docs/_build/html; a warning is an error
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

clean: ## the environment and all caches; results in outputs/ and multirun/ stay
	rm -rf $(VENV) docs/_build docs/api/generated docs/tutorials/filtered_feature_bc_matrix .mypy_cache .pytest_cache .ruff_cache .import_linter_cache nbmix.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# made once, and again when what is to be installed changes
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: nbmix needs Python 3.11 or newer, this is %d.%d; name one: make run PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/.run

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) --editable ".[docs]"
	@touch $@ $(VENV)/.run
