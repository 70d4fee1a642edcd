"""send and recv of the torch.distributed backend: a communicator of two ranks for each channel.

A channel goes from one rank to another and has one tag. Both ends open it at its first use, over
the store of the group, in a thread of its own: nobody else takes part, and nobody waits for it. It
is no fast path: a message is a broadcast between the two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ringreduce.communicator import Communicator

OpenPair = Callable[[str, int, int], Communicator]  # name, rank, size


class Channels:
    """All channels of this rank within a group."""

    def __init__(self, rank: int, open_pair: OpenPair) -> None:
        self._rank = rank
        self._open_pair = open_pair
        self._channels: dict[str, _Channel] = {}
        self._lock = threading.Lock()

    def send(self, tensor: Tensor, to: int, tag: int) -> Pending:
        channel = self._channel(self._rank, to, tag)
        return Pending(channel.submit(tensor.detach(), False), tensor.device)

    def receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        channel = self._channel(source, self._rank, tag)
        return Pending(channel.submit(tensor.detach(), True), tensor.device)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _channel(self, source: int, to: int, tag: int) -> _Channel:
        name = f"{source}>{to}#{tag}"
        rank = 0 if source == self._rank else 1
        with self._lock:
            if name not in self._channels:
                self._channels[name] = _Channel(lambda: self._open_pair(name, rank, 2))
            return self._channels[name]


class _Channel:
    """One direction, one tag: messages arrive in the order in which they were sent."""

    def __init__(self, open_pair: Callable[[], Communicator]) -> None:
        self._open_pair = open_pair
        self._comm: Communicator | None = None
        self._executor = ThreadPoolExecutor(1, "ringreduce-channel")

    def submit(self, tensor: Tensor, receives: bool) -> Future[Any]:
        """Its result: the moment when it is there, of a tensor on a GPU; else None."""
        if not tensor.is_cuda:
            return self._executor.submit(self._transfer, tensor, receives)
        ready = torch.cuda.current_stream(tensor.device).record_event()
        return self._executor.submit(self._transfer_on_gpu, tensor, receives, ready)

    def close(self) -> None:
        """Waits for a message under way; what was queued behind it is dropped."""
        self._executor.shutdown(cancel_futures=True)
        if self._comm is not None:
            self._comm.close()

    def _transfer(self, tensor: Tensor, receives: bool) -> None:
        if self._comm is None:
            self._comm = self._open_pair()
        flat = tensor.contiguous().view(-1)
        self._comm.broadcast_(flat, 0)
        if receives and flat.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(flat.view(tensor.shape))

    def _transfer_on_gpu(
        self, tensor: Tensor, receives: bool, ready: torch.cuda.Event
    ) -> torch.cuda.Event:
        stream = torch.cuda.Stream(tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            tensor.record_stream(stream)
            self._transfer(tensor, receives)
            return stream.record_event()


class Pending:
    """A message under way, to be waited for like a `ringreduce.Work`."""

    def __init__(self, future: Future[Any], device: torch.device) -> None:
        self._future = future
        self._device = device

    def wait(self, timeout: float | None = None) -> None:
        event = self._future.result(timeout)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def done(self) -> bool:
        if not self._future.done() or self._future.cancelled() or self._future.exception():
            return self._future.done()
        event = self._future.result()
        return event is None or event.query()
