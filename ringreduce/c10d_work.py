"""Works and futures of the torch.distributed backend: how a torch program waits for collectives.

torch's reducer and its communication hooks know of no `Work.wait`, only of futures with callbacks.
A thread for each group completes them. What the collectives do is in c10d_group.py. Whoever waits
for tensors on a GPU, waits on its current stream; that thread has streams of its own there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringreduce.errors import RingReduceError


class Waitable(Protocol):
    """A `ringreduce.Work`, or what behaves like one."""

    def wait(self, timeout: float | None = None) -> Any: ...

    def done(self) -> bool: ...


# DistributedDataParallel.join gives C++ a work of one element, and forgets it. Were it gone then,
# C++ would wait for a work that nothing completes.
KEPT_WORKS = 64
KEPT_BYTES = 4096


class WaitTimeout(RingReduceError, TimeoutError):
    """A wait ended before its operation, which goes on: a RuntimeError, as of torch's backends."""


class Callbacks:
    """The thread that completes the futures of a group and runs their callbacks.

    One after the other, in the order in which the program asked for them: the same on all ranks,
    whenever an operation happens to end. So callbacks may call collectives themselves. Those must
    not mix with what the program calls meanwhile: the group has a communicator for them.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._executor = ThreadPoolExecutor(1, "ringreduce-c10d", initializer=self._mark)
        self._kept: deque[GroupWork] = deque(maxlen=KEPT_WORKS)
        self.coalesced: list[GroupWork] | None = None  # works since coalescing began, if it has

    def here(self) -> bool:
        """Whether the caller runs within a callback."""
        return getattr(self._thread, "is_ours", False)

    def run(self, task: Callable[[], None]) -> None:
        """Runs it after all others; within a callback at once."""
        if self.here():
            task()
        else:
            self._executor.submit(task)

    def enter(self, gpus: Sequence[torch.device]) -> None:
        """On its thread: from now on on streams of its own, as others must not wait with it."""
        if not self.here():
            return
        known = self._thread.__dict__.setdefault("gpus", set())
        for gpu in gpus:
            if gpu not in known:
                torch.cuda.set_stream(torch.cuda.Stream(gpu))
                known.add(gpu)

    def keep(self, work: GroupWork, tensors: Sequence[Any]) -> None:
        """A work of little memory outlives the program's interest in it, for a while."""
        if self.coalesced is not None:
            self.coalesced.append(work)
        size_bytes = sum(x.numel() * x.itemsize for x in tensors if isinstance(x, torch.Tensor))
        if size_bytes <= KEPT_BYTES:
            self._kept.append(work)

    def close(self) -> None:
        self._kept.clear()
        self._executor.shutdown(wait=not self.here())

    def _mark(self) -> None:
        self._thread.is_ours = True


class GroupWork(dist._Work):
    """What every call of the process group returns. Its operands are kept alive without it."""

    def __init__(
        self,
        works: Sequence[Waitable],
        value: list[Any],
        callbacks: Callbacks,
        finish: Callable[[list[Any]], None] | None = None,
    ) -> None:
        """value: of the future. finish: takes the results of the works, to bring them into place.

        The first thread that waits runs it.
        """
        super().__init__()
        self._works = works
        self._value = value
        self._callbacks = callbacks
        self._finish = finish
        self._finishing = threading.Lock()
        self._future: _Future | None = None
        self._starting = threading.Lock()
        self._waited = False
        self._gpus = _gpus_of(value)
        self.limit_s: float | None = None  # of a wait without a timeout; None: that of the group
        self._finished: list[tuple[torch.device, torch.cuda.Event]] = []
        callbacks.keep(self, value)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits until the outputs are there. timeout: None or 0 is that of the call or group."""
        limit_s = timeout.total_seconds() if timeout else self.limit_s
        try:
            results = [work.wait(limit_s) for work in self._works]
        except TimeoutError as error:
            if limit_s is None or isinstance(error, RingReduceError):
                raise
            raise WaitTimeout(f"timed out after {limit_s:g} s: {error}") from None
        with self._finishing, torch.no_grad():
            if self._finish is not None:
                self._finish(results)
                self._finish = None
                # Their memory is of other streams, which may use it again when Python lets it go.
                for x in _on_gpus([*results, *self._value]):
                    if not x.is_sparse:
                        x.record_stream(torch.cuda.current_stream(x.device))
                self._finished = [
                    (gpu, torch.cuda.current_stream(gpu).record_event()) for gpu in self._gpus
                ]
            for gpu, event in self._finished:
                torch.cuda.current_stream(gpu).wait_event(event)
        self._waited = True
        return True

    def is_completed(self) -> bool:
        return all(work.done() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        if self.is_completed():
            try:
                self.wait()
            except Exception as error:
                return error
        return None

    def result(self) -> list[Any]:
        self.wait()
        return self._value

    def synchronize(self) -> None:
        self.wait()

    block_current_stream = synchronize

    def _source_rank(self) -> int:
        """Of a recv, after wait: the sender's rank in the group. -1: not known, or no recv."""
        return getattr(self._works[0], "source", -1)

    def get_future(self) -> torch.futures.Future:
        """Completed by the thread of the callbacks. Within one, or after wait, complete at once."""
        with self._starting:
            if self._future is not None:
                return self._future
            future = self._future = _Future(self._callbacks, self._gpus, self)
        if self._waited:
            self.complete()
            return future
        self._callbacks.run(self.complete)
        if torch._C._current_graph_task_id() >= 0:
            # Within a backward, whose end waits for its futures in C++, which sees no error of a
            # future made by Python: so the backward raises it itself.
            torch.autograd.Variable._execution_engine.queue_callback(self.synchronize)
        return future

    def get_future_result(self) -> torch.futures.Future:
        """How it ended, a number of torch's WorkResult; itself without an error."""
        return self.get_future().then(_ending)

    def complete(self) -> None:
        """On the thread of the callbacks: gives the future its value, and so runs its callbacks."""
        future = self._future
        if future is None or future.done():
            return
        self._callbacks.enter(self._gpus)
        try:
            self.wait()
        except Exception as error:
            future.error = error
        future.work = None
        future.set_result(self._value)


class Together:
    """Several works, to be waited for as one."""

    def __init__(self, works: Sequence[GroupWork]) -> None:
        self._works = works

    def wait(self, timeout: float | None = None) -> None:
        for work in self._works:
            work.wait(None if timeout is None else timedelta(seconds=timeout))

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Future(torch.futures.Future):
    """One whose callbacks run on the thread of the callbacks even if it is complete already."""

    def __init__(
        self,
        callbacks: Callbacks,
        gpus: Sequence[torch.device],
        work: GroupWork | None = None,
    ) -> None:
        """gpus: where its value is; who waits for it does so on the current streams there."""
        super().__init__(devices=list(gpus))
        self.work = work  # until it is complete; of the value of a callback, there is none
        self.error: Exception | None = (
            None  # of the work: C++ takes a value that is one for tensors
        )
        self._callbacks = callbacks
        self._gpus = gpus

    def wait(self) -> Any:
        if self._callbacks.here():
            self._complete()
        super().wait()
        return self.value()

    def value(self) -> Any:
        if self.error is not None:
            raise self.error
        return super().value()

    def then(self, callback: Callable[[Any], Any]) -> torch.futures.Future:
        derived = _Future(self._callbacks, self._gpus)

        def run() -> None:
            self._complete()
            self._callbacks.enter(self._gpus)
            try:
                if self._gpus and self.error is None:
                    self.wait()  # on this thread's streams
                value = callback(self)
            except Exception as error:
                derived.set_exception(error)
            else:
                derived.set_result(value)

        self._callbacks.run(run)
        return derived

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.then(callback)

    def _complete(self) -> None:
        work = self.work
        if work is not None:
            work.complete()


def _ending(future: Any) -> int:
    known: Any = torch._C._distributed_c10d.WorkResult  # type: ignore[attr-defined]
    if future.error is None:
        return known.SUCCESS.value
    return (known.TIMEOUT if isinstance(future.error, TimeoutError) else known.COMM_ERROR).value


def _gpus_of(value: Sequence[Any]) -> list[torch.device]:
    return list(dict.fromkeys(x.device for x in _on_gpus(value)))


def _on_gpus(value: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors on GPUs in a list, or in lists in it."""
    for x in value:
        if isinstance(x, torch.Tensor):
            if x.is_cuda:
                yield x
        elif isinstance(x, (list, tuple)):
            yield from _on_gpus(x)
