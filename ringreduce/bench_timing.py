"""How a benchmark takes time: blocks of iterations between barriers, those of all loops in turn.

What ranks decide from their clocks they decide alike: each number is gathered first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ringreduce.bench_peers import Loop

if TYPE_CHECKING:
    from ringreduce.communicator import Communicator

LONGEST_BLOCK_S = 0.03  # many time slices of the scheduler, short enough to alternate often
SHORTEST_BLOCK_S = 0.002
FEWEST_BLOCKS = 3
MOST_ITERATIONS = 1 << 20


def gather(comm: Communicator, values: Sequence[float]) -> np.ndarray:
    """Every rank's values on every rank: (ranks, len(values)). What is decided by it is agreed."""
    return np.asarray(comm.allgather(np.array([values], dtype=np.float64)))


def seconds_left(comm: Communicator, deadline_s: float) -> float:
    """Until that time of rank 0's clock, as rank 0 sees it."""
    return float(gather(comm, [deadline_s - time.perf_counter()])[0, 0])


def time_block(comm: Communicator, loop: Loop, iterations: int) -> float:
    """Seconds between two barriers, on this rank.

    The iteration ahead is not timed: caches must not tell what ran before. The barrier behind is:
    where ranks share cores one may end before another has begun.
    """
    loop(1)
    comm.barrier()
    start = time.perf_counter()
    loop(iterations)
    comm.barrier()
    return time.perf_counter() - start


def calibrate(comm: Communicator, loop: Loop, block_s: float) -> int:
    """Iterations that take about block_s, the same number on all ranks."""
    iterations = 1
    while True:
        elapsed_s = float(gather(comm, [time_block(comm, loop, iterations)]).max())
        if elapsed_s >= block_s / 4 or iterations >= MOST_ITERATIONS:
            break
        iterations *= 8
    return min(max(1, round(iterations * block_s / elapsed_s)), MOST_ITERATIONS)


def measure(
    comm: Communicator,
    loops: Sequence[Loop],
    most_blocks: int,
    share_s: float,
    fixed: int | None = None,
) -> tuple[list[int], np.ndarray]:
    """(iterations of each loop, seconds per iteration [block, loop]) in about share_s seconds.

    Blocks of all loops alternate, so that drift of the machine meets all alike; of a block the
    slowest rank counts. fixed: the iterations of every block, instead of what fits.
    """
    deadline_s = time.perf_counter() + share_s
    block_s = share_s / (2 * most_blocks * len(loops))
    block_s = min(max(block_s, SHORTEST_BLOCK_S), LONGEST_BLOCK_S)
    iterations = [fixed or calibrate(comm, loop, block_s) for loop in loops]
    rounds: list[list[float]] = []
    while len(rounds) < most_blocks:
        if len(rounds) >= FEWEST_BLOCKS and seconds_left(comm, deadline_s) <= 0:
            break
        rounds.append([time_block(comm, *each) for each in zip(loops, iterations, strict=True)])
    elapsed = [seconds for each in rounds for seconds in each]
    slowest = gather(comm, elapsed).max(axis=0).reshape(len(rounds), len(loops))
    return iterations, slowest / iterations
