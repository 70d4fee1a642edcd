"""Programs with a hard time limit, of which no process is left when they have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

END_S = 2.0  # the last rank may end this much later than mpirun

Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def run_to_end(
    command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command, of which nothing is left afterwards."""
    # Files of its own: Open MPI's bear the launcher's pid, and what a killed one has left keeps a
    # later one of the same pid from starting.
    with tempfile.TemporaryDirectory(prefix="job") as files:
        return run_marked(command, environment | {"TMPDIR": files}, timeout_s)


def run_marked(
    command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command whose processes are known by a mark in their environment."""
    mark = f"TEST_JOB={uuid.uuid4()}"
    process = subprocess.Popen(
        command,
        env=environment | dict([mark.split("=")]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours to handle
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_job(mark)
        output, errors = process.communicate()
        pytest.fail(
            f"{' '.join(command)} ran longer than {timeout_s:g} s\n"
            f"--- stdout\n{output}\n--- stderr\n{errors}"
        )
    except BaseException:  # Ctrl-C
        kill_job(mark)
        process.wait()
        raise
    limit = time.monotonic() + END_S
    while any(processes_of_job(mark)) and time.monotonic() < limit:
        time.sleep(0.01)
    left = kill_job(mark)
    if left:
        pytest.fail(f"{' '.join(command)} left {left}\n--- stdout\n{output}\n--- stderr\n{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_job(mark: str) -> list[str]:
    """Kills all processes of a job. Returns what it met."""
    met: list[str] = []
    while found := list(processes_of_job(mark)):
        for pid, name in found:
            met.append(f"{name} ({pid})")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return met


def processes_of_job(mark: str) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that inherited the mark in its environment.

    Launchers put ranks into process groups and sessions of their own, so neither tells. The
    environment of a zombie is empty.
    """
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                yield int(path.name), (path / "comm").read_text().strip()
