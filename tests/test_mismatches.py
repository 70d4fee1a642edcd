"""Ranks that call different things: all are told both sides, nothing is harmed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ringreduce as rr

TESTS = Path(__file__).resolve().parent
SIZES = (2, 4)  # on two cores: slices are owned, slices are claimed
X = np.ones(70_000, np.float32)

Call = Callable[[], object]


def calls_of(comm: rr.Communicator, odd: bool) -> list[tuple[Call, str, str]]:
    """What this rank calls, how the odd rank's call is named, and how the others' is."""
    short = X[:7]
    return [
        (lambda: comm.allreduce(X, "max" if odd else "sum"), "(max, ", "(sum, "),
        (lambda: comm.reduce(X, "min" if odd else "avg"), "(min, ", "(avg, "),
        (lambda: comm.allreduce(short if odd else X), "shape (7,)", "shape (70000,)"),
        (lambda: comm.allreduce(X.reshape(7, -1) if odd else X), "(7, 10000)", "(70000,)"),
        (lambda: comm.allgather(short.astype("i4") if odd else short), "int32", "float32"),
        (lambda: comm.broadcast(X, root=int(odd)), "root 1", "root 0"),
        (lambda: comm.barrier() if odd else comm.reduce_scatter(X), "barrier(", "reduce_scatter("),
        (lambda: comm.broadcast(X) if odd else comm.allgather(X), "broadcast(", "allgather("),
        (lambda: comm.empty(64, "u1") if odd else comm.empty(65, "u1"), "(64 byt", "(65 byt"),
        (lambda: comm.grouped_allreduce([X] * (3 - odd)), "and 1 more", "and 2 more"),
        (lambda: comm.allreduce(short if odd else X, async_op=True).wait(), "(7,)", "(70000,)"),
    ]


def mismatches(comm: rr.Communicator) -> None:
    """Each rank in turn is the odd one out, in each respect; after each all is well again."""
    for odd in range(comm.size):
        for call, its, ours in calls_of(comm, comm.rank == odd):
            with pytest.raises(rr.MismatchError) as caught:
                call()
            text = str(caught.value)
            assert its in text and ours in text, text
            assert f"rank {odd} calls " in text, text
            assert f"you are rank {comm.rank}" in text, text
            assert comm.allreduce(X[:3]).tolist() == [comm.size] * 3
        assert (comm.allreduce(X) == comm.size).all()


def test_a_mismatch_is_told_to_all_and_harms_nothing(ranks):
    for size in SIZES:
        ranks(size, mismatches, timeout_s=60)


@pytest.mark.core
def test_mismatches_under_mpirun(mpirun):
    script = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import ringreduce as rr
from test_mismatches import mismatches
mismatches(rr.world())
"""
    done = mpirun(3, script)
    assert (done.returncode, done.stderr) == (0, "")
