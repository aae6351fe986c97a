# `make test` needs python3 (3.11 or newer) with venv, gcc and make. Nothing outside this directory is written but pip's cache.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
OBJECTIVE ?= a3po
COMPARE ?=
STEPS ?=
DEMO_ARGS ?=
CASES ?= 10000
SEED ?= 0
MUTANTS ?= 200

VENV := .venv
JUNIT := build/junit
TORCH := torch==2.13.0

# The kernels run natively or in Triton's interpreter; a process is one or the other from its start.
unexport TRITON_INTERPRET
export TRITON_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HOME := $(CURDIR)/.cache/huggingface
export HF_HUB_OFFLINE := 1

ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST = $(ONE_THREAD) $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal --junitxml=$(JUNIT)/$(2).xml
OTHERS := not trl and not verl

NATIVE = $(call PYTEST,$(VENV),native) -m "not interpreter and $(OTHERS)" $(PYTEST_ARGS)
INTERPRETER = TRITON_INTERPRET=1 $(call PYTEST,$(VENV),interpreter) -m "interpreter and $(OTHERS)" $(PYTEST_ARGS)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help env lint typecheck test test-native test-interpreter test-trl test-verl test-megatron test-triton36 docs fuzz mutate bench demo train-plain dynamics clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# $(1) directory, $(2) constraints, $(3) requirements, $(4) requirements installed last and without their dependencies,
# $(5) and $(6) what a fresh one takes, to download (with PyTorch's build for CPUs; that for CUDA is 3 GB more) and on disk.
# Triton goes in first and is not held after that: a CUDA build of torch brings the one Triton it accepts.
# Byte code is left to the first import: most of these files are never imported.
PIP_INSTALL = $(1)/bin/python -m pip install --no-compile
define environment
$(1)/.stamp: setup.py $(2)
	@echo "== $(1): $(5) to download and $(6) on disk with PyTorch for CPUs, one to ten minutes"
	@echo "== $(1), 1 of 4: an empty environment"
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "== $(1), 2 of 4: Triton and build tools"
	$(call PIP_INSTALL,$(1)) -c $(2) setuptools wheel triton
	@echo "== $(1), 3 of 4: PyTorch and what else $(2) pins"
	grep -v '^triton==' $(2) > $(1)/constraints.txt
	$(call PIP_INSTALL,$(1)) -c $(1)/constraints.txt --no-build-isolation $(TORCH) $(3)
	@echo "== $(1), 4 of 4: a3po_kernels itself, from here"
	$(call PIP_INSTALL,$(1)) --no-deps --no-build-isolation $(4) -e .
	touch $$@
endef

# With what the examples use.
TRL_REQUIREMENTS := trl==1.16.0 liger-kernel==0.8.5 peft==0.21.2 reasoning-gym==0.1.25 matplotlib

TEST_TOOLS := pytest pytest-xdist hypothesis expecttest numpy tqdm
# Not verl's own requirements: those bring a training stack that its loss functions never import.
VERL_IMPORTS := ray tensordict omegaconf codetiming transformers

$(eval $(call environment,$(VENV),constraints.txt,-e '.[dev]',,550 MB,1.9 GB))
$(eval $(call environment,.venv-trl,constraints-trl.txt,$(TEST_TOOLS) $(TRL_REQUIREMENTS),,650 MB,2.3 GB))
$(eval $(call environment,.venv-verl,constraints-verl.txt,$(TEST_TOOLS) $(VERL_IMPORTS),verl==0.9.1,650 MB,2.1 GB))
# Its wheels are said to want a Python that they run without.
$(eval $(call environment,.venv-megatron,constraints.txt,$(TEST_TOOLS),--ignore-requires-python megatron-core==0.19.2,550 MB,1.9 GB))
$(eval $(call environment,.venv-triton36,constraints-triton36.txt,$(TEST_TOOLS),triton==3.6.0,700 MB,1.6 GB))

# The manual is read from the sources: neither torch nor the package is installed for it.
.venv-docs/.stamp: constraints-docs.txt
	@echo "== .venv-docs: 170 MB on disk, a minute"
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -c constraints-docs.txt mkdocs mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

env: $(VENV)/.stamp  ## make or update .venv

lint: env  ## ruff check
	$(VENV)/bin/ruff check .

typecheck: env  ## mypy
	$(VENV)/bin/mypy

test: lint typecheck  ## lint, types and the whole suite: natively, then the kernels in Triton's interpreter
	@rm -f $(JUNIT)/native.xml $(JUNIT)/interpreter.xml; failed=0; \
	$(NATIVE) || failed=1; \
	$(INTERPRETER) || failed=1; \
	$(VENV)/bin/python tests/summary.py TOTAL $(JUNIT)/native.xml $(JUNIT)/interpreter.xml || failed=1; \
	exit $$failed

test-native: env  ## the tests that need no interpreter
	$(NATIVE)

test-interpreter: env  ## the kernels in Triton's interpreter
	$(INTERPRETER)

test-trl: .venv-trl/.stamp  ## TRL, transformers, Liger-Kernel and the examples, in .venv-trl
	$(call PYTEST,.venv-trl,trl) -m trl tests/conformance $(PYTEST_ARGS)

test-verl: .venv-verl/.stamp  ## conformance with verl, in .venv-verl
	$(call PYTEST,.venv-verl,verl) -m verl tests/conformance $(PYTEST_ARGS)

test-megatron: .venv-megatron/.stamp  ## inside Megatron-Core's GPTModel, in .venv-megatron; not part of CI
	$(call PYTEST,.venv-megatron,megatron) -m megatron tests/conformance/test_megatron_core.py $(PYTEST_ARGS)

test-triton36: .venv-triton36/.stamp  ## the kernels in the interpreter of Triton 3.6, in .venv-triton36
	TRITON_INTERPRET=1 $(call PYTEST,.venv-triton36,triton36) -m "interpreter and $(OTHERS)" $(PYTEST_ARGS)

docs: .venv-docs/.stamp  ## the manual, into build/site; fails on a broken link or a name that is not there
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

fuzz: env  ## CASES random calls of the package against the reference, from SEED: a few minutes
	$(ONE_THREAD) PYTHONPATH=. $(VENV)/bin/python -m tests.fuzz --seed $(SEED) --cases $(CASES) --workers $(WORKERS)

mutate: env  ## MUTANTS small errors planted in the source, one at a time: which of them the tests notice; resumable
	$(ONE_THREAD) PYTHONPATH=. $(VENV)/bin/python -m tests.mutation --count $(MUTANTS) --seed $(SEED)
	$(ONE_THREAD) PYTHONPATH=. $(VENV)/bin/python -m tests.mutation --count $(MUTANTS) --seed $(SEED) --group triton

BENCH = PYTHONPATH=. .venv-trl/bin/python -W ignore::FutureWarning -m
bench: .venv-trl/.stamp  ## time, memory and machine code beside the peers, on the CPU; then the tables and figures: 10 minutes
	@for script in bench_logits bench_linear bench_memory bench_selection scaling bench_collectives machine_code; do \
		echo "== $$script"; $(BENCH) bench.$$script --save || exit 1; done
	@for script in report scaling_page; do echo "== $$script"; $(BENCH) bench.$$script || exit 1; done

# Of other packages' sources, as they are imported.
QUIET := -W ignore::FutureWarning -W ignore::SyntaxWarning
# COMPARE="dapo a3po" in place of one OBJECTIVE; SEED, STEPS, and any other option in DEMO_ARGS.
RUN_ARGS = $(if $(COMPARE),--compare $(COMPARE),--objective $(OBJECTIVE)) --seed $(SEED) $(if $(STEPS),--steps $(STEPS)) $(DEMO_ARGS)
demo: .venv-trl/.stamp  ## train a small model by RLVR with A3POTrainer, in .venv-trl; OBJECTIVE=dapo, COMPARE="dapo a3po", SEED, STEPS
	PYTHONPATH=. .venv-trl/bin/python $(QUIET) -m examples.demo $(RUN_ARGS)

train-plain: .venv-trl/.stamp  ## the same in a plain loop, with the same options
	PYTHONPATH=. .venv-trl/bin/python $(QUIET) -m examples.train_plain $(RUN_ARGS)

dynamics: .venv-trl/.stamp  ## train the studies of bench/dynamics_studies.py, several seeds each: hours, resumable; then the page
	PYTHONPATH=. .venv-trl/bin/python -m bench.dynamics run
	PYTHONPATH=. .venv-trl/bin/python -m bench.dynamics page

clean:  ## remove what tests and builds leave
	rm -rf build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## and the environments
	rm -rf .venv .venv-trl .venv-verl .venv-megatron .venv-triton36 .venv-docs
