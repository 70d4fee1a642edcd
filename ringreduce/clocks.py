"""What the clocks of other hosts say when ours says 0: bounds that hold, not estimates.

Nobody leaves a barrier before all have entered it. So of two ranks that each note when they enter
and leave, neither can have left before the other one entered, and that bounds how far their clocks
are apart; every further barrier narrows it. Processes of one host have one clock.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 16  # barriers: the quickest one counts

Barriers = list[tuple[int, int]]  # when this rank entered and left each one, in ns


def clock_name() -> str:
    """The same in two processes if and only if time.monotonic_ns() is the same clock there."""
    boot, namespace = "?", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/time")
    return f"{boot} {namespace}"


def run_barriers(barrier: Callable[[], object]) -> Barriers:
    """Collective."""
    times = []
    for _ in range(ROUNDS):
        entered_ns = time.monotonic_ns()
        barrier()
        times.append((entered_ns, time.monotonic_ns()))
    return times


@dataclass(frozen=True)
class Offset:
    """What to add to a clock to have ours: known at the moments at_ns of that clock, else linear.

    accuracy_ns: it is off by no more, at those moments.
    """

    at_ns: tuple[int, int] = (0, 1)
    offsets_ns: tuple[int, int] = (0, 0)
    accuracy_ns: int = 0

    def __call__(self, time_ns: int) -> int:
        """That moment, on our clock."""
        (first_ns, last_ns), (first, last) = self.at_ns, self.offsets_ns
        passed = (time_ns - first_ns) / max(1, last_ns - first_ns)
        return time_ns + first + round(passed * (last - first))


def offset_between(ours: Sequence[Barriers], theirs: Sequence[Barriers]) -> Offset:
    """From the same barriers of two ranks: some at the start, some at the end."""
    at_ns, offsets, accuracies = [], [], []
    for our_times, their_times in zip(ours, theirs, strict=True):
        pairs = list(zip(our_times, their_times, strict=True))
        low = max(our_in - their_out for (our_in, _), (_, their_out) in pairs)
        high = min(our_out - their_in for (_, our_out), (their_in, _) in pairs)
        at_ns.append(their_times[-1][1])
        offsets.append((low + high) // 2)
        accuracies.append(abs(high - low + 1) // 2)
    return Offset((at_ns[0], at_ns[-1]), (offsets[0], offsets[-1]), max(accuracies))
