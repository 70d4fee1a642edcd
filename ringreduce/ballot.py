"""The last message of a reduced backward: what each rank says of its gradients.

One allreduce carries all of it. What follows from it is decided in gradients.py.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ringreduce.communicator import Communicator


class Ballot:
    """One byte for each slot (used) and bucket (dirty), nine for each rank (failed, its weight).

    The largest byte counts. Only its own rank writes to a weight, so that is a gather. A numpy
    array: torch's calls on one so short would take as long as a large bucket.

    used: a flag for each slot, of the last ballot that was read; empty before. dirty: buckets.
    failed: ranks. weights: one for each rank, 0 where that gave none.
    """

    def __init__(self, comm: Communicator, num_slots: int, num_buckets: int) -> None:
        """Collective."""
        self._comm = comm
        lengths = [num_slots, num_buckets, comm.size, comm.size * np.float64().nbytes]
        self._bits = comm.empty(sum(lengths), np.uint8)
        parts = np.split(self._bits, np.cumsum(lengths)[:-1])
        self._used, self._dirty, self._failed = parts[:3]
        self._weights = parts[3].view(np.float64)
        self.used: list[int] = []
        self.dirty: list[int] = []
        self.failed: list[int] = []
        self.weights: list[float] = []

    def hold(
        self, unused: Collection[int], dirty: Collection[int], weight: float | None, failed: bool
    ) -> None:
        """Collective. Says it all, and reads what the others say."""
        self._bits[:] = 0
        self._used[:] = 1
        self._used[list(unused)] = 0
        self._dirty[list(dirty)] = 1
        self._failed[self._comm.rank] = failed
        if weight is not None:
            self._weights[self._comm.rank] = weight
        self._comm.allreduce_(self._bits, "max")
        self.used = self._used.tolist()
        self.dirty = np.flatnonzero(self._dirty).tolist()
        self.failed = np.flatnonzero(self._failed).tolist()
        self.weights = self._weights.tolist()
