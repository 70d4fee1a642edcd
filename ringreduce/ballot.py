"""The last message of a reduced backward: what each rank says of its gradients.

One allreduce carries all of it. What follows from it is decided in gradients.py.
"""

from __future__ import annotations

import struct
from collections.abc import Collection

import torch

from ringreduce.communicator import Communicator

WEIGHT = struct.Struct("<d")


class Ballot:
    """One byte for each slot (used) and bucket (dirty), nine for each rank (failed, its weight).

    The largest byte counts. Only its own rank writes to a weight, so that is a gather.

    used: a flag for each slot, of the last ballot that was read; empty before. dirty: buckets.
    failed: ranks. weights: one for each rank, 0 where that gave none.
    """

    def __init__(self, comm: Communicator, num_slots: int, num_buckets: int) -> None:
        """Collective."""
        self._comm = comm
        lengths = [num_slots, num_buckets, comm.size, comm.size * WEIGHT.size]
        self._bits = comm.empty(sum(lengths), torch.uint8)
        self._used, self._dirty, self._failed, self._weights = self._bits.split(lengths)
        self.used: list[int] = []
        self.dirty: list[int] = []
        self.failed: list[int] = []
        self.weights: list[float] = []

    def hold(
        self, unused: Collection[int], dirty: Collection[int], weight: float | None, failed: bool
    ) -> None:
        """Collective. Says it all, and reads what the others say."""
        self._bits.zero_()
        self._used.fill_(1)
        self._used[list(unused)] = 0
        self._dirty[list(dirty)] = 1
        self._failed[self._comm.rank] = failed
        if weight is not None:
            write_weight(self._weights, self._comm.rank, weight)
        self._comm.allreduce_(self._bits, "max")
        self.used = self._used.tolist()
        self.dirty = self._dirty.nonzero().flatten().tolist()
        self.failed = self._failed.nonzero().flatten().tolist()
        self.weights = read_weights(self._weights)


def write_weight(bits: torch.Tensor, rank: int, weight: float) -> None:
    """Into the bytes of this rank."""
    place = slice(rank * WEIGHT.size, (rank + 1) * WEIGHT.size)
    bits[place] = torch.frombuffer(bytearray(WEIGHT.pack(weight)), dtype=torch.uint8)


def read_weights(bits: torch.Tensor) -> list[float]:
    return [weight for (weight,) in WEIGHT.iter_unpack(bytes(bits.tolist()))]
