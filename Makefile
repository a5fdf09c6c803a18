# Every target works on a fresh machine: it first builds .venv from the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup run test test-slow test-slurm test-exhaustive bench reproduce figures notebooks docs lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/python run.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# The other cases of tests that make test runs with some, and tests of a minute each.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not slurm and not exhaustive" $(ARGS)

# As root: starts a one-node SLURM, installing it where it lacks.
test-slurm: $(STAMP)
	settings="$$(scripts/slurm_local.sh start)" && trap "scripts/slurm_local.sh stop" EXIT && eval "$$settings" && \
	$(BIN)/python -m pytest -n 0 -m slurm $(ARGS)

# Further values of tests that always run with some of them; half an hour.
test-exhaustive: $(STAMP)
	$(BIN)/python -m pytest -m exhaustive $(ARGS)

# Products and fused ops on this machine's CPU; writes experiments/kernels/. EXPERIMENT=memory_wall times whole passes.
bench: $(STAMP)
	$(BIN)/python -m quasar_kernels.bench $(ARGS)

# make reproduce EXPERIMENT=main_table [PROMPTS=folder] [LIMIT=n] [REPETITIONS=n] [ARGS=overrides]
reproduce: $(STAMP)
	$(BIN)/quasar reproduce $(EXPERIMENT) $(if $(PROMPTS),--prompts "$(PROMPTS)") $(if $(LIMIT),--limit $(LIMIT)) \
		$(if $(REPETITIONS),--repetitions $(REPETITIONS)) $(ARGS)

# Tables and figures of all committed results, from these results alone.
figures: $(STAMP)
	$(BIN)/quasar figures

# Executes the notebooks and stores their outputs; the same results give the same bytes.
notebooks: $(STAMP)
	$(BIN)/quasar notebooks $(if $(NOTEBOOKS),$(NOTEBOOKS),notebooks/*.ipynb) $(if $(RESULTS),--results "$(RESULTS)")

# The documentation into site/; also refreshes the generated parts of README.md and of the pages.
docs: $(STAMP)
	$(BIN)/python -m scripts.docs.parts
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive quasar kernels hydra_plugins run.py
	$(BIN)/mypy

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
