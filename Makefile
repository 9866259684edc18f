# make study [PROFILE=quick|cifar10|reference] · make test [STUDY=smoke_full] · make book · make publish · make lint · make bench · make machine · make canary · make soak [KILLS=20] · make repository URL=...
PROFILE ?= quick
STUDY ?= smoke
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: study test book publish lint bench machine canary soak repository

study: $(BIN)/installed
	$(BIN)/python -m helpers.study.run $(PROFILE)

test: $(BIN)/installed
	$(BIN)/python -m pytest --study $(STUDY)

book: $(BIN)/installed
	$(BIN)/python -m helpers.study.book published

publish: PROFILE = reference
publish: $(BIN)/installed
	$(BIN)/python -m helpers.study.book publish $(PROFILE)

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" notebooks/*.ipynb

bench: $(BIN)/installed
	$(BIN)/python -m helpers.study.bench

machine: $(BIN)/installed
	$(BIN)/python -m helpers.study.this_machine

canary: $(BIN)/installed
	$(BIN)/python -m helpers.study.canary

soak: $(BIN)/installed
	$(BIN)/python -m helpers.study.soak $(KILLS)

repository: $(BIN)/installed
	$(BIN)/python -m helpers.study.repository $(URL)

# The marker is made last: an installation that was interrupted is taken up again.
$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else 'Python 3.11 to 3.13 is needed, this is ' + sys.version.split()[0] + '; name another one: make PYTHON=python3.11 ...')"
	@echo "Installing into .venv: about 7 GB, once, some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[study,dev]"
	touch $@
