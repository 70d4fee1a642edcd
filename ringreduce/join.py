"""Uneven data: who still has some. What ranks without data do meanwhile is in gradients.py."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ringreduce.communicator import Communicator
from ringreduce.errors import RingReduceError


class RollCall:
    """At the beginning of each reduced backward, every rank says whether it still has data.

    If strict, before each forward instead: layers in it may wait for all ranks, too.

    here: ranks that had, in the last call in which any had. over: nobody has any more.
    weighted: whether any rank here has a weight. kept: slots in which any rank here accumulates
    onto gradients that are reduced already; once it is over, those in which any rank that had data
    to the end has left such gradients. below: slots in which this rank had such gradients before
    it last accumulated some of its own: from then on nothing else tells.
    """

    def __init__(self, comm: Communicator, by_present: bool, strict: bool) -> None:
        """by_present: averages are over the ranks that have data, not over all.

        strict: all ranks raise as soon as some, but not all, are out of data.
        """
        self.by_present = by_present
        self.here = list(range(comm.size))
        self.over = False
        self.weighted = False
        self.kept: set[int] = set()
        self.below: set[int] = set()
        self._comm = comm
        self.strict = strict

    def call(self, here: bool, weighted: bool, kept: Collection[int], num_slots: int) -> None:
        """Collective: all ranks come to it, those out of data too. Raises RingReduceError.

        kept: of a rank out of data, what it left when it had some until now; else nothing.
        """
        size, rank = self._comm.size, self._comm.rank
        bits = np.zeros(size + 1 + num_slots, np.uint8)
        bits[rank] = here
        bits[size] = here and weighted
        bits[[size + 1 + slot for slot in kept]] = 2 if here else 1
        flags = self._comm.allreduce_(bits, "max").tolist()
        present = [other for other in range(size) if flags[other]]
        self.over = not present
        self.here = present or self.here
        self.weighted = bool(flags[size])
        said = 1 if self.over else 2
        self.kept = {slot for slot in range(num_slots) if flags[size + 1 + slot] == said}
        if self.strict and 0 < len(present) < size:
            absent = sorted(set(range(size)) - set(present))
            raise RingReduceError(
                f"rank {', '.join(map(str, absent))} ran out of data before the others, and "
                "join(throw_on_early_termination=True) ends training on all ranks then"
            )
