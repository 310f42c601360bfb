# Every target sets itself up: a virtual environment in $(VENV), with this package in it.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
OUT ?= out

# What the checks were made with. Any torch >= 2.8 will do, with the Triton that it brings along; these are for
# an environment that has none. A PyTorch without CUDA brings no Triton, and tests need it for its interpreter.
# To try others: make test VENV=.venv-next TORCH=torch
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0

BIN = $(VENV)/bin
READY = $(VENV)/ready

.PHONY: demo test check gpu bench import-time clean

demo: $(READY)  ## Attention, then a whole model, on whatever device is here: tables, records and plots in $(OUT)/
	$(BIN)/flash-decoding bench --out $(OUT)
	$(BIN)/flash-decoding bench --suite model --quick --out $(OUT)

test: $(READY)  ## All tests; those that need a GPU say that they were skipped
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(READY)  ## Lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:  ## Tests, sanitizer and benchmarks on this machine's GPU
	bash tools/gpu.sh

bench: $(READY)  ## The benchmarks of attention and of a model, their records kept among the measured ones
	$(BIN)/flash-decoding bench --out results
	$(BIN)/flash-decoding bench --suite model --out results

import-time: $(READY)  ## Seconds that importing the package adds to importing torch
	$(BIN)/python tools/import_time.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A Python that already has PyTorch with CUDA lends it: such builds are large, and chosen for the machine.
$(READY): pyproject.toml
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	@$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname)" != Linux || \
		$(BIN)/python -m pip install "$(TRITON)"
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $@
