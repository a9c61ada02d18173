# Everything is set up on the first call: a virtual environment inside the project, pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check lock sbom audit clean

demo: $(VENV)/installed ## train several targets on noisy rows, compare, draw a picture
	$(BIN)/qtarget demo --output runs/demo

test: $(VENV)/installed ## all tests and doctests
	$(BIN)/python -m pytest -n 2

check: $(VENV)/installed ## formatting, lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

lock: $(VENV)/release ## requirements/*.lock, with hashes
	scripts/lock.sh

sbom: $(VENV)/release ## what a release is made of, as CycloneDX JSON
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements requirements/cuda.lock --pyproject pyproject.toml --output-reproducible -o dist/sbom.json

audit: $(VENV)/release ## known vulnerabilities of the locked packages; asks the advisory database, so it needs the network
	$(BIN)/pip-audit -r requirements/cuda.lock --disable-pip --no-deps

$(VENV)/release: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[release]'
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
