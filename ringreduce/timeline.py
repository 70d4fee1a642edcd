"""One file that shows what all ranks did: timeline(), for ui.perfetto.dev or chrome://tracing.

Each rank records (recording.py); at the end rank 0 gathers it all, brings it to its own clock
(clocks.py) and writes it in the Trace Event Format.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from types import TracebackType
from typing import Any

from ringreduce.clocks import Offset, clock_name, offset_between, run_barriers
from ringreduce.collectives import communicator_of
from ringreduce.communicator import Communicator
from ringreduce.errors import MismatchError, RingReduceError
from ringreduce.recording import Span

PATIENCE_S = 3.0  # with the other ranks, where this one has an exception to report
TRACKS = ("training", "buckets", "communication")  # from top to bottom

_log = logging.getLogger("ringreduce")


def timeline(path: str | os.PathLike[str], *, comm: Communicator | None = None) -> Timeline:
    """A context: what all ranks do within it becomes one picture, in the file `path`.

    path: of a JSON file in the Trace Event Format, which rank 0 writes when the context ends, in
        place of an older one; other ranks' paths are not looked at. Open it in ui.perfetto.dev.
    comm: the ranks to record; default: all. What they do on any communicator is recorded.

    A process of the picture is a rank. Its lines: "training" has each reduced backward, from the
    first hook to the end-of-backward callback, and within it "finish", where it waits for
    communication; "buckets" each bucket of gradients from the moment when its last one was there
    until it was reduced; "communication", one for each communicator, every collective, with bytes,
    dtype, algorithm, sequence number and the thread that ran it, and within it how long it waited
    for peers, and how long it moved and reduced data. Where ranks outnumber cores and one of them
    reduces a small message for all, the others' whole time is waiting. Of collectives on GPUs it
    shows what the host does, which ends with their launch.

    Times of ranks on one host are exact; those of other hosts are aligned by barriers at the start
    and the end, and `otherData.clock_accuracy_us` in the file says how well. No more than 2**20
    collectives of a rank are kept; the number of others is there, too.

    Entering and leaving are collective, and the file is there when they are over. Raises
    MismatchError where a rank enters alone, OSError on all ranks where rank 0 cannot write to path,
    TypeError or ValueError for what is no path, RuntimeError within another timeline. If the
    context ends by an exception, the file is written if all ranks leave it within seconds; else
    rank 0 logs that it is not. An error of a rank is never hidden, nor waited with for long.
    """
    return Timeline(path, comm)


class Timeline:
    """What timeline() returns."""

    def __init__(self, path: str | os.PathLike[str], comm: Communicator | None) -> None:
        """Local."""
        self.path = os.fspath(path)
        if not isinstance(self.path, str):
            raise TypeError(f"path must be a str or a path, not {type(path).__name__}")
        if not self.path:
            raise ValueError("path is empty: give the name of the file to write")
        self._comm = comm
        self._private: Communicator | None = None  # the timeline's own; None outside of it

    def __enter__(self) -> Timeline:
        parent = communicator_of(self._comm)
        recorder = parent.bootstrap.recorder
        if self._private is not None or recorder.on:
            raise RuntimeError("timeline() within timeline(): one at a time")
        try:
            private = parent.split(0)
        except MismatchError as error:
            raise MismatchError(f"all ranks must enter timeline() together: {error}") from error
        assert private is not None
        try:
            problem = _why_not_writable(self.path) if parent.rank == 0 else None
            _raise_alike(private, problem, self.path)
            self._clocks = [run_barriers(private.barrier)]
        except BaseException:
            private.close()
            raise
        self._private, self._recorder = private, recorder
        recorder.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        private, self._private = self._private, None
        assert private is not None
        spans, dropped = self._recorder.stop()
        try:
            # Where all ranks have failed alike, all come here; where one has, the others may never.
            private.barrier(async_op=True).wait(None if kind is None else PATIENCE_S)
            self._clocks.append(run_barriers(private.barrier))
            self._gather(private, spans, dropped)
        except (RingReduceError, OSError, TimeoutError) as error:
            if private.rank == 0:
                _log.warning("timeline: %s is not written: %s", self.path, error)
            if kind is None:
                raise
        finally:
            private.close()

    def _gather(self, private: Communicator, spans: list[Span], dropped: int) -> None:
        """Collective: to all, since there is no gather to one; text like this shrinks tenfold."""
        mine = {
            "host": socket.gethostname(),
            "clock": clock_name(),
            "barriers": self._clocks,
            "dropped": dropped,
            "spans": [astuple(span) for span in spans],
        }
        messages = private.exchange(zlib.compress(json.dumps(mine).encode(), 1))
        problem = None
        if private.rank == 0:
            ranks = [json.loads(zlib.decompress(message)) for message in messages]
            try:
                _write(self.path, _document(ranks))
            except OSError as error:
                problem = error
        _raise_alike(private, problem, self.path)


def _why_not_writable(path: str) -> OSError | None:
    """Leaves the file as it is."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(21, os.strerror(21), path)
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):
            return None
    except OSError as error:
        return error


def _raise_alike(private: Communicator, problem: OSError | None, path: str) -> None:
    """Collective: raises rank 0's problem, if it has one, on all ranks."""
    mine = b"" if problem is None else json.dumps([problem.errno, problem.strerror]).encode()
    theirs = private.exchange(mine)[0]
    if theirs:
        number, text = json.loads(theirs)
        raise OSError(number, f"timeline: rank 0 cannot write: {text}", path)


def _write(path: str, document: dict[str, Any]) -> None:
    """All of it or nothing."""
    partial = path + ".part"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _document(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    offsets = [
        Offset()
        if rank["clock"] == ranks[0]["clock"]
        else offset_between(ranks[0]["barriers"], rank["barriers"])
        for rank in ranks
    ]
    zero_ns = ranks[0]["barriers"][0][-1][1]  # rank 0 has left the last barrier of the start
    events: list[dict[str, Any]] = []
    for number, (rank, offset) in enumerate(zip(ranks, offsets, strict=True)):
        events += _events(number, rank["host"], [Span(*span) for span in rank["spans"]], offset)
    for event in events:
        if event["ph"] == "X":
            event["ts"] = (event["ts"] - zero_ns) / 1000
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "ranks": len(ranks),
            "clock_accuracy_us": max(offset.accuracy_ns for offset in offsets) / 1000,
            "dropped_collectives": sum(rank["dropped"] for rank in ranks),
        },
    }


def _events(pid: int, host: str, spans: list[Span], offset: Offset) -> Iterator[dict[str, Any]]:
    """Of one rank. "ts" is in ns yet."""
    yield _metadata("process_name", pid, 0, name=f"rank {pid} ({host})")
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    names = sorted({span.track for span in spans}, key=_place)
    tid = 0
    for name in names:
        for lane, members in enumerate(_lanes(span for span in spans if span.track == name)):
            label = name if lane == 0 else f"{name}, {lane + 1}"
            yield _metadata("thread_name", pid, tid, name=label)
            yield _metadata("thread_sort_index", pid, tid, sort_index=tid)
            for span in members:
                begin_ns, end_ns = offset(span.begin_ns), offset(span.end_ns)
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": name.partition(" ")[0],
                    "pid": pid,
                    "tid": tid,
                    "ts": begin_ns,
                    "dur": (end_ns - begin_ns) / 1000,
                    "args": span.details,
                }
            tid += 1


def _metadata(kind: str, pid: int, tid: int, **details: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": details}


def _place(track: str) -> tuple[int, str]:
    return TRACKS.index(track.partition(" ")[0]), track


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans that lie within each other or apart, as the format wants them of one thread."""
    lanes: list[tuple[list[Span], list[int]]] = []  # members, and the ends of those still open
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        for _, ends in lanes:
            while ends and ends[-1] <= span.begin_ns:
                ends.pop()
        fitting = (lane for lane in lanes if not lane[1] or span.end_ns <= lane[1][-1])
        lane = next(fitting, None)
        if lane is None:
            lane = ([], [])
            lanes.append(lane)
        lane[0].append(span)
        lane[1].append(span.end_ns)
    return [members for members, _ in lanes]
