"""Calls that meet by name, as Horovod's do: how ranks get in step whose calls differ in order.

Every message carries the name of its call. Where calls come in the same order on all ranks, they
meet at once and at no cost. Where they do not, the core refuses them before any data moves; then
the ranks tell each other what they wait for, and make up for what all of them have called. A rank
that has joined takes part with zeros. Knows no tensors: those are Communicator's.
"""

from __future__ import annotations

import itertools
import math
import pickle
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from ringreduce import _core, tensors
from ringreduce.communicator import ALLGATHER, ALLREDUCE, BARRIER, BROADCAST, Communicator
from ringreduce.errors import MismatchError
from ringreduce.operands import stream_of

KIND_NAMES = {kind: name for name, kind in _core.KINDS.items()}
NEGOTIATION = 2**31 - 1  # the stamp of the messages in which ranks tell what they wait for
MAX_ITEM_BYTES = 16  # of any dtype


class Message(NamedTuple):
    """What `submit` of the core takes."""

    kind: int
    op: int
    dtype: int
    root: int
    operands: list[tuple[Any, ...]]
    keepalive: Any
    place: tuple[Any, ...] = ()  # on a GPU: which, the stream, and rows

    def start(self, core: _core.Communicator, asynchronous: bool) -> _core.Work:
        return core.submit(*self[:-1], asynchronous, *self.place)

    def stamped(self, name: str) -> Message:
        """Meets only messages of the same name and root. Only broadcasts need the root itself."""
        stamp = zlib.crc32(f"{name} {self.root}".encode()) % NEGOTIATION
        if self.kind != BROADCAST:
            return self._replace(root=stamp)
        return self._replace(operands=[*self.operands, (0, 0, (0, stamp), None, None)])

    def outline(self) -> Message:
        """All that another rank has to know of it."""
        shapes = [(0, 0, tuple(operand[2]), None, None) for operand in self.operands]
        return self._replace(operands=shapes, keepalive=None)

    def zeros(self) -> Message:
        """One like it that a rank without data can send."""
        if self.place:
            return self._zeros_on_gpu()
        operands, kept = [], []
        for *_, shape, _, _ in self.operands:
            kept.append(memory := np.zeros(math.prod(shape) * MAX_ITEM_BYTES, np.uint8))
            address = memory.ctypes.data if memory.size else 0
            operands.append((address, address, shape, None, None))
        return self._replace(operands=operands, keepalive=kept)

    def _zeros_on_gpu(self) -> Message:
        """On this rank's GPU, whichever the message is from."""
        sizes = [math.prod(operand[2]) * _core.ITEM_BYTES[self.dtype] for operand in self.operands]
        memory = tensors.blank(sum(sizes), torch.uint8, "cuda").allocate().zero_()
        array = tensors.describe(memory)
        places = itertools.accumulate(sizes, initial=array.address)
        operands = [
            (address, address, operand[2], None, None)
            for address, operand in zip(places, self.operands, strict=False)
        ]
        place: tuple[Any, ...] = (array.device, stream_of(array), [])
        return self._replace(operands=operands, keepalive=memory, place=place)


class Part:
    """A message under way, where the core's Work is expected."""

    def __init__(self, meeting: Meeting, name: str, message: Message) -> None:
        self.name = name
        self.message = message
        self.refused = False
        self.error: MismatchError | None = None
        self.work: _core.Work | None = None
        self._meeting = meeting

    def wait(self, timeout_s: float | None = None, stream: int | None = None) -> None:
        if self.error is None and not self.refused:
            assert self.work is not None
            try:
                self.work.wait(timeout_s, stream)
            except MismatchError:
                self.refused = True
        if self.refused:
            self._meeting.negotiate(lambda: not self.refused)
            if self.error is None and stream is not None:
                assert self.work is not None
                self.work.wait(timeout_s, stream)
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        """A refused one needs the caller's help, as it is only in wait that ranks negotiate."""
        return self.work is None or self.work.done()

    def output(self) -> Any:
        assert self.work is not None
        return self.work.output()

    @property
    def counts(self) -> list[int]:
        assert self.work is not None
        return self.work.counts


class Meeting:
    """All named calls on one communicator, which nobody else should use meanwhile.

    Why negotiating ends: a rank that waits for a refused message first waits for all others it has
    sent, then sends its list until that meets the lists of all ranks. A rank that is elsewhere has
    each of its messages refused by a list, until it has to wait, too. So in the end all lists meet,
    and then no rank has anything under way.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._core = comm.core
        self._open: dict[str, Part] = {}  # not known to have ended; in order of issue
        self._unnamed: Counter[int] = Counter()  # by kind, since the ranks last were in step
        self._epoch = 0  # how often unnamed calls were counted anew, on all ranks
        self._joined_at: float | None = None
        self._last_to_join: int | None = None
        self._lock = threading.RLock()

    def named(self, name: str | None) -> Communicator:
        """The communicator for one call of that name."""
        comm = self.comm
        return Communicator(_NamedCore(self, name), comm.bootstrap, comm.name)  # type: ignore[arg-type]

    def submit(self, name: str, message: Message, asynchronous: bool) -> Part:
        """Raises ValueError if a call of that name is still under way."""
        with self._lock:
            self._sweep()
            if name in self._open:
                raise ValueError(f"{name}: a call of this name is under way. Synchronize it first")
            part = Part(self, name, message.stamped(name))
            if asynchronous or self._open:
                part.work = part.message.start(self._core, True)
                self._open[name] = part
            else:
                try:
                    part.work = part.message.start(self._core, False)
                except MismatchError:
                    self._open[name] = part
                    part.refused = True
        if not asynchronous:
            part.wait(None, message.place[1] if message.place else None)
        return part

    def join(self) -> int:
        """Takes part in what the others call, with zeros, until all have joined.

        Returns the rank that was the last to come.
        """
        with self._lock:
            self._joined_at = time.time()
            self._last_to_join = None
            try:
                self.negotiate(lambda: self._last_to_join is not None)
            finally:
                self._joined_at = None
            assert self._last_to_join is not None
            return self._last_to_join

    def negotiate(self, is_over: Callable[[], bool]) -> None:
        """Until is_over: finds out what all ranks have called, and does it."""
        with self._lock:
            while not is_over():
                self._sweep(wait=True)
                mine = {name: part.message.outline() for name, part in self._open.items()}
                try:
                    table = self._exchange((self._joined_at, mine))
                except MismatchError:
                    continue  # another rank is not here yet
                self._settle([joined_at for joined_at, _ in table], [calls for _, calls in table])

    def number(self, kind: int) -> str:
        """A name for a call without one."""
        self._unnamed[kind] += 1
        return f"{self._epoch}.{self._unnamed[kind]}"

    def _sweep(self, wait: bool = False) -> None:
        """Forgets what has ended well. wait: afterwards nothing is under way."""
        for name, part in list(self._open.items()):
            if part.refused:
                continue
            assert part.work is not None
            if not wait and not part.work.done():
                return
            try:
                part.work.wait()
            except MismatchError:
                part.refused = True
                continue
            except Exception:
                if wait:
                    raise  # else its own wait will
            del self._open[name]

    def _exchange(self, mine: Any) -> list[Any]:
        """Collective: what every rank has to say. Raises MismatchError where one does not."""
        message = tensors.from_bytes(pickle.dumps(mine))
        operands = [(message.address, 0, message.shape, None, None)]
        work = Message(ALLGATHER, 0, message.dtype, NEGOTIATION, operands, message.owner).start(
            self._core, False
        )
        data = work.output().tobytes()
        ends = np.cumsum(work.counts)
        return [pickle.loads(data[end - n : end]) for end, n in zip(ends, work.counts, strict=True)]

    def _settle(self, joined_at: list[float | None], calls: list[dict[str, Message]]) -> None:
        """The same on all ranks, and nothing is under way: makes up for what all have called."""
        present = [rank for rank, joined in enumerate(joined_at) if joined is None]
        if not present:
            self._last_to_join = max(range(len(calls)), key=lambda rank: joined_at[rank] or 0)
            self._count_anew()
            return
        outlines = {name: outline for theirs in calls for name, outline in theirs.items()}
        common = [
            name
            for name, outline in outlines.items()
            if all(name in calls[rank] for rank in present)
            and (len(present) == len(calls) or outline.kind in (ALLREDUCE, BARRIER))
        ]
        for name in common:
            self._make_up(name, outlines[name])
        if not common:
            text = "the ranks do not wait for the same call:"
            for rank, theirs in enumerate(calls):
                what = "join" if joined_at[rank] is not None else ", ".join(theirs) or "nothing"
                text += f" rank {rank}: {what};"
            if len(present) < len(calls):
                text += " where a rank has joined, the others can only allreduce, and barrier;"
            self._refuse(list(self._open), MismatchError(text.rstrip(";")))

    def _make_up(self, name: str, outline: Message) -> None:
        part = self._open.pop(name, None)
        message = outline.zeros() if part is None else part.message
        try:
            # On a GPU asynchronously: who waits for it may do so on another stream.
            work = message.start(self._core, bool(message.place))
            work.wait()
        except MismatchError as error:
            if part is not None:
                self._open[name] = part
            text = str(error)
            if message.kind != BROADCAST:
                text = text.replace(f", root {message.root}", "")
            self._refuse([name] if part is not None else [], MismatchError(text))
            return
        if part is not None:
            part.work, part.refused = work, False

    def _refuse(self, names: Iterable[str], error: MismatchError) -> None:
        for name in names:
            part = self._open.pop(name)
            part.error, part.refused = error, False
        self._count_anew()

    def _count_anew(self) -> None:
        self._unnamed.clear()
        self._epoch += 1


class _NamedCore:
    """What a Communicator needs of the core, for the messages of one call."""

    def __init__(self, meeting: Meeting, name: str | None) -> None:
        core = meeting.comm.core
        self.rank, self.size = core.rank, core.size
        self.local_rank, self.local_size = core.local_rank, core.local_size
        self._meeting = meeting
        self._name = name
        self._num_messages = 0

    def submit(
        self,
        kind: int,
        op: int,
        dtype: int,
        root: int,
        operands: list[tuple[Any, ...]],
        keepalive: Any,
        asynchronous: bool,
        *place: Any,
    ) -> Part:
        message = Message(kind, op, dtype, root, operands, keepalive, place)
        if self._name is None:
            self._name = self._meeting.number(kind)
        name = f"{KIND_NAMES[kind]} {self._name}"
        if self._num_messages:
            name += f" ({self._num_messages})"
        self._num_messages += 1
        return self._meeting.submit(name, message, asynchronous)

    @property
    def sequence(self) -> int:
        return self._meeting.comm.core.sequence

    def allreduce_plain(self, x: Any, op: Any, /) -> bool:
        """Never: the short way carries no name."""
        return False

    def abort(self, reason: str) -> None:
        """Not needed to get ranks back in step."""
