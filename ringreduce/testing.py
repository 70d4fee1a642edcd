"""Ranks without a launcher, for tests: as threads of this process, or as forked processes.

Both give every rank its own Communicator, have a hard time limit that shows where each rank is, and
leave nothing behind. Functions of the module level are not bound to these ranks: pass `comm=`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

from ringreduce import ending, gpu_tensors, settings
from ringreduce.bootstrap import Bootstrap
from ringreduce.communicator import Communicator
from ringreduce.errors import RingReduceError
from ringreduce.launch import limit_threads
from ringreduce.settings import Settings

Result = TypeVar("Result")
Meet = Callable[[int, int, bytes], list[bytes]]  # number of the exchange, rank, message

GRACE_S = 2.0  # to show its stacks, or to follow an abort, once a rank is over the time limit


class RankTraceback(Exception):
    """Cause of an error that `run_threads` or `run_forks` raises again: where it came from."""


class Meeting:
    """An allgather in memory. Every rank that takes part has a thread of its own here."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._rounds: dict[int, dict[int, bytes]] = {}
        self._left: set[int] = set()

    def meet(self, number: int, rank: int, message: bytes) -> list[bytes]:
        """The messages of all ranks in this round."""
        with self._changed:
            messages = self._rounds.setdefault(number, {})
            messages[rank] = message
            if len(messages) == self._size:
                del self._rounds[number]  # who still waits holds it
                self._changed.notify_all()
            while len(messages) < self._size:
                missing = self._left - messages.keys()
                if missing:
                    raise RingReduceError(f"rank {min(missing)} ended before exchange {number}")
                self._changed.wait()
            return [messages[other] for other in range(self._size)]

    def leave(self, rank: int) -> None:
        """This rank comes to nothing any more: who waits for it is told."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()


class MeetingBootstrap(Bootstrap):
    """Ranks that meet in the test's process: as its threads, or each through a socket to it."""

    def __init__(self, meet: Meet, rank: int, size: int, *, in_process: bool) -> None:
        super().__init__(rank, size)
        self.in_process = in_process
        self._meet = meet
        self._round = 0

    def exchange(self, message: bytes) -> list[bytes]:
        self._round += 1
        return self._meet(self._round, self.rank, message)


class _Failures:
    """What went wrong in which rank. The first in time is the cause; later ones follow from it."""

    def __init__(self) -> None:
        self._all: list[tuple[float, int, BaseException, str]] = []

    def add(self, at_s: float, rank: int, error: BaseException, stack: str) -> None:
        self._all.append((at_s, rank, error, stack))

    def first(self) -> BaseException | None:
        if not self._all:
            return None
        _, rank, error, stack = min(self._all, key=lambda failure: failure[:2])
        error.__cause__ = RankTraceback(f"in rank {rank}\n{stack}")
        return error


def _run_rank(
    fn: Callable[[Communicator], Result],
    bootstrap: Bootstrap,
    report: Callable[[float, int, BaseException, str], None],
) -> Result | None:
    """What a rank does, in its own thread or process."""
    try:
        result = fn(Communicator(bootstrap.open_core("test"), bootstrap))
        ending.close_all(bootstrap, bootstrap.settings.timeout_s)
        return result
    except BaseException as error:
        # Before the others are told, so that theirs, which follow from this one, come later.
        report(time.monotonic(), bootstrap.rank, error, traceback.format_exc())
        ending.abort_all(bootstrap, f"rank {bootstrap.rank} raised {type(error).__name__}: {error}")
        with contextlib.suppress(RingReduceError, TimeoutError):
            ending.close_all(bootstrap, 0.0)
        return None


def run_threads(
    n: int, fn: Callable[[Communicator], Result], *, timeout_s: float = 60.0, **options: Any
) -> list[Result]:
    """Runs fn(comm) in n threads, each a rank with its own Communicator. Returns their results.

    options: as of `init`. An exception in a rank aborts the others and is raised here, its cause
    naming the rank. After timeout_s raises TimeoutError with the stacks of all threads.

    Where torch or cupy is imported and finds GPUs, each thread has a stream of its own as the
    current one on each of them, and runs the whole of its backward itself. A GPU that ranks share
    has room for the kernels of one collective: let those of two communicators not overlap there.
    """
    agreed = settings.with_constants(settings.read(os.environ, **options))
    meeting, failures = Meeting(n), _Failures()
    bootstraps = [MeetingBootstrap(meeting.meet, rank, n, in_process=True) for rank in range(n)]
    results: list[Any] = [None] * n

    def start(comm: Communicator) -> Result:
        gpu_tensors.separate_thread()
        return fn(comm)

    def run(rank: int) -> None:
        bootstraps[rank].settings = agreed
        results[rank] = _run_rank(start, bootstraps[rank], failures.add)
        meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    try:
        _join(threads, timeout_s)
        late = [rank for rank in range(n) if threads[rank].is_alive()]
        stacks = _stacks_of_threads() if late else ""
    finally:  # also on Ctrl-C
        for rank in range(n):
            if threads[rank].is_alive():
                meeting.leave(rank)
                ending.abort_all(bootstraps[rank], f"rank {rank} ran longer than {timeout_s:g} s")
        _join(threads, GRACE_S)
    _raise_if_failed(failures, late, timeout_s, stacks)
    return results


def run_forks(
    n: int,
    fn: Callable[[Communicator], Result],
    *,
    timeout_s: float = 60.0,
    killed: Collection[int] = (),
    **options: Any,
) -> list[Result]:
    """Runs fn(comm) in n forked processes, each a rank. Returns their results, sent by pickle.

    options: as of `init`. killed: ranks that are to die by a signal; their result is None, and it
    is an AssertionError if one does not. An exception in a rank aborts the others and is raised
    here, its cause naming the rank. After timeout_s raises TimeoutError with the stacks of all
    ranks.
    """
    agreed = settings.with_constants(settings.read(os.environ, **options))
    meeting, failures = Meeting(n), _Failures()
    children: list[_Child] = []
    try:
        for rank in range(n):
            children.append(_Child(rank, n, fn, agreed))
        servers = [
            threading.Thread(target=child.serve, args=(meeting, failures), daemon=True)
            for child in children
        ]
        for server in servers:
            server.start()
        _join(servers, timeout_s)
        late = [child for child in children if not child.ended]
        for child in late:
            child.show_stacks_and_end()
        limit = time.monotonic() + GRACE_S
        stacks = "\n".join([child.stacks(limit) for child in late])
    finally:
        for child in children:
            child.end(GRACE_S if child.ended else 0.0)
            meeting.leave(child.rank)
    _raise_if_failed(failures, [child.rank for child in late], timeout_s, stacks)
    for child in children:
        code = child.process.exitcode or 0
        if (child.rank in killed) != (code < 0) or code > 0 or not (code or child.done):
            raise AssertionError(f"rank {child.rank} ended early, with exit code {code}")
    return [child.result for child in children]


class _Child:
    """The test's side of a forked rank: its process, its socket, and the file for its stacks."""

    def __init__(
        self, rank: int, n: int, fn: Callable[[Communicator], Any], agreed: Settings
    ) -> None:
        self.rank = rank
        self.result: Any = None
        self.done = False  # it has sent its result
        self.ended = False  # its socket is closed: the process has ended, or is about to
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=_child_main, args=(rank, n, fn, agreed, theirs, self._stacks, os.getpid())
        )
        with warnings.catch_warnings():
            # Python warns where the parent has threads; the child uses nothing that they may have
            # locked.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()  # before the next fork: the child has the only one, so its end is seen here

    def serve(self, meeting: Meeting, failures: _Failures) -> None:
        """Answers the rank's exchanges and takes its result, until it ends."""
        try:
            while True:
                frame = self._connection.recv_bytes()
                kind, content = frame[:1], frame[1:]
                if kind == b"X":
                    self._answer(meeting, content)
                elif kind == b"R":
                    self.result, self.done = pickle.loads(content), True
                else:
                    failures.add(*pickle.loads(content))
        except (EOFError, OSError):
            pass  # it ended, or died while it was answered
        finally:
            self.ended = True
            meeting.leave(self.rank)

    def _answer(self, meeting: Meeting, request: bytes) -> None:
        try:
            number = int.from_bytes(request[:8], "little")
            messages = meeting.meet(number, self.rank, request[8:])
        except RingReduceError as error:
            self._connection.send_bytes(str(error).encode(errors="backslashreplace"))
            return
        self._connection.send_bytes(b"")  # no problem
        for message in messages:
            self._connection.send_bytes(message)

    def show_stacks_and_end(self) -> None:
        """Asks the process to write its stacks and end, which it does unless it is stopped."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)

    def stacks(self, limit: float) -> str:
        """What it wrote; waits for it until limit."""
        self.process.join(max(limit - time.monotonic(), 0.0))
        self._stacks.seek(0)
        return f"rank {self.rank}:\n{self._stacks.read().decode(errors='replace')}"

    def end(self, wait_s: float) -> None:
        self.process.join(wait_s)
        self.process.kill()
        self.process.join()
        self._stacks.close()
        self._connection.close()


def _child_main(
    rank: int,
    n: int,
    fn: Callable[[Communicator], Any],
    agreed: Settings,
    connection: Connection,
    stacks: IO[bytes],
    parent: int,
) -> None:
    """The forked rank. multiprocessing leaves without the parent's exit handlers after it."""
    ending.die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        return
    # Shows the stacks of all threads, then does what the signal does: ends the process.
    faulthandler.register(signal.SIGUSR1, file=stacks, chain=True)
    limit_threads(1)  # OpenMP's other threads, if there were any, did not survive the fork

    def meet(number: int, rank: int, message: bytes) -> list[bytes]:
        connection.send_bytes(b"X" + number.to_bytes(8, "little") + message)
        problem = connection.recv_bytes()
        if problem:
            raise RingReduceError(problem.decode())
        return [connection.recv_bytes() for _ in range(n)]

    def report(at_s: float, rank: int, error: BaseException, stack: str) -> None:
        connection.send_bytes(b"E" + pickle.dumps((at_s, rank, _portable(error), stack)))

    bootstrap = MeetingBootstrap(meet, rank, n, in_process=False)
    bootstrap.settings = agreed
    # Pickled as a part of what the rank does: that it cannot be is an error like any other.
    result = _run_rank(lambda comm: pickle.dumps(fn(comm)), bootstrap, report)
    if result is not None:
        connection.send_bytes(b"R" + result)


def _raise_if_failed(failures: _Failures, late: list[int], timeout_s: float, stacks: str) -> None:
    error = failures.first()
    if late:
        raise TimeoutError(f"ranks {late} still ran after {timeout_s:g} s\n{stacks}") from error
    if error is not None:
        raise error


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever pickling it may raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _join(threads: Sequence[threading.Thread], within_s: float) -> None:
    limit = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(limit - time.monotonic(), 0.0))


def _stacks_of_threads() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
