"""How jobs under mpirun end when a rank, or the launcher, is killed, stopped or interrupted.

What the ranks tell each other is tested in test_failures.py, exceptions in test_ending.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

RANK = """
import json, os, sys, time
import numpy as np
import ringreduce as rr
rr.init(timeout=30)
rank, size = rr.rank(), rr.size()
def put(name, content):
    path = os.path.join(os.environ["NOTES"], name + str(rank))
    with open(path + ".part", "w") as file:
        json.dump(content, file)
    os.rename(path + ".part", path)
def note_error(fn):
    try:
        put("working", 0)
        fn()
    except BaseException as error:
        put("error", [type(error).__name__, str(error)])
        raise
def work():
    while True:
        rr.allreduce(np.ones(10_000))
put("pid", os.getpid())
rr.barrier()
"""
# Notes that it works only once it is within a collective, which its main thread waits in.
WAIT = """
import threading
core = rr.world().core
def note_when_inside(before):
    while core.sequence == before:
        time.sleep(0.001)
    put("waiting", 0)
def wait():
    threading.Thread(target=note_when_inside, args=(core.sequence,)).start()
    rr.barrier()
"""


class Notes:
    """What the ranks of a job under mpirun write down, each in files of its own."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        folder.mkdir()
        self.environment = {"NOTES": str(folder)}

    def read(self, name: str) -> dict[int, object]:
        paths = {rank: self.folder / f"{name}{rank}" for rank in range(self.size)}
        return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}

    def wait_for_all(self, name: str) -> dict[int, object]:
        limit = time.monotonic() + 60
        while len(found := self.read(name)) < self.size:
            assert time.monotonic() < limit, f"only ranks {list(found)} came so far"
            time.sleep(0.002)
        return found


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes", 3)


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    yield
    assert not list(Path("/dev/shm").glob("*ringreduce*"))


def launcher_of(pid: int) -> int:
    """The parent's parents up to mpirun; under MPICH a proxy lies between."""
    while True:
        status = Path(f"/proc/{pid}/stat").read_text()
        name, parent = status[status.index("(") : status.rindex(")")], status.rpartition(")")[2]
        if name.startswith(("(mpirun", "(mpiexec", "(prterun")):
            return pid
        pid = int(parent.split()[1])


def run_and_signal(mpirun, notes, script, number, whom, once="working"):
    """Runs a job and sends a signal to one of its processes once all ranks have noted `once`.

    Returns what it printed, its status, and when the signal went and when the job ended.
    """
    sent = []

    def send():
        notes.wait_for_all(once)
        pids = notes.wait_for_all("pid")
        pid = launcher_of(pids[0]) if whom == "launcher" else pids[whom]
        time.sleep(0.1)
        sent.append(time.monotonic())
        os.kill(pid, number)

    sender = threading.Thread(target=send)
    sender.start()
    done = mpirun(notes.size, RANK + script, env=notes.environment)
    ended_s = time.monotonic()
    sender.join()
    assert sent, f"the job ended before it was at work:\n{done.stdout}{done.stderr}"
    return done, sent[0], ended_s


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: dict[int, object]) -> bool:
    limit = time.monotonic() + 2
    while any(alive(pid) for pid in pids.values()):
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.core
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job(mpirun, mpi_name, notes, victim):
    done, killed_s, ended_s = run_and_signal(
        mpirun, notes, "note_error(work)", signal.SIGKILL, victim
    )
    assert done.returncode != 0
    assert ended_s - killed_s < 2
    errors = notes.read("error")
    if mpi_name == "Open MPI":  # lets them live for 250 ms: who could say it was told in time
        assert set(errors) == {0, 1, 2} - {victim}, done.stderr
    for kind, text in errors.values():
        assert kind == "PeerFailed" and f"rank {victim} (pid" in text and "allreduce(" in text, text
    assert gone(notes.read("pid"))


@pytest.mark.core
def test_a_killed_launcher_takes_all_ranks_along(mpirun, notes):
    """Also ranks that are busy, or asleep in a wait."""
    script = "rr.barrier() if rank == 0 else time.sleep(60) if rank == 1 else sum(iter(int, 1))"
    done, _, _ = run_and_signal(mpirun, notes, script, signal.SIGKILL, "launcher", "pid")
    assert done.returncode != 0
    assert gone(notes.read("pid"))


@pytest.mark.core
def test_ctrl_c_at_the_launcher_ends_the_job(mpirun, notes):
    done, sent_s, ended_s = run_and_signal(
        mpirun, notes, "note_error(work)", signal.SIGINT, "launcher"
    )
    assert done.returncode != 0
    assert ended_s - sent_s < 5
    assert gone(notes.read("pid"))


@pytest.mark.core
def test_ctrl_c_at_a_rank_ends_the_job(mpirun, mpi_name, notes):
    script = (
        WAIT
        + """
if rank == 0:
    put("waiting", 0)
note_error(lambda: time.sleep(60) if rank == 0 else wait())
"""
    )
    done, sent_s, ended_s = run_and_signal(mpirun, notes, script, signal.SIGINT, 1, "waiting")
    assert done.returncode != 0
    assert ended_s - sent_s < 2
    errors = notes.read("error")
    assert errors[1][0] == "KeyboardInterrupt"
    if mpi_name == "Open MPI":
        assert errors[2][0] == "PeerFailed" and "rank 1 was interrupted" in errors[2][1]
    assert gone(notes.read("pid"))


@pytest.mark.core
@pytest.mark.parametrize("leave", ["sys.exit(3)", "os._exit(5)", "pass"])
def test_a_rank_that_leaves_early_is_named(mpirun, mpi_name, notes, leave):
    """By an exit of any kind, or at the end of its program."""
    script = f"""
if rank == 1:
    {leave}
else:
    note_error(work)
"""
    done = mpirun(notes.size, RANK + script, env=notes.environment)
    assert done.returncode != 0
    errors = notes.read("error")
    if mpi_name == "Open MPI":
        assert set(errors) == {0, 2}, done.stderr
    for kind, text in errors.values():
        assert kind == "PeerFailed" and "rank 1 (pid" in text, text
        assert ("died" if leave == "os._exit(5)" else "exited") in text, text
    assert gone(notes.read("pid"))


@pytest.mark.core
def test_a_stopped_rank_is_named_and_the_job_ends(mpirun, notes):
    environment = {"RINGREDUCE_WARN_AFTER": "0.3", "RINGREDUCE_TIMEOUT": "1"}
    script = RANK.replace("rr.init(timeout=30)", "rr.init()") + "note_error(work)"
    stopper = threading.Thread(target=lambda: os.kill(notes.wait_for_all("pid")[0], signal.SIGSTOP))
    stopper.start()
    done = mpirun(notes.size, script, env=notes.environment | environment)
    stopper.join()
    assert done.returncode != 0
    assert done.stderr.count("has waited 0.3 s in ") == 2, done.stderr
    errors = notes.read("error")
    assert errors
    for kind, text in errors.values():
        assert kind == "CollectiveTimeout"
        assert "rank 0 (pid" in text and "its process is stopped" in text, text
    assert gone(notes.read("pid"))


@pytest.mark.core
def test_exits_in_any_order_are_clean(mpirun):
    """The last collective of each of many communicators, and then the end of each process."""
    script = """
import random, time
import numpy as np
import ringreduce as rr
delays = random.Random(rr.rank())
for repetition in range(100):
    with rr.world().split(0) as part:
        part.allreduce(np.ones(1 + 50 * repetition))
    time.sleep(0.001 * delays.randrange(3))
rr.barrier()
"""
    done = mpirun(3, script)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_little_chaos():
    chaos = TESTS.parent / "scripts" / "chaos.py"
    seed = random.randrange(1_000_000)  # another one each time; what fails is printed with its seed
    command = [sys.executable, str(chaos), "--runs=5", f"--seed={seed}", "--within-ms=1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
