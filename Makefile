# Each target works in a fresh clone, on a machine with make and Python 3.11 to 3.13. 'make' alone lists them.
#   make test PYTHON=python3.12        another Python
#   make test ARGS="-m 'not slow'"     arguments for pytest; likewise for 'make demo' and 'make bench'
#   make test WORKERS=0                in one process; otherwise files of tests run side by side, a core each

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?= latency
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 8 ? cores : 8)))

# Without it OpenMP threads spin at barriers, which on a busy machine makes torch many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

# Nobody compiles but Python, when it imports (see INSTALL), and it must be let keep that: containers often forbid it, and
# then each of the tests' many processes compiles torch and Lightning anew, which takes longer than all else that it does.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile everything, which takes as long as all else that it does.
INSTALL := -m pip install --quiet --quiet --disable-pip-version-check --no-compile
PIP_INSTALL := $(BIN)/python $(INSTALL) --constraint constraints.txt
# What robomimic needs for its datasets and environments, without torchvision (docs/install.md).
ROBOMIMIC_NEEDS := imageio psutil six tensorboardX termcolor

# Whole files, so that what a file's tests share is made once; but for those in SPREAD of tests/conftest.py.
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench robosuite types lerobot rivals openpi runtime wheel environments clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.sim  ## install with the simulators, then record, train, evaluate and report (ARGS for 'scd demo')
	$(BIN)/scd demo $(ARGS)

test: $(VENV)/.dev  ## run the tests (ARGS for pytest)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

# mypy cannot follow the mapping of datasets/, policies/ and sim_eval/ into scd_robot, so it reads a copy laid out as
# the wheel is.
define copy_as_installed
	@rm -rf $(1) && mkdir -p $(1)
	@cp -r scd_robot $(1)/ && cp -r datasets policies sim_eval $(1)/scd_robot/
endef

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call copy_as_installed,build/typecheck)
	cd build/typecheck && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p scd_robot

bench: $(VENV)/.sim  ## run benchmarks/latency.py, or another with BENCH=five_tasks (ARGS for the benchmark)
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

# What differs there is numpy 1.26, a zarr, pyarrow and OpenCV that are a little older, and robosuite: all that reads or
# writes data, simulators, recordings, what numpy computes, and a short way through each verb is run again. A new test is in
# unless it is named here. All of them: make robosuite LEFT_OUT=
# - what torch computes, and its trainings: the tests of the command line train, act and evaluate there
LEFT_OUT := diffusion export model nn
LEFT_OUT += policies/test_choosing.py policies/test_images.py policies/test_scd.py policies/test_surprise.py
LEFT_OUT += training/test_autoencoder.py training/test_few_steps.py training/test_frames.py training/test_images.py
LEFT_OUT += training/test_joint.py training/test_objective.py training/test_pretrained.py
LEFT_OUT += training/test_run.py training/test_self_forcing.py
LEFT_OUT += analysis/test_encoder.py analysis/test_frame_networks.py analysis/test_history.py
LEFT_OUT += analysis/test_imagination.py analysis/test_latency.py
LEFT_OUT += cli/test_imagining.py cli/test_surprise.py cli/test_train_autoencoder.py
# - threads and sockets: what goes over the wire, a client and the loop itself are in
LEFT_OUT += serve/test_cli.py serve/test_one_shot.py serve/test_prompts.py
LEFT_OUT += serve/test_remote_stream.py serve/test_server.py
LEFT_OUT += control/test_lerobot_robot.py control/test_rehearsal.py
LEFT_OUT += control/test_robot_examples.py control/test_ros_robot.py
# - files of the checkout, and what runs in other environments only
LEFT_OUT += benchmarks test_hub.py test_layers.py test_packaging.py test_readme.py test_runtime.py
# - minutes of whole evaluations, which ask for statistics and reports of what the cheaper tests beside them have checked
LEFT_OUT += sim_eval/test_comparison.py sim_eval/test_documents.py sim_eval/test_memory.py
LEFT_OUT += sim_eval/test_named_policy.py sim_eval/test_pages.py

robosuite: $(VENV)-robosuite/.made  ## run the tests that can differ beside robosuite, with its older numpy and zarr
	$(VENV)-robosuite/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow or robosuite" \
	    $(addprefix --ignore=tests/,$(LEFT_OUT)) $(ARGS)

# Whatever of numpy and zarr our code names must be in the older ones too, also where no test beside robosuite
# comes. Their stubs tell less of what functions return.
types: $(VENV)-robosuite/.made  ## mypy beside robosuite: all that we name is in its older numpy and zarr
	$(call copy_as_installed,build/types)
	cd build/types && $(abspath $(VENV)-robosuite/bin)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache/robosuite --disable-error-code no-any-return -p scd_robot

lerobot: $(VENV)-lerobot/.made $(VENV)/.dev  ## let LeRobot read a dataset of ours, train our policy, and drive its robots; and compare backbones with timm (1.7 GB)
	rm -rf build/lerobot && mkdir -p build/lerobot
	$(BIN)/python tests/lerobot_env/write_example.py build/lerobot/dataset build/lerobot/expected.npz
	HF_HUB_OFFLINE=1 $(VENV)-lerobot/bin/python tests/lerobot_env/check_lerobot.py \
	    build/lerobot/dataset build/lerobot/expected.npz
	$(VENV)-lerobot/bin/python tests/lerobot_env/check_rivals.py build/lerobot/dataset build/lerobot/dataset.hdf5
	$(VENV)-lerobot/bin/python tests/lerobot_env/check_policy.py build/lerobot/dataset
	$(VENV)-lerobot/bin/python tests/lerobot_env/check_robot.py
	$(VENV)-lerobot/bin/python tests/lerobot_env/check_record.py
	$(VENV)-lerobot/bin/python tests/lerobot_env/check_vision.py

rivals: $(VENV)-lerobot/.made  ## make the environment of benchmarks/outside, the same (1.7 GB on disk)

openpi: $(VENV)-openpi/.made $(VENV)/.dev  ## let the published openpi-client drive a task through our server
	SCD_OPENPI_PYTHON=$(VENV)-openpi/bin/python $(BIN)/python -m pytest tests/serve/test_openpi_client.py $(ARGS)

# The wheel is built from the sdist, as an index would have it; the environment was made by pip from the folder.
runtime: $(VENV)-runtime/.made $(VENV)/.dev  ## let scd_robot_runtime do its work in an environment with only what it needs
	rm -rf build/runtime
	$(BIN)/python -m build --outdir build/runtime scd_robot_runtime > /dev/null
	$(VENV)-runtime/bin/python $(INSTALL) --no-deps --force-reinstall build/runtime/*.whl
	$(VENV)-runtime/bin/python -m pip check
	SCD_RUNTIME_PYTHON=$(abspath $(VENV)-runtime/bin/python) $(BIN)/python -m pytest tests/test_runtime.py $(ARGS)

wheel: $(VENV)/.dev  ## build the wheels, install ours in an empty environment, and look at it from an empty folder
	rm -rf dist build/lib
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --wheel --outdir dist/lerobot lerobot_policy_scd
	ls -l dist dist/lerobot
	$(BIN)/python tests/lerobot_env/check_wheels.py dist/*.whl dist/lerobot/*.whl
	@set -e; empty=$$(mktemp -d); trap 'rm -rf "$$empty"' EXIT; mkdir "$$empty/folder"; \
	$(PYTHON) -m venv "$$empty/venv"; python=$$empty/venv/bin/python; set -x; \
	"$$python" $(INSTALL) --constraint constraints.txt dist/*.whl; \
	"$$python" -m pip check; \
	cd "$$empty/folder"; \
	"$$python" $(CURDIR)/tests/wheel_smoke.py; \
	$(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    --python-executable "$$python" -p scd_robot

environments: $(VENV)/.dev  ## make all of the environments above, one after the other
	$(MAKE) $(VENV)-robosuite/.made
	$(MAKE) $(VENV)-lerobot/.made
	$(MAKE) $(VENV)-openpi/.made
	$(MAKE) $(VENV)-runtime/.made

clean:  ## remove what builds and tools left
	rm -rf build dist scd_robot.egg-info lerobot_policy_scd/build lerobot_policy_scd/src/*.egg-info \
	    scd_robot_runtime/build scd_robot_runtime/src .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## and the environments
	rm -rf .venv .venv-robosuite .venv-lerobot .venv-openpi .venv-runtime

# Stamps: an environment is filled again only when pyproject.toml or the constraints changed.

$(VENV)/.made $(VENV)-robosuite/.venv $(VENV)-lerobot/.venv $(VENV)-openpi/.venv $(VENV)-runtime/.venv:
	@command -v $(PYTHON) > /dev/null || { echo "make: there is no '$(PYTHON)'; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo \
	    "make: Python 3.11 to 3.13 is needed, '$(PYTHON)' is $$($(PYTHON) --version); name another with PYTHON=..." >&2; \
	    exit 1; }
	@$(PYTHON) -m venv $(@D) || { echo \
	    "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it comes with 'apt-get install python3-venv'" >&2; exit 1; }
	@touch $@

$(VENV)/.sim: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing scd_robot with the simulators into $(VENV) (1.8 GB on disk; a few minutes) ..."
	$(PIP_INSTALL) --editable ".[sim]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing scd_robot, simulators and development tools into $(VENV) (2 GB on disk; a few minutes) ..."
	$(PIP_INSTALL) --editable ".[sim,robotics,formats,ray,serve,hub,export,dev]" $(ROBOMIMIC_NEEDS) imagecodecs
	$(PIP_INSTALL) --no-deps "robomimic>=0.3,<0.4"
	@touch $(VENV)/.sim $@

$(VENV)-robosuite/.made: $(VENV)-robosuite/.venv pyproject.toml constraints/robosuite.txt
	$(@D)/bin/python $(INSTALL) --constraint constraints/robosuite.txt \
	    --editable ".[sim,formats,serve,dev]" robosuite $(ROBOMIMIC_NEEDS)
	$(@D)/bin/python $(INSTALL) --constraint constraints/robosuite.txt --no-deps "robomimic>=0.3,<0.4"
	@touch $@

# LeRobot's own requirements exclude this torch: only what is used of it is installed, at fixed versions.
$(VENV)-lerobot/.made: $(VENV)-lerobot/.venv constraints/lerobot.txt pyproject.toml lerobot_policy_scd/pyproject.toml
	$(@D)/bin/python $(INSTALL) --no-deps --requirement constraints/lerobot.txt
	$(@D)/bin/python $(INSTALL) --no-deps --no-build-isolation --editable . --editable lerobot_policy_scd
	@touch $@

$(VENV)-openpi/.made: $(VENV)-openpi/.venv constraints/openpi.txt
	$(@D)/bin/python $(INSTALL) --no-deps --requirement constraints/openpi.txt
	@touch $@

# Nothing else may be in it: setuptools, which Python 3.11 puts into every environment, goes.
$(VENV)-runtime/.made: $(VENV)-runtime/.venv constraints.txt scd_robot_runtime/pyproject.toml scd_robot_runtime/setup.py
	$(@D)/bin/python -m pip uninstall --quiet --yes --disable-pip-version-check setuptools
	$(@D)/bin/python $(INSTALL) --constraint constraints.txt ./scd_robot_runtime
	@touch $@
