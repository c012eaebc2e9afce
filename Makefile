# `make` alone lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest lint format readme bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first and alone: `torch==2.13.0` is then already satisfied when the rest is resolved, so a CPU build
# stays a CPU build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "comp needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt \
	  -e '.[demo,track,optimizers,features,hpo,explain,kaggle,dev]'
	@touch $@

demo: $(STAMP)  ## write a small competition, train on it, score the submission (a few minutes)
	$(BIN)/comp demo

# Two workers with one thread each: small tensors gain nothing from more threads and lose to oversubscription.
test: $(STAMP)  ## quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(STAMP)  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

# The newest writes a bundle, the oldest reads it: tests/handover.py makes it, tests/test_handover.py compares. This
# torch warns of what transformers 5.0.0 does at the import of DeBERTa and ModernBERT, this SciPy of scikit-learn 1.6.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --disable-pip-version-check torch==2.13.0
	$(OLDEST)/bin/pip install -q --disable-pip-version-check -c constraints-oldest.txt -e '.[features]' pytest hypothesis 'setuptools>=77'
	@touch $@

test-oldest: $(STAMP) $(OLDEST)/.installed  ## inference with the oldest supported versions, on a bundle of the newest
	rm -rf $(OLDEST)/handover
	OMP_NUM_THREADS=1 $(BIN)/python tests/handover.py $(OLDEST)/handover
	COMP_HANDOVER=$(CURDIR)/$(OLDEST)/handover OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -m "not slow" \
	  -W 'ignore:`torch.jit.script:DeprecationWarning' -W 'ignore:scipy.optimize:DeprecationWarning' \
	  tests/test_handover.py tests/test_infer.py tests/test_submission.py tests/test_tables.py tests/test_tokens.py \
	  tests/test_batches.py tests/test_bundle.py tests/test_classical.py

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(STAMP)  ## write the catalogues into the README's table of techniques
	$(BIN)/python tests/test_readme.py

bench: $(STAMP)  ## speed of training, start-up, inference and evaluations, memory, padding, and what was asked of them (hours)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/infer_speed.py
	$(BIN)/python benchmarks/infer_memory.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/eval_cost.py
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/goals.py

clean:  ## remove .venv and the tools' caches; runs/, folds/ and submissions/ stay
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
