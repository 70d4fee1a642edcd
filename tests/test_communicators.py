"""Communicators: ranks that do not agree, groups by split, several at once, their end, forks."""

import itertools
import os
import re

import numpy as np
import pytest
import torch
from expected import ALGORITHMS, with_each

from ringreduce import MismatchError, NotInitialized, PeerFailed, RingReduceError, testing
from ringreduce.communicator import Communicator

pytestmark = pytest.mark.core

ONES = np.ones(4, np.float32)


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


# What one rank does, what the others do, and what the message shows of each.
MISMATCHES = {
    "op": (
        lambda c: c.allreduce(ONES),
        lambda c: c.allreduce(ONES, "max"),
        ("allreduce(sum, float32", "allreduce(max, float32"),
    ),
    "dtype": (
        lambda c: c.allreduce(ONES),
        lambda c: c.allreduce(ones(4, dtype="int32")),
        ("allreduce(sum, float32", "allreduce(sum, int32"),
    ),
    "count": (lambda c: c.allreduce(ones(4)), lambda c: c.allreduce(ones(5)), ("(4,)", "(5,)")),
    "large and small": (
        lambda c: c.allreduce(ones(400_000)),
        lambda c: c.allreduce(ones(1)),
        ("(400000,)", "(1,)"),
    ),
    "none and some": (
        lambda c: c.allreduce(ones(0)),
        lambda c: c.allreduce(ones(3)),
        ("(0,)", "(3,)"),
    ),
    "shape": (
        lambda c: c.allreduce(ones(2, 3)),
        lambda c: c.allreduce(ones(3, 2)),
        ("(2, 3)", "(3, 2)"),
    ),
    "dimensions": (lambda c: c.allreduce(ones(1)), lambda c: c.allreduce(ones()), ("(1,)", "()")),
    "empty shapes": (
        lambda c: c.allreduce(ones(0, 3)),
        lambda c: c.allreduce(ones(3, 0)),
        ("(0, 3)", "(3, 0)"),
    ),
    "kind": (
        lambda c: c.broadcast(ONES),
        lambda c: c.allreduce(ONES),
        ("broadcast(", "allreduce("),
    ),
    "barrier": (lambda c: c.barrier(), lambda c: c.allreduce(ONES), ("barrier()", "allreduce(")),
    "gather": (
        lambda c: c.allgather(ONES),
        lambda c: c.reduce_scatter(ONES),
        ("allgather(", "reduce_scatter("),
    ),
    "root of broadcast": (
        lambda c: c.broadcast(ONES, 0),
        lambda c: c.broadcast(ONES, 1),
        ("root 0", "root 1"),
    ),
    "root of reduce": (
        lambda c: c.reduce(ONES, root=0),
        lambda c: c.reduce(ONES, root=1),
        ("root 0", "root 1"),
    ),
    "shape of broadcast": (
        lambda c: c.broadcast(ones(2, 3)),
        lambda c: c.broadcast(ones(6)),
        ("(2, 3)", "(6,)"),
    ),
    "rows of allgather": (
        lambda c: c.allgather(ones(2, 3)),
        lambda c: c.allgather(ones(2, 4)),
        ("allgather(float32", "(4,)"),
    ),
    "dtype of allgather": (
        lambda c: c.allgather(ones(2)),
        lambda c: c.allgather(ones(2, dtype="int8")),
        ("float32", "int8"),
    ),
    "rows of reduce_scatter": (
        lambda c: c.reduce_scatter(ones(4, 2)),
        lambda c: c.reduce_scatter(ones(5, 2)),
        ("(4, 2)", "(5, 2)"),
    ),
    "grouped and single": (
        lambda c: c.grouped_allreduce([ones(4), ones(1)]),
        lambda c: c.allreduce(ones(5)),
        ("more tensor", "(5,)"),
    ),
    "grouped lists": (
        lambda c: c.grouped_allreduce([ones(4), ones(2)]),
        lambda c: c.grouped_allreduce([ones(4), ones(3)]),
        ("6 elements", "7 elements"),
    ),
    "order of grouped lists": (
        lambda c: c.grouped_allreduce([ones(4), ones(2)]),
        lambda c: c.grouped_allreduce([ones(2), ones(4)]),
        ("(4,)", "(2,)"),
    ),
    "hidden shapes of grouped lists": (
        lambda c: c.grouped_allreduce([ones(4), ones(2, 3)]),
        lambda c: c.grouped_allreduce([ones(4), ones(3, 2)]),
        ("(4,)", "other shapes"),
    ),
    "grouped dtypes": (
        lambda c: c.grouped_allreduce([ones(4), ones(2, dtype="int8")]),
        lambda c: c.grouped_allreduce([ones(4), ones(2, dtype="uint8")]),
        ("float32", "other shapes"),
    ),
    "order of grouped dtypes": (
        lambda c: c.grouped_allreduce([ones(4), ones(2, dtype="int8")]),
        lambda c: c.grouped_allreduce([ones(2, dtype="int8"), ones(4)]),
        ("float32", "int8"),
    ),
    "a longer grouped list": (
        lambda c: c.grouped_allreduce([ones(4), ones(4, dtype="int8")]),
        lambda c: c.grouped_allreduce([ones(4)]),
        ("more tensor", "(4,)"),
    ),
    "an empty grouped list": (
        lambda c: c.grouped_allreduce([]),
        lambda c: c.grouped_allreduce([ones(4)]),
        ("allreduce(", "(4,)"),
    ),
    "dimension 9": (
        lambda c: c.allreduce(ones(*[1] * 7, 2, 3)),
        lambda c: c.allreduce(ones(*[1] * 7, 3, 2)),
        ("...", "other shapes"),
    ),
    "symmetric memory": (
        lambda c: c.empty(4, np.float32),
        lambda c: c.empty(5, np.float32),
        ("empty(16 bytes", "empty(20 bytes"),
    ),
    "split": (lambda c: c.split(0), lambda c: c.barrier(), ("allgather(", "barrier()")),
}


def meet_well(comm):
    """The communicator works, in every way."""
    size = comm.size
    assert (comm.allreduce(ones(3)) == size).all()
    assert (comm.allreduce(ones(100_000)) == size).all()
    assert comm.allgather(np.array([comm.rank])).tolist() == list(range(size))


@pytest.mark.parametrize("size", (2, 3, 8))
def test_a_mismatch_is_told_to_all_and_survived(ranks, size):
    def check(comm, _):
        texts = []
        for turn, (name, (one, others, shown)) in enumerate(MISMATCHES.items()):
            odd = turn % size
            sequence = comm.core.sequence
            with pytest.raises(MismatchError) as caught:
                (one if comm.rank == odd else others)(comm)
            text = str(caught.value)
            assert comm.core.sequence == sequence + 1, name
            assert f"#{sequence + 1} " in text and f"rank {odd} calls " in text, (name, text)
            assert all(part in text for part in shown), (name, text)
            # Both sides are named: what differs must be visible.
            assert len(set(re.findall(r"calls? ([^;]*?)(?=;| \(you are)", text))) == 2, (name, text)
            assert f"you are rank {comm.rank}" in text
            texts.append(text.replace(f"you are rank {comm.rank}", ""))
            if turn % 5 == 0:
                meet_well(comm)
        meet_well(comm)
        return texts

    told = ranks(size, with_each(ALGORITHMS, check))
    assert all(texts == told[0] for texts in told)


def test_a_mismatch_changes_no_data(ranks):
    def check(comm):
        def check_with(count):
            mine = count + comm.rank
            x, y, out = (np.full(mine, value, np.float32) for value in (1, 2, 3))
            t = torch.full((mine,), 4.0)
            symmetric = comm.empty(count, torch.float32).fill_(5)
            for call in (
                lambda: comm.allreduce_(x),
                lambda: comm.allreduce(x, out=out),
                lambda: comm.broadcast_(y),
                lambda: comm.grouped_allreduce_([x, y]),
                lambda: comm.allreduce_(t),
                lambda: comm.allreduce_(symmetric[comm.rank :]),
            ):
                with pytest.raises(MismatchError):
                    call()
            values = [
                np.unique(values).tolist() for values in (x, y, out, t.numpy(), symmetric.numpy())
            ]
            assert values == [[1], [2], [3], [4], [5]]

        for count in (3, 5000, 200_000):
            check_with(count)

    ranks(3, check)


def test_calls_in_another_order(ranks):
    def check(comm):
        first, second = (ones(3), ones(5)) if comm.rank else (ones(5), ones(3))
        for x in (first, second):
            with pytest.raises(MismatchError, match=r"\((5,\).*\(3|3,\).*\(5),\)"):
                comm.allreduce(x)
        for x in (first, second):
            work = comm.allreduce(x, async_op=True)
            with pytest.raises(MismatchError, match=r"\((5,\).*\(3|3,\).*\(5),\)"):
                work.wait()
        meet_well(comm)

    ranks(4, check)


def test_three_sides_of_a_mismatch(ranks):
    def check(comm):
        with pytest.raises(MismatchError) as caught:
            comm.allreduce(ones(10 + comm.rank % 3))
        text = str(caught.value)
        assert "ranks 0, 3 call" in text and "ranks 1, 4 call" in text and "rank 2 calls" in text
        assert all(f"({count},)" in text for count in (10, 11, 12))

    ranks(5, check)


def test_split(ranks):
    def check(comm):
        part = comm.split(comm.rank % 2)
        assert isinstance(part, Communicator)
        members = range(comm.rank % 2, comm.size, 2)
        assert (part.rank, part.size) == (members.index(comm.rank), len(members))
        assert (part.local_rank, part.local_size) == (part.rank, part.size)
        assert part.allgather(np.array([comm.rank])).tolist() == list(members)
        assert part.allreduce(np.array(comm.rank)) == sum(members)

        backwards = comm.split(0, key=-comm.rank)
        assert backwards.rank == comm.size - 1 - comm.rank
        assert backwards.broadcast(np.array(comm.rank), root=0) == comm.size - 1

        ties = comm.split(7, key=comm.rank % 2)  # equal keys: in the old order
        order = sorted(range(comm.size), key=lambda rank: (rank % 2, rank))
        assert ties.allgather(np.array([comm.rank])).tolist() == order

        outside = comm.split(None if comm.rank == 1 else -5)
        assert (outside is None) == (comm.rank == 1)
        if outside is not None:
            assert outside.size == comm.size - 1
            assert outside.allreduce(np.array(1)) == comm.size - 1

        alone = comm.split(comm.rank)
        assert (alone.rank, alone.size) == (0, 1)
        assert alone.allreduce(np.array(comm.rank)) == comm.rank
        assert comm.split(None) is None
        assert comm.split(-(2**63) if comm.rank else 2**63 - 1).size == (
            comm.size - 1 if comm.rank else 1
        )
        meet_well(comm)

    for size in (2, 3, 5, 8):
        ranks(size, check)


def test_nested_splits_and_their_independence(ranks):
    def check(comm):
        half = comm.split(comm.rank // 4)
        quarter = half.split(half.rank // 2, key=-half.rank)
        assert quarter.size == 2
        # Groups need not do the same, nor equally often, nor end the same way.
        for _ in range(comm.rank // 4 * 5):
            half.allreduce(ones(5000))
        if comm.rank >= 4:
            with pytest.raises(MismatchError):
                half.allreduce(ones(2 + half.rank))
            half.barrier()
        total = quarter.allreduce(np.array([comm.rank]))
        assert total == comm.rank // 2 * 4 + 1
        assert comm.allreduce(total.astype(np.int64)).item() == 2 * (1 + 5 + 9 + 13)
        works = [c.allreduce(ones(20000), async_op=True) for c in (comm, half, quarter)]
        assert [int(work.wait()[0]) for work in works[::-1]] == [2, 4, 8]
        names = {c.name for c in (comm, half, quarter)}
        assert len(names) == 3 and all(str(c.rank) in repr(c) for c in (comm, half, quarter))

    ranks(8, check)


def test_a_mismatch_in_a_split_communicator_names_it(ranks):
    def check(comm):
        part = comm.split(0)
        with pytest.raises(MismatchError, match=re.escape(f"'{part.name}'")):
            part.allreduce(ones(2 + comm.rank))
        comm.barrier()

    ranks(2, check)


def test_close(ranks):
    def check(comm):
        part, other = comm.split(0), comm.split(0)
        part.barrier()
        part.close()
        part.close()
        x = ones(3)
        for call in (
            lambda: part.allreduce(x),
            lambda: part.allreduce_(x),
            lambda: part.allreduce(x, async_op=True),
            lambda: part.broadcast_(x),
            lambda: part.allgather(x),
            lambda: part.barrier(),
            lambda: part.empty(3, np.float32),
            lambda: part.split(0),
            lambda: part.grouped_allreduce([]),
        ):
            with pytest.raises(NotInitialized, match="closed"):
                call()
        assert (x == 1).all() and part.rank == comm.rank and part.size == comm.size
        meet_well(comm)
        meet_well(other)
        with comm.split(0) as inner:
            work = inner.allreduce(ones(30000), async_op=True)
        assert (work.wait() == comm.size).all()
        with pytest.raises(NotInitialized):
            inner.barrier()
        with pytest.raises(ZeroDivisionError), comm.split(0) as inner:
            raise ZeroDivisionError
        # A group outlives the communicator that it was split from.
        child = other.split(0)
        other.close()
        meet_well(child)

    for size in (1, 3):
        ranks(size, check)


def test_whoever_waits_for_a_closed_rank_is_told(ranks):
    def check(comm):
        part = comm.split(0)
        part.barrier()
        if comm.rank == 2:
            part.close()
        else:
            with pytest.raises(PeerFailed, match="rank 2"):
                part.allreduce(ones(1000))
            with pytest.raises(PeerFailed, match="rank 2"):  # and again
                part.barrier()
        meet_well(comm)

    ranks(4, check)


def test_a_rank_may_leave_after_its_part_is_done(ranks):
    """The others have its data already: nobody fails because it is gone."""

    def check(comm):
        for algorithm, count, _ in itertools.product(ALGORITHMS, (1, 5000, 100_000), range(3)):
            part = comm.split(0, algorithm=algorithm)
            result = part.allreduce(ones(count))
            part.close()
            assert (result == comm.size).all()

    for size in (2, 5):
        ranks(size, check)


@pytest.mark.parametrize("way", ["wait", "drain", "with"])
def test_close_after_an_asynchronous_call_disturbs_nobody(ranks, way):
    """What has been waited for is over: closing then is no abort, however short ago it was."""

    def check(comm):
        for turn in range(60):
            part = comm.split(0)
            x = ones((10, 20_000)[turn % 2])
            if way == "with":
                with part:
                    work = part.allreduce_(x, async_op=True)
            else:
                work = part.allreduce_(x, async_op=True)
                if way == "wait":
                    work.wait()
                else:
                    part.core.drain(20.0)
                part.close()
            assert (work.wait() == comm.size).all()
            comm.barrier()
            assert not part.core.aborted, turn

    ranks(3, check)


def test_opening_and_closing_leaks_nothing(ranks):
    def check(comm):
        def held():
            with open("/proc/self/maps") as maps:
                return len(os.listdir("/proc/self/fd")), sum("memfd" in line for line in maps)

        def use():
            with comm.split(0) as part:
                part.allreduce(ones(50_000))
                part.allreduce(ones(5), async_op=True)
                part.empty(100_000, torch.float32)

        use()
        comm.barrier()
        before = held()
        for _ in range(15):
            use()
        comm.barrier()
        assert all(after <= first + 3 for after, first in zip(held(), before, strict=True)), (
            before,
            held(),
        )

    ranks(1, check)
    if ranks.__name__ == "run_forks":  # of threads, each would see the others' segments
        ranks(3, check)


def test_a_forked_child_is_no_rank():
    def check(comm):
        part = comm.split(0)
        x = ones(3)
        work = comm.barrier(async_op=True) if comm.rank == 0 else None  # the others come later
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (
                lambda: comm.allreduce_(x),
                lambda: comm.allreduce(x),
                lambda: comm.barrier(async_op=True),
                lambda: part.broadcast(x),
                lambda: comm.split(0),
                lambda: comm.empty(3, np.float32),
                lambda: work.wait() if work else comm.barrier(),
            ):
                try:
                    call()
                except RingReduceError as error:
                    refused += "fork" in str(error)
            part.close()  # nothing to the parent
            del part, comm
            os._exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        part.barrier()
        if work is None:
            comm.barrier()
        meet_well(part)
        meet_well(comm)
        return True

    # Of forks only: a process of many threads must not fork.
    assert testing.run_forks(3, check) == [True] * 3


def test_attributes(ranks):
    def check(comm):
        assert (comm.local_rank, comm.local_size) == (comm.rank, comm.size)
        assert f"rank {comm.rank} of {comm.size}" in repr(comm)
        return comm.rank, comm.size

    assert ranks(3, check) == [(0, 3), (1, 3), (2, 3)]
