# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments for the demo, for instance: make demo DEMO="--images ~/photos --frames 1800"
DEMO ?=

# Photographs for the benchmark, labelled by folder or file name, and its other arguments:
# make bench IMAGES=~/photos BENCH="--suite mixed --competitor frozen --competitor continual"
IMAGES ?=
BENCH ?=

.PHONY: help demo bench test check lint unit docs lock clean

help:  ## Say what there is.
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(STAMP)  ## Watch the agent follow a drifting stream.
	$(BIN)/tta-agent demo $(DEMO)

bench: $(STAMP)  ## Compare with doing nothing and with published methods: IMAGES=DIR.
	@test -n "$(IMAGES)" || { echo "name a folder of photographs: make bench IMAGES=DIR"; exit 1; }
	$(BIN)/tta-agent bench $(IMAGES) $(BENCH)

test: check  ## Everything: style, types, all tests on real parts.
	$(BIN)/pytest tests/integration

check: lint unit  ## Style, types and unit tests.

lint: $(STAMP)
	$(BIN)/ruff check agent tests
	$(BIN)/ruff format --check agent tests
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit tests/contract -n 2

docs: $(STAMP)  ## Make the generated files again.
	$(BIN)/tta-agent defaults > configs/default.yaml
	$(BIN)/tta-agent schema > configs/schema.json
	$(BIN)/tta-agent metrics > deploy/METRICS.md

lock: $(STAMP)  ## Pin the versions that the other targets install.
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --upgrade --no-header \
		--no-annotate --all-extras pyproject.toml -o deploy/constraints.txt

clean:  ## Remove what was made.
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache demo-out bench-out

$(STAMP): pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -q -c deploy/constraints.txt -e '.[dev]'
	touch $@
