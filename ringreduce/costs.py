"""What reduced backwards cost a rank: sums for stats(), spans for a timeline. Reduces nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ringreduce.recording import Recorder
from ringreduce.work import Work


class Reduced(Protocol):
    """A bucket that was reduced."""

    index: int
    wire: Tensor  # what travels
    slots: Any  # a list with one of each parameter
    ready_ns: int  # when its last gradient was there
    work: Any  # what a user's codec returns need not be a Work, and is not counted then


@dataclass
class Totals:
    """What reductions have cost this rank."""

    backwards: int = 0  # reduced ones
    bytes: int = 0  # of gradients, as they travel
    gradient_bytes: int = 0  # the same as they are in .grad
    wait_s: float = 0.0  # that backward had to wait for communication at its end
    communication_s: float = 0.0  # in which a bucket was under way
    hidden_s: float = 0.0  # of these, before backward had computed all gradients

    def count(self, buckets: Sequence[Reduced], computed_ns: int) -> None:
        """computed_ns: when backward had computed all gradients."""
        for bucket in buckets:
            if isinstance(bucket.work, Work):
                begin_ns, end_ns = bucket.work.times_ns()
                self.communication_s += (end_ns - begin_ns) / 1e9
                self.hidden_s += max(0, min(end_ns, computed_ns) - begin_ns) / 1e9

    @property
    def overlap(self) -> float | None:
        return self.hidden_s / self.communication_s if self.communication_s else None


def record_backward(
    recorder: Recorder, begin_ns: int, computed_ns: int, buckets: Sequence[Reduced]
) -> None:
    """At its end. Does nothing where no timeline is recorded."""
    if not recorder.on:
        return
    now_ns = time.monotonic_ns()
    recorder.add("training", "backward", begin_ns, now_ns)
    recorder.add("training", "finish", computed_ns, now_ns)
    for bucket in buckets:
        if isinstance(bucket.work, Work):
            turn_ns, end_ns = bucket.work.times_ns()
            details = {
                "bytes": bucket.wire.nbytes,
                "parameters": len(bucket.slots),
                "queued_us": max(0, turn_ns - bucket.ready_ns) / 1000,
            }
            name = f"bucket {bucket.index}"
            recorder.add("buckets", name, bucket.ready_ns, end_ns, **details)
