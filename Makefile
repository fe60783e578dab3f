# `make demo` and `make test` need python3 (3.11 to 3.13, with venv) and a C++ compiler; everything else goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: install demo test test-slow drill check dashboards clean

install: $(VENV)/.installed

# torch first, then the packages that are built from source against it: an isolated build would fetch torch once more.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja
	$(PIP) torch torchvision
	$(PIP) --no-build-isolation deepspeed fairscale
	$(PIP) --no-build-isolation --editable ".[plots]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[plots,test,check]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mixmae demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# As root: 60 faults in real runs on hosts and a Slurm of its own, an hour on two cores; writes docs/reliability.md.
drill: $(VENV)/.installed-test
	$(BIN)/python -m tests.drill --report docs/reliability.md

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# From the lists of metrics and panels: Grafana's JSON, the console page, docs/metrics.md.
dashboards: $(VENV)/.installed-test
	$(BIN)/python -m monitoring.generate

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .hypothesis
