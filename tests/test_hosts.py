"""Failures where ranks are on several hosts: whoever lives names the culprit, on every host.

The hosts are pretended (RINGREDUCE_HOST): all but the network is real. What collectives compute
there is tested in test_mpirun.py, on hosts that are apart in test_cluster.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

# The tree of leaders is 0 - 4, 4 - 2, 2 - 1, 2 - 3: rank 4 lies between, and 1 and 3 hear of its
# end from 2.
HOSTS = "a b c d e e"
SIZE = len(HOSTS.split())

RANK = """
import json, os, signal, sys, time
import numpy as np
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
os.environ["RINGREDUCE_HOST"] = os.environ["HOSTS_OF_RANKS"].split()[rank]
import ringreduce as rr
rr.init(timeout=float(os.environ.get("TIMEOUT_S", "30")))
x = np.ones(300_000, np.float32)
victim = int(os.environ["VICTIM"])
begin_s = time.monotonic()
try:
    for _ in range(3):
        rr.allreduce(x)
    rr.barrier()
    begin_s = time.monotonic()
    if rank == victim:
        fail()
    for _ in range(3):
        rr.allreduce(x)
except Exception as error:
    note = [type(error).__name__, str(error), time.monotonic() - begin_s]
    path = os.path.join(os.environ["NOTES"], str(rank))
    with open(path + ".part", "w") as file:
        json.dump(note, file)
    os.rename(path + ".part", path)
    raise
"""
KILL = "def fail():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
LEAVE = "def fail():\n    sys.exit(0)\n"
RAISE = "def fail():\n    raise ValueError('bad luck')\n"
LATE = "def fail():\n    time.sleep(30)\n"


def notes_of(mpirun, folder: Path, script: str, victim: int, **environment: str) -> dict[int, list]:
    """By rank: class and text of the error, and after how many seconds it came."""
    folder.mkdir()
    environment |= {"NOTES": str(folder), "VICTIM": str(victim), "HOSTS_OF_RANKS": HOSTS}
    done = mpirun(SIZE, script + RANK, timeout_s=50, env=environment)
    assert done.returncode != 0
    whole = [path for path in folder.iterdir() if path.suffix != ".part"]  # of who was not killed
    return {int(path.name): json.loads(path.read_text()) for path in whole}


@pytest.mark.parametrize("victim", [4, 5])  # a leader; another rank
@pytest.mark.parametrize(("how", "said"), [(KILL, ""), (LEAVE, "exited"), (RAISE, "bad luck")])
def test_every_survivor_names_the_culprit(mpirun, mpi_name, tmp_path, how, said, victim):
    notes = notes_of(mpirun, tmp_path / "notes", how, victim)
    if how == KILL and mpi_name != "Open MPI":
        return  # the launcher kills the others, too, faster than they can speak: the job has ended
    survivors = set(range(SIZE)) - {victim}
    assert survivors <= set(notes), notes
    for rank in survivors:
        kind, text, after_s = notes[rank]
        assert kind == "PeerFailed", text
        assert f"rank {victim} " in text.split("failed:", 1)[1], text
        assert said in text and after_s < 5, (text, after_s)


def test_a_rank_that_is_late_is_named_on_other_hosts(mpirun, tmp_path):
    """Its own host has no other rank that could know."""
    notes = notes_of(mpirun, tmp_path / "notes", LATE, 0, TIMEOUT_S="2")
    assert len(notes) >= SIZE - 1
    for kind, text, _ in (notes[rank] for rank in range(1, SIZE)):
        assert kind == "CollectiveTimeout", text
        assert "rank 0 (pid" in text and "has not come" in text
