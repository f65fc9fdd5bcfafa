# Two commands do everything on a fresh machine: `make compare` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install compare test test-slow lint format clean

install: $(STAMP)

# torch and torchvision are resolved together: a CPU-only torch beside a normal torchvision does not import.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision -e ".[bench,dev,onnx]"
	touch $@

compare: $(STAMP)
	$(BIN)/python -m benchmarks compare --task digits --out runs/digits
	$(BIN)/python -m benchmarks report runs/digits

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
