"""What the others are told when a rank dies, stops, leaves, raises or is interrupted, and when.

Nothing here depends on a launcher: the ranks are forks, which start in milliseconds. What depends
on one is in test_jobs.py.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import resource
import signal
import statistics
import struct
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import ringreduce as rr
from ringreduce import testing

NAMED_WITHIN_S = 0.2  # usually; a busy machine may not let the victim die, or us look, at once
NAMED_AT_LAST_S = 1.0
SIZES = (2, 4)  # on two cores: slices are owned, slices are claimed


class Board:
    """A few numbers in memory that forks share with the test."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def __setitem__(self, index: int, value: float) -> None:
        struct.pack_into("d", self._memory, 8 * index, value)

    def __getitem__(self, index: int) -> float:
        return struct.unpack_from("d", self._memory, 8 * index)[0]

    def wait(self, index: int) -> float:
        while not self[index]:
            time.sleep(1e-4)
        return self[index]


def error_of(fn: Callable[[], object]) -> tuple[float, str, str]:
    """When fn failed, with what exception, and its message."""
    try:
        fn()
    except BaseException as error:
        return time.monotonic(), type(error).__name__, str(error)
    raise AssertionError("no error")


def forks_with_a_kill(
    size: int,
    fn: Callable[[rr.Communicator], object],
    victim: int,
    after_s: float,
    check: Callable[[str, str], None],
    **options: object,
) -> list[float]:
    """Kills a rank from outside, so long after it has begun fn; checks every survivor's error.

    Returns how long after the kill each of them came.
    """
    pid, killed_s = 0, 1  # places on the board
    board = Board()

    def run(comm: rr.Communicator) -> tuple[float, str, str]:
        if comm.rank == victim:
            board[pid] = os.getpid()
        return error_of(lambda: fn(comm))

    def kill() -> None:
        process = int(board.wait(pid))
        time.sleep(after_s)
        board[killed_s] = time.monotonic()
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    errors = testing.run_forks(size, run, timeout_s=20, killed=[victim], **options)
    killer.join()
    survivors = [error for rank, error in enumerate(errors) if rank != victim]
    for _, kind, text in survivors:
        check(kind, text)
    return [at_s - board[killed_s] for at_s, _, _ in survivors]


def in_time(delays_s: list[float]) -> None:
    assert statistics.median(delays_s) < NAMED_WITHIN_S
    assert max(delays_s) < NAMED_AT_LAST_S


def names_rank(victim: int, *collectives: str) -> Callable[[str, str], None]:
    """A PeerFailed that names the rank and one of the collectives."""

    def check(kind: str, text: str) -> None:
        assert kind == "PeerFailed", text
        assert f"rank {victim} (pid" in text and "died" in text, text
        assert not collectives or any(f"{name}(" in text for name in collectives), text

    return check


# ---- A killed rank.

X = np.ones(70_000, np.float32)
COLLECTIVES: dict[str, Callable[[rr.Communicator], object]] = {
    "allreduce": lambda comm: comm.allreduce(X),
    "reduce_scatter": lambda comm: comm.reduce_scatter(X),
    "allgather": lambda comm: comm.allgather(X),
    "broadcast": lambda comm: comm.broadcast(X, root=comm.size - 1),
    "reduce": lambda comm: comm.reduce(X),
    "barrier": lambda comm: comm.barrier(),
}


def overlapping(comm: rr.Communicator) -> None:
    works = [comm.allreduce(X, async_op=True) for _ in range(4)]
    for work in works:
        work.wait()


def forever(fn: Callable[[rr.Communicator], object]) -> Callable[[rr.Communicator], object]:
    def run(comm: rr.Communicator) -> None:
        while True:
            fn(comm)

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_kill_in_any_collective_is_named(name, size):
    delays_s = []
    for victim in range(size):
        check = names_rank(victim, name)
        after_s = random.Random(f"{name} {size} {victim}").random() * 0.01
        delays_s += forks_with_a_kill(size, forever(COLLECTIVES[name]), victim, after_s, check)
    in_time(delays_s)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "ring", "tree"])
def test_a_kill_in_any_algorithm_is_named(algorithm):
    for size, victim in ((2, 1), (4, 2)):
        check = names_rank(victim, "allreduce")
        everything = forever(COLLECTIVES["allreduce"])
        in_time(forks_with_a_kill(size, everything, victim, 0.01, check, algorithm=algorithm))


@pytest.mark.parametrize("size", SIZES)
def test_a_kill_during_asynchronous_calls_is_named(size):
    for repetition in range(5):
        victim = repetition % size
        check = names_rank(victim, "allreduce")
        in_time(forks_with_a_kill(size, forever(overlapping), victim, 0.003 * repetition, check))


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_is_killed_while_others_wait_long_is_named(size):
    """They sleep in the kernel by then."""

    def fn(comm: rr.Communicator) -> None:
        if comm.rank == size - 1:
            time.sleep(60)
        comm.barrier()

    in_time(forks_with_a_kill(size, fn, size - 1, 0.3, names_rank(size - 1, "barrier")))


def test_a_rank_that_was_killed_before_is_named():
    """By whoever comes to a collective later, be it the first or not."""
    board = Board()

    def fn(comm: rr.Communicator) -> tuple[str, str]:
        if comm.rank == 0:
            board[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGKILL)
        board.wait(0)
        time.sleep(0.05 * comm.rank)
        return error_of(lambda: comm.allreduce(X))[1:]

    for kind, text in testing.run_forks(4, fn, timeout_s=20, killed=[0])[1:]:
        assert kind == "PeerFailed"
        assert "rank 0 (pid" in text and "allreduce(sum, float32" in text, text


@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_a_random_moment(seed):
    chance = random.Random(seed)
    kinds = [*COLLECTIVES.values(), overlapping]

    def fn(comm: rr.Communicator) -> None:
        common, delays = random.Random(seed), random.Random(f"{seed} {comm.rank}")
        while True:
            time.sleep(0.002 * delays.randrange(2))
            common.choice(kinds)(comm)

    delays_s = []
    for _ in range(5):
        size = chance.choice((2, 3, 4))
        victim = chance.randrange(size)
        check = names_rank(victim, *COLLECTIVES)
        delays_s += forks_with_a_kill(size, fn, victim, chance.random() * 0.02, check)
    in_time(delays_s)


def allocate(comm: rr.Communicator) -> None:
    comm.empty(100_000, "float64")


def split(comm: rr.Communicator) -> None:
    with comm.split(0) as part:
        part.barrier()


@pytest.mark.parametrize("fn", [allocate, split])
def test_a_kill_while_memory_is_shared_is_named(fn):
    """Allocation and split set memory up: their waits are others than those of collectives."""
    delays_s = []
    for repetition in range(30):
        size = SIZES[repetition % 2]
        victim = repetition % size
        check = names_rank(victim, "empty", "allgather", "barrier", "split")
        delays_s += forks_with_a_kill(size, forever(fn), victim, repetition * 0.001, check)
    in_time(delays_s)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_death_while_the_ranks_find_each_other_is_an_error(victim, before, number, monkeypatch):
    """In each of the exchanges, before or after the rank's own message; nobody waits for it."""
    exchange = testing.MeetingBootstrap.exchange
    left = number  # exchanges of the victim, until it dies

    def deadly(self: testing.MeetingBootstrap, message: bytes) -> list[bytes]:
        nonlocal left
        left -= self.rank == victim
        dies = self.rank == victim and left == 0
        if dies and before:
            os.kill(os.getpid(), signal.SIGKILL)
        messages = exchange(self, message)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return messages

    monkeypatch.setattr(testing.MeetingBootstrap, "exchange", deadly)
    with pytest.raises(rr.RingReduceError):
        testing.run_forks(3, lambda comm: None, timeout_s=10, killed=[victim])


# ---- A rank that leaves.


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_have_done_their_part_may_leave(size):
    """Nobody takes alarm, however early the others end."""

    def fn(comm: rr.Communicator) -> bool:
        delays = random.Random(comm.rank)
        for repetition in range(60):
            with comm.split(0) as part:
                if repetition % 3 == 0:
                    part.barrier()
                elif repetition % 3 == 1:
                    part.allreduce(X[: 100 * repetition])
                else:
                    part.broadcast(X, root=0)
                time.sleep(0.002 * delays.randrange(2))
        return True

    assert testing.run_forks(size, fn, timeout_s=60) == [True] * size


def test_processes_that_have_done_their_part_may_end():
    def fn(comm: rr.Communicator) -> float:
        comm.barrier()
        result = comm.allreduce(X, async_op=comm.rank % 2 == 0)
        return float((result.wait() if comm.rank % 2 == 0 else result).sum())

    for _ in range(30):
        assert testing.run_forks(3, fn, timeout_s=20) == [3.0 * X.size] * 3


def test_who_closes_is_named_by_who_waits(ranks):
    def fn(comm: rr.Communicator) -> tuple[str, str]:
        comm.barrier()
        if comm.rank == 1:
            comm.close()
        return error_of(comm.barrier)[1:]

    for size in SIZES:
        for rank, (kind, text) in enumerate(ranks(size, fn, timeout_s=20)):
            if rank == 1:
                assert kind == "NotInitialized"
            else:
                assert kind == "PeerFailed" and "rank 1 (pid" in text and "exited" in text, text


# ---- A rank that does not come.


def test_a_stopped_rank_is_named_in_the_warning_and_in_the_timeout(capfd):
    board = Board()

    def fn(comm: rr.Communicator) -> tuple[str, str]:
        comm.broadcast(X, root=0)
        if comm.rank == 1:
            board[1] = os.getpid()
            os.kill(os.getpid(), signal.SIGSTOP)
        kind, text = error_of(lambda: comm.allreduce(X))[1:]
        os.kill(int(board[1]), signal.SIGCONT)
        return kind, text

    errors = testing.run_forks(3, fn, timeout_s=20, timeout=1.0, warn_after=0.3)
    printed = capfd.readouterr().err
    for text in (
        *(line for line in printed.splitlines() if "has waited 0.3 s" in line),
        errors[0][1],
    ):
        assert "allreduce(sum, float32, shape (70000,))" in text, text
        assert "rank 1 (pid" in text and "its process is stopped" in text, text
        assert "has not come" in text and "last seen in broadcast(" in text, text
    assert printed.count("has waited 0.3 s") == 2
    assert [kind for kind, _ in errors] == ["CollectiveTimeout"] * 3


def until_aborted(comm: rr.Communicator) -> None:
    """Ends with the ranks' own time limit at the latest."""
    while not comm.core.aborted:
        time.sleep(0.001)


def test_a_late_rank_ends_all_at_the_timeout(ranks):
    def fn(comm: rr.Communicator) -> tuple[str, str]:
        if comm.rank == 0:
            until_aborted(comm)
        return error_of(lambda: comm.reduce(X))[1:]

    for size in SIZES:
        for kind, text in ranks(size, fn, timeout_s=20, timeout=0.3):
            assert kind == "CollectiveTimeout"
            assert "rank 0 (pid" in text and "has called nothing yet" in text, text


# ---- A rank that raises, and Ctrl-C.


def test_an_exception_in_a_rank_reaches_all_that_wait(ranks):
    def fn(comm: rr.Communicator) -> None:
        comm.barrier()
        if comm.rank == comm.size - 1:
            raise KeyError("batch 3")
        _, kind, text = error_of(lambda: overlapping(comm))
        assert kind == "PeerFailed", text
        assert f"rank {comm.size - 1} raised KeyError" in text and "allreduce(" in text, text

    for size in SIZES:
        with pytest.raises(KeyError, match="batch 3"):
            ranks(size, fn, timeout_s=20)


WAITS: dict[str, Callable[[rr.Communicator], object]] = {
    "blocking": lambda comm: comm.barrier(),
    "asynchronous": lambda comm: comm.barrier(async_op=True).wait(),
    "queued": lambda comm: (comm.barrier(async_op=True), comm.barrier()),
    "allocating": lambda comm: comm.empty(10, "u1"),
}


def test_too_few_file_descriptors_are_told_to_all():
    def check(comm: rr.Communicator) -> int:
        failed = 0
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        for culprit, left, make in itertools.product(
            (0, 2), range(6), (lambda: comm.split(0), lambda: comm.empty(2 * 10**6, np.uint8))
        ):
            held = []
            comm.barrier()
            if comm.rank == culprit:
                open_now = max(map(int, os.listdir("/proc/self/fd")))
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 9, limits[1]))
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.open("/dev/null", os.O_RDONLY))
                for _ in range(left):
                    os.close(held.pop())
            try:
                made = make()
            except rr.ResourceError as error:
                assert "oo many open files" in str(error)
                made, failed = None, failed + 1
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            if isinstance(made, rr.Communicator):
                made.close()
            del made
            comm.split(0).close()
            assert (comm.allreduce_(comm.empty(3 * 10**6, np.uint8) * 0 + 1) == 3).all()
        return failed

    first, *others = testing.run_forks(3, check)
    assert 8 < first < 24 and others == [first] * 2


def test_a_signal_handler_may_use_another_communicator_but_not_the_one_that_waits():
    def fn(comm: rr.Communicator) -> tuple[float, float]:
        other = comm.split(0)
        x, y = np.full(2, comm.rank + 1.0), np.full(4, comm.rank + 1.0)

        def handler(number: int, frame: object) -> None:
            for call in (comm.barrier, comm.allreduce(x, async_op=True).wait):
                with pytest.raises(ValueError, match="set a flag in the handler"):
                    call()
            other.allreduce_(y)

        if comm.rank == 0:  # keeps the other waiting until its handler has come here
            other.allreduce_(y)
        else:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        comm.allreduce_(x)
        if comm.rank == 0:
            comm.allreduce(x)
        return x.sum(), y.sum()

    assert testing.run_forks(2, fn, timeout_s=20) == [(6.0, 12.0)] * 2


@pytest.mark.parametrize("name", WAITS)
def test_ctrl_c_interrupts_a_wait_and_is_told_to_the_others(name):
    board = Board()

    def fn(comm: rr.Communicator) -> tuple[float, str, str]:
        if comm.rank == 0:
            board[0] = os.getpid()
            return error_of(lambda: WAITS[name](comm))
        if comm.rank == 1:  # keeps all others waiting
            process = int(board.wait(0))
            time.sleep(0.1)
            board[1] = time.monotonic()
            os.kill(process, signal.SIGINT)
            until_aborted(comm)
        return error_of(lambda: WAITS[name](comm))

    errors = testing.run_forks(3, fn, timeout_s=20)
    assert errors[0][1] == "KeyboardInterrupt", errors
    assert errors[0][0] - board[1] < NAMED_AT_LAST_S
    for _, kind, text in errors[1:]:
        assert kind == "PeerFailed" and "rank 0 was interrupted" in text, text


def test_what_a_signal_handler_raises_is_raised_though_it_left_first():
    """As a handler of SIGTERM does that says goodbye and exits."""
    board = Board()

    def fn(comm: rr.Communicator) -> tuple[float, str, str]:
        def leave(*_: object) -> None:
            comm.close()
            raise SystemExit("preempted")

        if comm.rank == 0:
            signal.signal(signal.SIGTERM, leave)
            board[0] = os.getpid()
            return error_of(comm.barrier)
        os.kill(int(board.wait(0)), signal.SIGTERM)
        until_aborted(comm)
        return error_of(comm.barrier)

    first, second = testing.run_forks(2, fn, timeout_s=20)
    assert first[1:] == ("SystemExit", "preempted")
    assert second[1] == "PeerFailed" and "rank 0 closed the communicator" in second[2], second
