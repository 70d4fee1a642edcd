"""Choosing an algorithm, for the world and for a part of it; staying in step after a mistake."""

import numpy as np
import pytest

from ringreduce import MismatchError
from ringreduce.testing import run_threads

ALLREDUCE = 1


def test_split_with_an_algorithm_of_its_own():
    def check(comm):
        for algorithm in ("one_shot", "two_shot", "ring", "tree"):
            part = comm.split(0, algorithm=algorithm)
            x = np.full(100_003, float(part.rank + 1))
            assert (part.allreduce(x) == sum(range(1, part.size + 1))).all()
            assert part.core.choice(ALLREDUCE, 8) == algorithm
            part.close()
        with pytest.raises(ValueError, match="algorithm must be one of"):
            comm.split(0, algorithm="fastest")
        comm.barrier()

    run_threads(3, check, timeout_s=60)


def test_ranks_must_agree_on_the_algorithm():
    def check(comm):
        with pytest.raises(MismatchError, match="rank 0: tree, rank 1: ring"):
            comm.split(0, algorithm="ring" if comm.rank else "tree")
        assert comm.split(0).size == comm.size

    run_threads(2, check, timeout_s=60)


def test_a_mismatch_nobody_waited_for_leaves_the_ranks_in_step():
    def check(comm):
        for turn in range(50):
            comm.allreduce(np.ones(2 + comm.rank), async_op=True)  # differs, and is dropped
            x = np.full(3, 1.0 + comm.rank)
            with pytest.raises(MismatchError, match="rank 0 calls"):
                comm.allreduce_(x)  # takes part, then tells of the earlier one
            assert (x == 3).all(), turn
            assert (comm.allreduce(x) == 6).all()

    run_threads(2, check, timeout_s=60)
