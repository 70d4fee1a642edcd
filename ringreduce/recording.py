"""What this rank did while a timeline was recorded: its collectives, and spans of Python's side.

Collectives are recorded by the core, whichever communicator of the rank they are on. Knows neither
the other ranks nor the file.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from ringreduce import _core

# Whose records have an op, or also a dtype and an algorithm, by chance only.
NO_OP = ("barrier", "allgather", "broadcast", "empty")
NO_DATA = ("barrier", "empty")


@dataclass(frozen=True)
class Span:
    """Something that took from begin_ns to end_ns, of time.monotonic_ns()."""

    track: str  # a line of the timeline
    name: str
    begin_ns: int
    end_ns: int
    details: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """One for each rank. Costs its users a look at `on` while it is off.

    Any thread may add; what is added later than stop() is dropped.
    """

    def __init__(self) -> None:
        self.core = _core.Trace()  # every communicator of the rank writes to it
        self.on = False
        self._lock = threading.Lock()  # of `on` and the spans
        self._spans: list[Span] = []

    def start(self) -> None:
        with self._lock:
            self._spans = []
            self.on = True
        self.core.start()

    def add(self, track: str, name: str, begin_ns: int, end_ns: int, **details: Any) -> None:
        with self._lock:
            if self.on:
                self._spans.append(Span(track, name, begin_ns, end_ns, details))

    def stop(self) -> tuple[list[Span], int]:
        """All since start(), and how many collectives found no room."""
        with self._lock:
            self.on = False
            spans, self._spans = self._spans, []
        records, dropped = self.core.stop()
        for record in records:
            spans += spans_of(record)
        return spans, dropped


def spans_of(record: tuple[Any, ...]) -> list[Span]:
    """A collective, and within it its two phases."""
    communicator, kind, op, dtype, algorithm, sequence, size_bytes = record[:7]
    on_progress_thread, begin_ns, met_ns, end_ns, error = record[7:]
    details = {
        "bytes": size_bytes,
        "sequence": sequence,
        "thread": "progress" if on_progress_thread else "caller",
    }
    if kind not in NO_DATA:
        details |= {"dtype": dtype, "algorithm": algorithm}
    if kind not in NO_OP:
        details["op"] = op
    if error:
        details["error"] = error
    track = f"communication ({communicator})"
    spans = [Span(track, kind, begin_ns, end_ns, details)]
    met = met_ns or end_ns
    spans.append(Span(track, "wait for peers", begin_ns, met))
    if end_ns > met:
        spans.append(Span(track, "move and reduce", met, end_ns))
    return spans
