# Every target makes .venv itself, so each works as the first command after a clone.
#   make PYTHON=python3.12 ...     another Python, 3.11 or newer
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                  torch without CUDA: less than a third of the disk, the same versions

PYTHON = python3
PIP_ARGS =
BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo tables test slurm-test check bench

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: .venv/.installed ## install everything into .venv (once: minutes, and 7 GB of disk)

demo: .venv/.installed ## train three small networks, take a modality away, and write a report (minutes, on a laptop)
	$(BIN)/crm sweep demo --yes --report

tables: .venv/.installed ## write the paper's tables from the records, and fail where one lacks runs (TINY=1: small runs are made first)
	$(if $(TINY),$(BIN)/crm sweep --for all --tiny --yes --no-track || test $$? -eq 3)
	$(BIN)/crm tables --final $(if $(TINY),--tiny)

test: .venv/.installed ## run the tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

slurm-test: .venv/.installed ## run the tests that need a Slurm, on a private one that they bring up and take down
	$(BIN)/python -m pytest -m slurm -n 2 --dist loadfile tests/slurm tests/chaos

bench: .venv/.installed ## measure what everything costs, and write the table in benchmarks/README.md (QUICK=1: small forms, to try)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

check: .venv/.installed ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "crm needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % v[:2])'
	@echo 'Installing into .venv: 3 to 8 minutes and 7 GB the first time ...'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test,dev]'
	@touch $@
