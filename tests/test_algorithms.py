"""Choosing an algorithm: for the world by init, for a part of it by split."""

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
