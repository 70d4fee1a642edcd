"""Which Bootstrap a process gets, and that it is never silently a world of one."""

import os
import sys

import pytest

from ringreduce import launch
from ringreduce.bootstrap import SelfBootstrap
from ringreduce.errors import NotInitialized, RingReduceError
from ringreduce.launch import TORCHRUN_VARIABLES, Launch, from_environment, mpi_launch

pytestmark = pytest.mark.core

SLURM = "SLURM_STEP_NUM_TASKS"


@pytest.fixture
def no_launcher(monkeypatch):
    for variables in (launch.WORLD_SIZES, launch.LOCAL_SIZES, launch.RANKS):
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    for variable in (launch.SLURM_VARIABLE, *launch.TORCHRUN_VARIABLES):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("environment", "variable", "least_size", "exact"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "8", "PMIX_RANK": "3"}, "OMPI_COMM_WORLD_SIZE", 8, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}, "PMI_SIZE", 4, True),
        ({"MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS", 2, False),
        ({"PMIX_RANK": "0"}, "PMIX_RANK", 1, False),
        ({"PMIX_RANK": "3"}, "PMIX_RANK", 4, False),
        ({"PMI_SIZE": "many"}, "PMI_SIZE", 0, False),
        # The launcher's own variable counts, not that of the Slurm job around it.
        ({SLURM: "2", "OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE", 8, True),
    ],
)
def test_launch_variables(environment, variable, least_size, exact):
    assert mpi_launch(environment)[1:] == (variable, least_size, exact)


def test_slurm_counts_only_with_mpi4py_and_more_than_one_task(monkeypatch):
    pytest.importorskip("mpi4py")
    assert mpi_launch({SLURM: "1"}) is None
    assert mpi_launch({SLURM: "2"}) == Launch("srun", SLURM, 2, True)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert mpi_launch({SLURM: "2"}) is None


def test_nothing_in_the_environment_is_a_world_of_one(no_launcher):
    assert mpi_launch({"RANK": "0", "WORLD_SIZE": "2"}) is None
    assert isinstance(from_environment(None, 1.0), SelfBootstrap)


def test_a_bootstrap_may_be_given():
    given = SelfBootstrap()
    assert from_environment(given, 1.0) is given


def test_launched_without_mpi4py(no_launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it raises ImportError
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert isinstance(from_environment(None, 1.0), SelfBootstrap)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    with pytest.raises(RingReduceError, match="of Open MPI started .* pip install mpi4py"):
        from_environment(None, 1.0)


@pytest.mark.parametrize(
    "variables", [{"OMPI_COMM_WORLD_SIZE": "2"}, dict.fromkeys(TORCHRUN_VARIABLES, "2")]
)
def test_a_child_of_a_rank_is_none_itself(no_launcher, monkeypatch, variables):
    monkeypatch.setenv(launch.RANK_PROCESS, str(os.getppid()))
    assert isinstance(from_environment(None, 1.0), SelfBootstrap)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotInitialized, match=f"started by process {os.getppid()}, which is the"):
        from_environment(None, 1.0)


def test_an_mpirun_of_another_mpi_is_an_error_that_names_both(mpirun, mpi_name):
    """The rank sees what it would see under the other launcher: its size, and an MPI alone."""
    other, size_variable = "Open MPI", "OMPI_COMM_WORLD_SIZE"
    if mpi_name == other:
        other, size_variable = "MPICH", "PMI_SIZE"
    script = f"""
import os
for name in list(os.environ):
    if name.startswith(("OMPI_", "PMIX_", "PMI_", "MPI_LOCAL")):
        del os.environ[name]
os.environ[{size_variable!r}] = "8"
from ringreduce.launch import from_environment
from ringreduce.errors import RingReduceError
try:
    from_environment(None, 20)
except RingReduceError as error:
    print(error)
"""
    done = mpirun(1, script)
    assert f"of {other}" in done.stdout, done.stderr
    assert f"started 8 ranks ({size_variable}=8), but mpi4py uses {mpi_name}" in done.stdout
    assert "every rank would be a world of one" in done.stdout
