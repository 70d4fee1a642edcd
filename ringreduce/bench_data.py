"""What a benchmark reduces: the job, its numbers, and how many of a result's elements are wrong.

The inputs are small integers, so results are exact in every dtype and in any order of summation:
they are compared bit for bit with the closed form. No communication happens here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Bytes on the busiest link over bytes of the message, for p ranks: nccl-tests' "bus bandwidth".
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda p: 2 * (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "allgather": lambda p: (p - 1) / p,
    "broadcast": lambda p: 1.0,
}
PEERS = ("mpi", "gloo")
ROOT = 0
PERIOD = 1009  # elements


@dataclass(frozen=True)
class Job:
    """What is measured. As in nccl-tests a size is the larger of what a rank gives and gets."""

    collective: str
    op: str
    dtype: str
    ranks: int

    @property
    def reduces(self) -> bool:
        return self.collective in ("allreduce", "reduce_scatter")

    @property
    def in_place(self) -> bool:
        return self.collective in ("allreduce", "broadcast")

    @property
    def item_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    def count(self, size_bytes: int) -> int:
        """Elements of a message: at least one, and in equal parts where ranks give or get parts."""
        count = max(1, size_bytes // self.item_bytes)
        if self.collective in ("reduce_scatter", "allgather"):
            count = max(1, count // self.ranks) * self.ranks
        return count

    def input_count(self, size_bytes: int) -> int:
        count = self.count(size_bytes)
        return count // self.ranks if self.collective == "allgather" else count

    def output_count(self, size_bytes: int) -> int:
        count = self.count(size_bytes)
        return count // self.ranks if self.collective == "reduce_scatter" else count


def pattern(job: Job, rank: int, iteration: int) -> npt.NDArray[np.int64]:
    """One period of a rank's input; a prime one, so that a chunk in a wrong place does not fit."""
    index = np.arange(PERIOD, dtype=np.int64)
    mixed = (index * index + 3 * index * rank + 7 * rank + 11 * iteration) % PERIOD
    p = job.ranks
    if job.dtype == "bool":
        return mixed % 2
    if job.op == "prod":  # some ranks double it, few enough for 8 bits
        return 1 + (mixed % max(4, p) == 0)
    if job.op == "avg":  # a sum of multiples of p is divided without a remainder
        return p * (mixed % max(2, p) == 0)
    return mixed % max(2, min(8, 256 // p))  # 256: bfloat16 holds the integers up to there


def encode(values: npt.NDArray[np.int64], dtype: str) -> Bytes:
    """The integers in that dtype, as bytes; integers wrap."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)


def repeated(values: npt.NDArray[np.int64], count: int, dtype: str) -> Bytes:
    """`count` elements: the period again and again."""
    period = encode(values, dtype)
    return np.resize(period, count * (len(period) // PERIOD))


def input_data(job: Job, size_bytes: int, rank: int, iteration: int) -> Bytes:
    return repeated(pattern(job, rank, iteration), job.input_count(size_bytes), job.dtype)


def expected_data(job: Job, size_bytes: int, rank: int, iteration: int) -> Bytes:
    """What a rank must hold after the collective, bit for bit."""
    if job.collective == "broadcast":
        return input_data(job, size_bytes, ROOT, iteration)
    if job.collective == "allgather":
        return np.concatenate([input_data(job, size_bytes, r, iteration) for r in range(job.ranks)])
    inputs = np.stack([pattern(job, r, iteration) for r in range(job.ranks)])
    result = getattr(inputs, "sum" if job.op == "avg" else job.op)(axis=0)
    if job.op == "avg":
        result //= job.ranks
    everything = repeated(result, job.count(size_bytes), job.dtype)
    if job.collective == "reduce_scatter":
        return np.split(everything, job.ranks)[rank]
    return everything


def count_wrong(got: Bytes, expected: Bytes, item_bytes: int) -> int:
    """Elements that differ in any bit; a missing or surplus one is wrong too."""
    common = min(len(got), len(expected))
    word = np.dtype(f"u{min(item_bytes, 8)}")
    differs = got[:common].view(word) != expected[:common].view(word)
    if item_bytes > word.itemsize:
        differs = differs.reshape(-1, item_bytes // word.itemsize).any(axis=1)
    surplus = abs(len(got) - len(expected)) // item_bytes
    return int(np.count_nonzero(differs)) + surplus
