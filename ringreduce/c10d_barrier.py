"""monitored_barrier of the torch.distributed backend: a barrier that says who has not come.

Every rank counts its barriers in the store of the group, and rank 0 writes there whether all had
come in time, so that all agree. The group's communicator takes no part: ranks may be stuck in one
of its collectives, and the group can be used afterwards. For finding faults, not for speed.
"""

from __future__ import annotations

import time

from ringreduce.bootstrap import POLL_S
from ringreduce.c10d_channels import Counts
from ringreduce.errors import CollectiveTimeout

GRACE_S = 1.0  # for what rank 0 has found to get through


class MonitoredBarrier:
    """All of them of one group, on this rank."""

    def __init__(self, rank: int, size: int, counts: Counts) -> None:
        self._rank = rank
        self._size = size
        self._counts = counts
        self._number = 0  # barriers so far

    def __call__(self, timeout_s: float, wait_all_ranks: bool) -> None:
        """Raises CollectiveTimeout on every rank that came, unless all came within timeout_s.

        Its text has Gloo's words, which programs look for. wait_all_ranks: whether to name all
        ranks that did not, or the first of them.
        """
        self._number += 1
        self._counts.write(f"barrier {self._rank}", self._number)
        limit = time.monotonic() + timeout_s
        if self._rank == 0:
            missing = self._wait_for_all(limit)
            self._counts.write(self._verdict, 1 + sum(2 << rank for rank in missing))
        else:
            missing = self._read_verdict(limit, timeout_s)
        if not missing:
            return
        who = f"Rank {missing[0]}"
        if wait_all_ranks:
            who = "Ranks " + ", ".join(map(str, missing))
        here = "timed out in monitoredBarrier"
        if self._rank > 0:
            here = (
                "successfully reached monitoredBarrier, but received errors while waiting for "
                "send/recv from rank 0"
            )
        raise CollectiveTimeout(
            f"Rank {self._rank} {here}: {who} failed to pass monitoredBarrier in "
            f"{1000 * timeout_s:g} ms. The process group can still be used"
        )

    @property
    def _verdict(self) -> str:
        """1, and 2 to the power of 1 + its rank for each rank that rank 0 has missed."""
        return f"barrier verdict {self._number}"

    def _wait_for_all(self, limit: float) -> list[int]:
        missing = list(range(1, self._size))
        while True:
            in_time = time.monotonic() < limit
            missing = [x for x in missing if self._counts.read(f"barrier {x}") < self._number]
            if not missing or not in_time:
                return missing
            time.sleep(POLL_S)

    def _read_verdict(self, limit: float, timeout_s: float) -> list[int]:
        """A rank 0 that has come in time has as long again for the others."""
        while not (verdict := self._counts.read(self._verdict)):
            came = self._counts.read("barrier 0") >= self._number
            if time.monotonic() > limit + (timeout_s + GRACE_S if came else 0.0):
                return [0]
            time.sleep(POLL_S)
        return [rank for rank in range(self._size) if verdict & 2 << rank]
