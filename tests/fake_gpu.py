"""Tensors that say they are on a GPU, streams that are numbers, and a core that takes both.

Their memory is the CPU's, and the real core moves it: what Python does for a GPU runs whole, where
there is none. What was enqueued on which stream is written down. `fake_gpu` of conftest.py puts all
of it in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ringreduce import _core, arrays, gpu_tensors, runs, tensors
from ringreduce.bootstrap import Bootstrap

KIND_NAMES = {kind: name for name, kind in _core.KINDS.items()}


class FakeCuda(torch.Tensor):
    """On cuda:0. What torch makes of it is so, too."""

    index = 0
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: torch.device("cuda", type(self).index))

    def get_device(self) -> int:
        return self.index

    def to(self, *args: Any, device: object = None, **kwargs: Any) -> Any:
        assert device in (None, self.device)
        return super().to(*args, **kwargs)


class FakeCuda1(FakeCuda):
    """On cuda:1."""

    index = 1


FAKES = (FakeCuda, FakeCuda1)


def cuda(x: torch.Tensor, device: int = 0) -> Any:
    """The same memory as if on a GPU."""
    return x.as_subclass(FAKES[device])


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach().as_subclass(torch.Tensor)


class Log:
    """What this thread's rank has enqueued, in order: (what, stream, details)."""

    def __init__(self) -> None:
        self._threads = threading.local()

    @property
    def entries(self) -> list[tuple]:
        if not hasattr(self._threads, "entries"):
            self._threads.entries = []
        return self._threads.entries

    @property
    def stream(self) -> int:
        """The thread's current stream, on all devices."""
        return getattr(self._threads, "stream", 0)

    @stream.setter
    def stream(self, stream: int) -> None:
        self._threads.stream = stream

    def add(self, what: str, *details: Any) -> None:
        self.entries.append((what, self.stream, *details))

    def take(self) -> list[tuple]:
        taken = list(self.entries)
        self.entries.clear()
        return taken


class Core:
    """The core of a build with CUDA, on a machine with two GPUs."""

    def __init__(self, real: _core.Communicator, log: Log) -> None:
        self._real = real
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def submit(
        self,
        kind: int,
        op: int,
        dtype: int,
        root: int,
        operands: list[tuple],
        keepalive: object,
        asynchronous: bool,
        device: int = -1,
        stream: int = 0,
        rows: Sequence[int] = (),
    ) -> Any:
        if device < 0:
            return self._real.submit(kind, op, dtype, root, operands, keepalive, asynchronous)
        assert stream == self._log.stream
        assert all(operand[3:] == (None, None) for operand in operands), "contiguous, all of them"
        _assert_adjacent(operands, _core.ITEM_BYTES[dtype])
        shapes = [tuple(operand[2]) for operand in operands]
        self._log.add(KIND_NAMES[kind], device, shapes)
        target = 0
        assert len(rows) == (self._real.size if kind == _core.KINDS["allgather"] else 0)
        if rows:
            (source, target, *rest) = operands[0]
            operands = [(source, 0, *rest)]
        work = self._real.submit(kind, op, dtype, root, operands, keepalive, asynchronous)
        return _Work(work, self._log, target, asynchronous)

    def allocate(self, size_bytes: int, device: int = -1) -> Any:
        buffer = self._real.allocate(size_bytes)
        return buffer if device < 0 else cuda(torch.from_numpy(buffer), device)

    def check(self) -> None:
        self._log.add("check")


class _Work:
    def __init__(self, work: _core.Work, log: Log, target: int, asynchronous: bool) -> None:
        self._work, self._log, self._target = work, log, target
        if not asynchronous:
            self._move()

    def wait(self, timeout_s: float | None = None, stream: int | None = None) -> None:
        assert stream is not None, "work on a GPU is waited for on a stream"
        self._log.add("wait", stream)
        self._work.wait(timeout_s)
        self._move()

    def done(self) -> bool:
        return self._work.done()

    def times_ns(self) -> tuple[int, int]:
        return self._work.times_ns()

    def _move(self) -> None:
        if self._target:
            output = self._work.output()
            ctypes.memmove(self._target, output.ctypes.data, output.nbytes)
            self._target = 0


def _assert_adjacent(operands: Sequence[tuple], item_bytes: int) -> None:
    for which in (0, 1):
        ends = [
            (operand[which], operand[which] + math.prod(operand[2]) * item_bytes)
            for operand in operands
            if operand[which] and math.prod(operand[2])
        ]
        if len(operands) > 1:
            assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))


@contextlib.contextmanager
def joined(streams: runs._Streams, log: Log) -> Iterator[None]:
    """In place of what needs CUDA's own streams."""
    others = sorted(streams._found - {log.stream})
    for other in others:
        log.add("join", other)
    yield
    for other in others:
        log.add("part", other)


def put_in_place(patch: Any) -> Log:
    """patch: pytest's monkeypatch."""
    log = Log()
    framework = tensors._torch_framework()
    patch.setattr(arrays, "cuda_unavailable", lambda: "")
    patch.setattr(tensors, "cuda_unavailable", lambda: "")
    patch.setattr(gpu_tensors, "cuda_unavailable", lambda: "")
    real_make, real_empty = Bootstrap.make_core, type(framework).empty

    def make_core(self: Bootstrap, *args: Any, **kwargs: Any) -> Any:
        return Core(real_make(self, *args, **kwargs), log)

    def empty(self: Any, shape: Sequence[int], dtype: Any, device: int = -1) -> Any:
        x = real_empty(self, shape, dtype)
        return x if device < 0 else cuda(x, device)

    def event(self: Any, device: int) -> Callable[[int], None]:
        log.add("record")
        recorded_on = log.stream
        return lambda stream: log.add("hold back", stream, recorded_on)

    def spy(name: str) -> None:
        real = getattr(type(framework), name)

        def call(self: Any, *args: Any) -> Any:
            log.add(name)
            return real(self, *args)

        patch.setattr(type(framework), name, call)

    numbers = iter(range(100, 10**6))

    def separate_thread() -> None:
        log.stream = next(numbers)

    patch.setattr(runs._Streams, "joined", lambda self: joined(self, log))
    patch.setattr(Bootstrap, "make_core", make_core)
    patch.setattr(type(framework), "empty", empty)
    patch.setattr(type(framework), "gpu", lambda self, number: int(number or 0))
    patch.setattr(type(framework), "stream", lambda self, device: log.stream)
    patch.setattr(type(framework), "event", event)
    patch.setattr(torch, "from_dlpack", lambda buffer: buffer)
    patch.setattr(gpu_tensors, "separate_thread", separate_thread)
    spy("flatten")
    spy("assign")
    return log
