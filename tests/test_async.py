"""Asynchronous calls, and calls from many threads: order, lifetime of operands, waiting, errors."""

import itertools
import multiprocessing
import random
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    DTYPES,
    assert_equal,
    exact_values,
    make,
    ops_of,
    reduced,
    values_of,
    with_each,
)

from ringreduce import MismatchError, PeerFailed, RingReduceError, testing

FORK = multiprocessing.get_context("fork")
SOON_S = 20.0  # what must happen, happens within this


def until(condition):
    """Polls without giving up the interpreter for long; a hang is the runner's to report."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.0005)


@pytest.mark.parametrize("size", (1, 2, 5))
def test_many_at_once_waited_for_in_any_order(ranks, size):
    cases = []
    for number, dtype in enumerate(DTYPES * 6):
        op = ops_of(dtype)[number % len(ops_of(dtype))]
        count = (0, 1, 7, 1000, 5003, 30011)[number // 12 - number % 5]
        inputs = [exact_values((count,), dtype, op, (rank, number)) for rank in range(size)]
        cases.append((dtype, op, inputs, reduced(inputs, op, dtype)))

    def check(comm, _):
        works = []
        for dtype, op, inputs, _ in cases:
            x = make("torch", inputs[comm.rank], dtype)
            works.append(comm.allreduce(x, op, async_op=True))
            works.append(comm.allreduce_(x.clone(), op, async_op=True))
        order = list(range(len(works)))
        random.Random(comm.rank).shuffle(order)
        for i in order:
            result = works[i].wait()
            assert works[i].done()
            assert works[i].wait() is result  # every time the same object
            assert_equal(result, cases[i // 2][3], cases[i // 2][:2])

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", (1, 3))
def test_every_collective_may_be_asynchronous(ranks, size):
    def check(comm):
        for count, framework in itertools.product((0, 5, 40000), ("torch", "numpy")):
            values = np.arange(count, dtype=np.int32) + comm.rank
            x = make(framework, values, "int32")
            y, z, out = x + 0, x + 0, x + 0
            mine = x[: count // (comm.rank + 1)]
            works = [
                comm.allreduce(x, async_op=True),
                comm.allreduce(x, "max", out=out, async_op=True),
                comm.allreduce_(y, async_op=True),
                comm.grouped_allreduce([x, x], async_op=True),
                comm.grouped_allreduce_([z], async_op=True),
                comm.reduce_scatter(x, async_op=True),
                comm.allgather(mine, async_op=True),
                comm.broadcast(x, size - 1, async_op=True),
                comm.reduce(x, root=size - 1, async_op=True),
                comm.barrier(async_op=True),
            ]
            results = [work.wait() for work in reversed(works)][::-1]
            assert results[1] is out and results[2] is y and results[4][0] is z
            blocking = [
                comm.allreduce(x),
                comm.allreduce(x, "max"),
                comm.allreduce(x),
                *comm.grouped_allreduce([x]),
                *comm.grouped_allreduce([x]),
                comm.reduce_scatter(x),
                comm.allgather(mine),
                comm.broadcast(x, size - 1),
            ]
            results[3:5] = results[3][1], results[4][0]
            for result, expected in zip(results, blocking, strict=False):
                assert type(result) is type(x) and result.dtype == x.dtype
                assert_equal(result, values_of(expected), count)
            if comm.rank == size - 1:
                assert_equal(results[8], values_of(comm.allreduce(x)), count)
            else:
                assert results[8] is None
                comm.allreduce(x)
            assert results[9] is None

    ranks(size, check)


def test_calls_run_in_the_order_of_issue(ranks):
    """Each reads what the one before wrote, blocking or not."""

    def check(comm):
        for count in (1, 3000, 100_000):
            x = torch.ones(count, dtype=torch.float64)
            for turn in range(1, 13):
                if turn % 4 == 0:
                    comm.allreduce_(x)
                elif turn % 4 == 3:
                    comm.allreduce(x, out=x)
                else:
                    comm.allreduce_(x, async_op=True)
            assert (comm.allreduce(x) == 3.0**13).all()

    ranks(3, check)


def test_operands_live_as_long_as_they_are_needed_and_no_longer(ranks):
    def check(comm):
        works, alive = [], []
        for number in range(20):
            x = torch.full((20000,), float(number + comm.rank))
            alive.append(weakref.ref(x))
            works.append(comm.allreduce(x, async_op=True))
            y = np.full((20000, 2), number, np.float32)[:, 1]
            alive.append(weakref.ref(y))
            works.append(comm.allreduce(y, async_op=True))
            del x, y
            junk = [
                torch.full((20000,), -1e30) for _ in range(3)
            ]  # takes memory that was freed too early
            del junk
        for number in range(20):
            assert (works[2 * number].wait() == 3 * number + 3).all()
            assert (works[2 * number + 1].wait() == 3 * number).all()
        x = torch.ones(20000)
        alive.append(weakref.ref(x))
        works.append(comm.allreduce_(x, async_op=True))
        while not works[-1].done():
            pass
        del works, x
        comm.allreduce_(torch.ones(2))  # the short way
        assert [ref() for ref in alive] == [None] * len(alive)

    ranks(3, check)


def test_an_operand_that_dies_may_run_python():
    """Its finalizer lets other threads call, or calls itself. In a fork: a crash ends no tests."""
    turns = 500

    def check(comm):
        deaths = []

        class Mourned(np.ndarray):
            def __del__(self):
                comm.barrier(async_op=True)

        def work():
            for _ in range(turns):
                x = np.ones(5)
                weakref.finalize(x, lambda: deaths.append(sum(range(300))))
                comm.allreduce_(x, async_op=True)
                del x
                comm.allreduce_(np.ones(5).view(Mourned), async_op=True)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        for _ in range(3):
            comm.barrier(async_op=True).wait()
        assert len(deaths) == 4 * turns

    testing.run_forks(1, check)


def test_nobody_need_wait(ranks):
    def check(comm):
        x = torch.ones(1000)
        for number in range(200):
            comm.allreduce(torch.full((number,), 1.0), async_op=True)
            comm.broadcast(np.ones(number), async_op=True)
            comm.allgather(np.ones(number % 7), async_op=True)
            comm.allreduce_(x, "avg", async_op=True)
        assert comm.allreduce(torch.ones(1)).item() == comm.size
        assert (x == 1).all()
        comm.allreduce_(x, async_op=True)  # under way when the communicators are closed

    ranks(2, check)
    ranks(5, check)


def test_wait_with_a_timeout_goes_on_afterwards(ranks):
    may_come = FORK.Event()

    def check(comm):
        x = torch.ones(5000)
        if comm.rank == 1:
            assert may_come.wait(SOON_S)
        work = comm.allreduce_(x, async_op=True)
        if comm.rank == 0:
            for timeout in (0, 0.01, -1, 0.02):
                with pytest.raises(TimeoutError) as caught:
                    work.wait(timeout)
                assert not isinstance(caught.value, RingReduceError)
            with pytest.raises(TimeoutError):
                work.wait(timeout=0.01)
            assert not work.done()
            may_come.set()
        assert work.wait(SOON_S) is x
        assert work.wait(0) is x and work.done()
        with pytest.raises(ValueError, match="number of seconds"):
            work.wait(float("nan"))
        assert (x == 2).all()
        assert comm.allreduce(torch.ones(1)).item() == 2

    ranks(2, check)


def test_done_does_not_wait(ranks):
    may_come = FORK.Event()

    def check(comm):
        if comm.rank == 0:
            work = comm.barrier(async_op=True)
            assert not work.done() and not work.done()
            may_come.set()
        else:
            assert may_come.wait(SOON_S)
            work = comm.barrier(async_op=True)
        until(work.done)
        assert work.wait(0) is None

    ranks(2, check)


def test_waiting_lets_other_threads_run(ranks):
    """wait() gives up the interpreter: a thread of this very process brings what is waited for."""

    def check(comm):
        first, second = comm.split(0), comm.split(0)
        if comm.rank == 0:
            work = first.barrier(async_op=True)
            helper = threading.Thread(target=second.barrier)
            helper.start()
            work.wait(SOON_S)
            helper.join(SOON_S)
            assert not helper.is_alive()
        else:
            second.barrier()
            first.barrier()

    ranks(2, check)


def test_the_error_of_a_call_nobody_waited_for_is_raised_by_the_next(ranks):
    def check(comm):
        work = comm.allreduce_(torch.ones(3 + comm.rank), async_op=True)
        until(work.done)
        with pytest.raises(MismatchError, match=r"shape \(3,\).*shape \(4,\)"):
            comm.barrier()
        sequence = comm.core.sequence
        assert comm.allreduce(torch.ones(1)).item() == 2  # once only, and the communicator goes on
        assert comm.core.sequence == sequence + 1

    ranks(2, check)


def test_an_error_that_was_waited_for_is_not_raised_again(ranks):
    def check(comm):
        good = comm.allreduce(np.ones(3), async_op=True)
        bad = comm.allreduce(np.ones(3 + comm.rank), async_op=True)
        for _ in range(2):
            with pytest.raises(MismatchError):
                bad.wait()
        assert bad.done()
        after = comm.allreduce(np.ones(3), async_op=True)
        assert after.wait().tolist() == good.wait().tolist() == [2] * 3
        assert comm.allreduce(np.ones(1)).tolist() == [2]

    ranks(2, check)


def test_errors_of_the_call_itself_are_raised_at_once(ranks):
    def check(comm):
        sequence = comm.core.sequence
        for wrong in (
            lambda: comm.allreduce(np.ones(2), "mean", async_op=True),
            lambda: comm.allreduce_(np.broadcast_to(np.ones(1), 3), async_op=True),
            lambda: comm.broadcast([1], async_op=True),
            lambda: comm.reduce(np.ones(1), root=2, async_op=True),
        ):
            with pytest.raises((TypeError, ValueError)):
                wrong()
        assert comm.core.sequence == sequence

    ranks(2, check)


@pytest.mark.parametrize("size", (1, 2, 4))
def test_many_threads_of_a_rank(ranks, size):
    """All call the same, so it does not matter whose call meets whose; none may be lost."""

    def check(comm):
        failures = []

        def work(number):
            try:
                for turn in range(25):
                    if (turn + number) % 3:
                        result = comm.allreduce(np.full(600, 2.0))
                    else:
                        result = comm.allreduce(np.full(600, 2.0), async_op=True).wait()
                    assert (result == 2 * size).all()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert comm.core.sequence == 6 * 25

    ranks(size, check)


def test_a_thread_for_each_communicator(ranks):
    def check(comm):
        parts = [comm.split(0) for _ in range(4)]
        failures = []

        def work(part, number):
            try:
                for turn in range(30):
                    count = (1, 700, 20000)[(turn + number) % 3]
                    x = torch.full((count,), float(number))
                    assert (part.allreduce_(x) == 3 * number).all()
                    assert (part.broadcast(x + comm.rank, 1) == 3 * number + 1).all()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(p, i)) for i, p in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures

    ranks(3, check)


def test_communicators_do_not_wait_for_each_other(ranks):
    """Each rank issues on two communicators in another order: each has its own queue."""

    def check(comm):
        one, two = comm.split(0), comm.split(0)
        for turn in range(30):
            order = [one, two] if (comm.rank + turn) % 2 else [two, one]
            works = {
                part: part.allreduce(np.full(3000, 1 + (part is two)), async_op=True)
                for part in order
            }
            assert (works[one].wait() == comm.size).all()
            assert (works[two].wait() == 2 * comm.size).all()

    ranks(4, check)


def test_a_work_may_be_waited_for_in_other_threads_and_after_close(ranks):
    def check(comm):
        part = comm.split(0)
        work = part.allreduce(np.ones(50000), async_op=True)
        results = []
        threads = [threading.Thread(target=lambda: results.append(work.wait())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4 and all(result is results[0] for result in results)
        comm.barrier()
        part.close()
        assert work.wait() is results[0] and work.done()
        assert (results[0] == 2).all()

    ranks(2, check)


def test_close_ends_what_is_under_way(ranks):
    """A rank that leaves does not hang, and does not leave others hanging."""
    closed = FORK.Event()

    def check(comm):
        part = comm.split(0)
        if comm.rank == 0:
            works = [part.allreduce(np.ones(10), async_op=True) for _ in range(3)]
            part.close()
            closed.set()
            for work in works:
                with pytest.raises(RingReduceError):
                    work.wait(SOON_S)
        else:
            assert closed.wait(SOON_S)
            with pytest.raises(PeerFailed, match="rank 0"):
                part.allreduce(np.ones(10))
        assert comm.allreduce(np.ones(1)).tolist() == [2]

    ranks(2, check)


@pytest.mark.parametrize("async_op", (False, True))
def test_who_waits_burns_no_core(async_op):
    late_s = 0.8

    def check(comm):
        x = np.ones(1000, np.float32)
        comm.allreduce_(x)
        if comm.rank == 0:
            threading.Event().wait(late_s)  # what the others wait for
            comm.allreduce_(x)
            return
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        work = comm.allreduce_(x, async_op=async_op)
        if async_op:
            work.wait()
        waited_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        assert waited_s > late_s / 2
        # At most all of the first 100 ms, then 5 %.
        assert cpu_s < 0.1 + 0.05 * waited_s, (cpu_s, waited_s)

    testing.run_forks(3, check)
