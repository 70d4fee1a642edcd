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
        return Pending(self._channel(self._rank, to, tag).submit(tensor.detach(), False))

    def receive(self, tensor: Tensor, source: int, tag: int) -> Pending:
        return Pending(self._channel(source, self._rank, tag).submit(tensor.detach(), True))

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

    def submit(self, tensor: Tensor, receives: bool) -> Future[None]:
        return self._executor.submit(self._transfer, tensor, receives)

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


class Pending:
    """A message under way, to be waited for like a `ringreduce.Work`."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self, timeout: float | None = None) -> None:
        self._future.result(timeout)

    def done(self) -> bool:
        return self._future.done()
