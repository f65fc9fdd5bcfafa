# Two commands do everything on a fresh machine: `make compare` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOWEST ?= .venv-lowest
STAMP  := $(VENV)/.installed

.PHONY: install compare test test-slow test-lowest docs lint format clean

install: $(STAMP)

# torch and torchvision are resolved together: a CPU-only torch beside a normal torchvision does not import.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision -e ".[bench,dev,onnx]"
	touch $@

compare: $(STAMP)
	$(BIN)/python -m benchmarks export --task digits --out runs/digits-export
	$(BIN)/ippro-tp prune --library python --model benchmarks.models.small_resnet:SmallResNet \
		--checkpoint runs/digits-export/network.safetensors --data-dir runs/digits-export --macs 0.5 \
		--out runs/digits-pruned
	$(BIN)/python -m benchmarks compare --task digits --out runs/digits
	$(BIN)/python -m benchmarks report runs/digits

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

# The oldest releases that pyproject.toml allows, in an environment of their own.
test-lowest: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[bench,dev]"
	$(LOWEST)/bin/python -m pytest -n 2 tests

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m mkdocs build --quiet

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) site runs .pytest_cache .mypy_cache .ruff_cache
