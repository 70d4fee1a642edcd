"""send and recv of the torch.distributed backend: a communicator of two ranks for each channel.

A channel goes from one rank to another and has one tag. Both ends open it at its first use, over
the store of the group, in a thread of its own: nobody else takes part, and nobody waits for it. It
is no fast path: a message is a broadcast between the two, and the sender counts it in the store,
where one who receives from any source sees it.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from ringreduce.bootstrap import POLL_S
from ringreduce.communicator import Communicator
from ringreduce.errors import CollectiveTimeout, RingReduceError

OpenPair = Callable[[str, int, int], Communicator]  # name, rank, size


class Counts(Protocol):
    """Numbers by name, each written by one rank and seen by all. 0 before."""

    def write(self, name: str, count: int) -> None: ...

    def read(self, name: str) -> int: ...


class Channels:
    """All channels of this rank within a group."""

    def __init__(
        self, rank: int, size: int, open_pair: OpenPair, counts: Counts, timeout_s: float
    ) -> None:
        """timeout_s: for how long to look for a message of any source."""
        self._timeout_s = timeout_s
        self._rank = rank
        self._size = size
        self._open_pair = open_pair
        self._counts = counts
        self._channels: dict[str, _Channel] = {}
        self._mailboxes: dict[int, _Mailbox] = {}  # by tag, where messages of any source are wanted
        self._lock = threading.Lock()

    def send(self, tensor: Tensor, to: int, tag: int) -> Pending:
        channel = self._channel(self._rank, self._peer(to), tag)
        return Pending(channel.submit(tensor.detach(), False), tensor.device)

    def receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        self._peer(source)
        with self._lock:
            mailbox = self._mailboxes.get(tag)
        if mailbox is not None:
            future = mailbox.submit(tensor.detach(), (source,))
            return Pending(future, tensor.device, source)
        channel = self._channel(source, self._rank, tag)
        return Pending(channel.submit(tensor.detach(), True), tensor.device, source)

    def receive_any(self, tensor: Tensor, tag: int) -> Pending:
        """Pending.source says from whom, after its wait."""
        others = [source for source in range(self._size) if source != self._rank]
        if not others:
            raise ValueError("recv from any source: there is no other rank in this group")
        with self._lock:
            if tag not in self._mailboxes:
                self._mailboxes[tag] = _Mailbox(
                    lambda source: self._channel(source, self._rank, tag), self._timeout_s
                )
            mailbox = self._mailboxes[tag]
        return Pending(mailbox.submit(tensor.detach(), others), tensor.device)

    def close(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.close()
        for channel in self._channels.values():
            channel.close()

    def _peer(self, rank: int) -> int:
        if not 0 <= rank < self._size or rank == self._rank:
            raise ValueError(f"rank {rank} is no other rank of this group of {self._size}")
        return rank

    def _channel(self, source: int, to: int, tag: int) -> _Channel:
        name = f"{source}>{to}#{tag}"
        rank = 0 if source == self._rank else 1
        with self._lock:
            if name not in self._channels:
                self._channels[name] = _Channel(name, rank, self._open_pair, self._counts)
            return self._channels[name]


class _Channel:
    """One direction, one tag: messages arrive in the order in which they were sent."""

    def __init__(self, name: str, rank: int, open_pair: OpenPair, counts: Counts) -> None:
        """rank: 0 sends, 1 receives."""
        self._name = name
        self._rank = rank
        self._open_pair = open_pair
        self._counts = counts
        self._comm: Communicator | None = None
        self._num_submitted = 0
        self._executor = ThreadPoolExecutor(1, "ringreduce-channel")

    def submit(
        self, tensor: Tensor, receives: bool, ready: torch.cuda.Event | None = None
    ) -> Future[Any]:
        """Its result: the moment when it is there, of a tensor on a GPU; else None.

        ready: from when on such a tensor may be touched; by default, when the current stream is so
        far.
        """
        self._num_submitted += 1
        if not tensor.is_cuda:
            return self._executor.submit(self._transfer, tensor, receives, self._num_submitted)
        return self._executor.submit(
            self._transfer_on_gpu,
            tensor,
            receives,
            self._num_submitted,
            ready or _current_moment(tensor),
        )

    def has_message(self) -> bool:
        """At the receiver: whether one has been sent that nothing submitted here will take."""
        return self._counts.read(self._name) > self._num_submitted

    def close(self) -> None:
        """Waits for a message under way; what was queued behind it is dropped."""
        self._executor.shutdown(cancel_futures=True)
        if self._comm is not None:
            self._comm.close()

    def _transfer(self, tensor: Tensor, receives: bool, number: int) -> None:
        """number: of the message, from 1."""
        if not receives:
            self._counts.write(self._name, number)
        flat = tensor.contiguous().view(-1)
        try:
            if self._comm is None:
                self._comm = self._open_pair(self._name, self._rank, 2)
            self._comm.broadcast_(flat, 0)
        except RingReduceError as error:
            source, to = self._name.split("#")[0].split(">")
            raise type(error)(
                f"message from rank {source} to rank {to}, here rank 0 and rank 1: {error}"
            ) from error
        if receives and flat.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(flat.view(tensor.shape))

    def _transfer_on_gpu(
        self, tensor: Tensor, receives: bool, number: int, ready: torch.cuda.Event
    ) -> torch.cuda.Event:
        stream = torch.cuda.Stream(tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            tensor.record_stream(stream)
            self._transfer(tensor, receives, number)
            return stream.record_event()


class _Mailbox:
    """All receives of one tag from the first one of any source on, in the order of their calls.

    Its thread asks one channel after the other. So each message goes to the earliest of the
    receives that it suits.
    """

    def __init__(self, channel_from: Callable[[int], _Channel], timeout_s: float) -> None:
        self._channel_from = channel_from
        self._timeout_s = timeout_s
        self._closed = False
        self._executor = ThreadPoolExecutor(1, "ringreduce-mailbox")

    def submit(self, tensor: Tensor, sources: Sequence[int]) -> Future[_Delivery]:
        ready = _current_moment(tensor) if tensor.is_cuda else None
        return self._executor.submit(self._deliver, tensor, sources, ready)

    def close(self) -> None:
        self._closed = True
        self._executor.shutdown(cancel_futures=True)

    def _deliver(
        self, tensor: Tensor, sources: Sequence[int], ready: torch.cuda.Event | None
    ) -> _Delivery:
        source = sources[0] if len(sources) == 1 else self._first_to_send(sources)
        return source, self._channel_from(source).submit(tensor, True, ready)

    def _first_to_send(self, sources: Sequence[int]) -> int:
        limit = time.monotonic() + self._timeout_s
        while time.monotonic() < limit:
            for source in sources:
                if self._closed:
                    raise RingReduceError("recv from any source: the process group was destroyed")
                if self._channel_from(source).has_message():
                    return source
            time.sleep(POLL_S)
        raise CollectiveTimeout(
            f"recv from any source: nobody has sent within {self._timeout_s:g} s"
        )


_Delivery = tuple[int, Future[Any]]  # from whom, and its message under way


class Pending:
    """A message under way, to be waited for like a `ringreduce.Work`."""

    def __init__(self, future: Future[Any], device: torch.device, source: int = -1) -> None:
        """future: of a channel or a mailbox. source: -1 is not known before wait."""
        self._future = future
        self._device = device
        self.source = source

    def wait(self, timeout: float | None = None) -> None:
        """Raises TimeoutError after `timeout` seconds; the message goes on, as a Work does."""
        limit = None if timeout is None else time.monotonic() + timeout
        event = _result(self._future, limit)
        if isinstance(event, tuple):
            self.source, message = event
            event = _result(message, limit)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def done(self) -> bool:
        future = self._future
        if _ended_well(future) and isinstance(future.result(), tuple):
            future = future.result()[1]
        if not _ended_well(future):
            return future.done()
        event = future.result()
        return event is None or bool(event.query())


def _result(future: Future[Any], limit: float | None) -> Any:
    left = None if limit is None else max(0.0, limit - time.monotonic())
    try:
        return future.result(left)
    except concurrent.futures.TimeoutError:  # not Python's own before 3.11
        if future.done():
            return future.result()  # it has come by now; or its own error is one
        raise TimeoutError("no end of a send or recv within the wait's timeout") from None


def _ended_well(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _current_moment(tensor: Tensor) -> torch.cuda.Event:
    return torch.cuda.current_stream(tensor.device).record_event()
