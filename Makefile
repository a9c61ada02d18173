# Everything is set up on the first call: a virtual environment inside the project, pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check figures clean

demo: $(VENV)/installed ## train several targets on noisy rows, compare, draw a picture
	$(BIN)/qtarget demo --output runs/demo

test: $(VENV)/installed ## all tests and doctests
	$(BIN)/python -m pytest -n 2

check: $(VENV)/installed ## formatting, lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
