# `make demo` and `make test` need python3 (3.11 to 3.13, with venv) and a C++ compiler; everything else goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# By a path, not by a hook: where a working directory has a folder called mixmae, such as one that holds this checkout,
# Python would take that for the package.
EDITABLE := --config-settings editable_mode=compat --editable

.PHONY: install demo test test-distributed test-services test-slow drill check dashboards performance wheels bench-gpu clean

install: $(VENV)/.installed

# torch first, then the packages that are built from source against it: an isolated build would fetch torch once more.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja
	$(PIP) torch torchvision
	$(PIP) --no-build-isolation deepspeed fairscale
	$(PIP) --no-build-isolation $(EDITABLE) ".[plots]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --no-build-isolation $(EDITABLE) ".[plots,test,check]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/mixmae demo

# Tests come in tiers, told apart by pytest's markers (pyproject.toml); a file at a time, in PROCESSES: two for a core,
# since half the time a test waits for processes that it started.
PROCESSES := $(shell expr 2 '*' $$(nproc))
TIER = $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	--timeout 900 -m

# Whatever proves numbers and data: no test of these starts several ranks, or needs a program of a Debian package.
test: $(VENV)/.installed-test
	$(TIER) "not distributed and not services and not slow"

# Several gloo ranks, and launches on this machine.
test-distributed: $(VENV)/.installed-test
	$(TIER) "distributed and not services and not slow"

# As root, with what .ci/run installs: Slurm, sshd, Prometheus, Alertmanager, a browser. What is missing is named.
test-services: $(VENV)/.installed-test
	$(TIER) "services and not slow"

# Minutes each: the demo over seeds, Swin-H, faults watched by Prometheus.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# As root: 60 faults in real runs on hosts and a Slurm of its own, 40 minutes on two cores; writes docs/reliability.md.
drill: $(VENV)/.installed-test
	$(BIN)/python -m tests.drill --report docs/reliability.md

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# From the lists of metrics and panels: Grafana's JSON, the console page, docs/metrics.md.
dashboards: $(VENV)/.installed-test
	$(BIN)/python -m mixmae.monitoring.generate

# Tables and pictures of docs/performance.md and docs/claim.md, from benchmarks/results, and of weak scaling in
# docs/planning.md.
performance: $(VENV)/.installed-test
	$(BIN)/python -m mixmae.trainer.benchmarks.page
	$(BIN)/python -m mixmae.trainer.benchmarks.claim_page
	$(BIN)/python -m mixmae.trainer.planning.weak_scaling

# What `make bench-gpu` needs beside torch, torchvision, timm and pytest, and what those need themselves, on a machine
# without a network; WHEELS_PYTHON is the version of Python there.
WHEELS_PYTHON ?= 3.12
wheels: $(VENV)/.installed
	rm -rf wheels
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir wheels --constraint constraints.txt deepspeed fairscale
	$(BIN)/pip download --dest wheels --only-binary :all: --no-deps --python-version $(WHEELS_PYTHON) \
		--constraint constraints.txt webdataset simplejpeg xxhash braceexpand hjson py-cpuinfo einops msgpack \
		pydantic pydantic-core annotated-types typing-inspection typing-extensions psutil ninja rich fsspec filelock \
		prometheus-client tensorboard absl-py protobuf hypothesis sortedcontainers wrapt \
		nvidia-ml-py faster-coco-eval pytest-xdist execnet pytest-timeout

# Installs nothing from outside: beside the machine's own packages, from wheels/. Not into a virtual environment: one
# made from another does not see what is in that.
bench-gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu-packages wheels/*.whl
	PYTHONPATH=.gpu-packages:. $(PYTHON) -m mixmae.trainer.benchmarks.gpu

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .hypothesis
