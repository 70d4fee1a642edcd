"""Symmetric tensors: reduced in place without a copy, whole or in parts, mixed with private memory;
and their life, which every rank ends when it likes."""

import contextlib
import gc
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    DTYPES,
    assert_equal,
    bits_of,
    exact_values,
    generator,
    item_bytes,
    make,
    one_core,
    ops_of,
    reduced,
    share,
    values_of,
    with_each,
)

from ringreduce import MismatchError, ResourceError

SLICE_BYTES = 65536


def address_of(x):
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


def is_symmetric(comm, x):
    return comm.core.is_symmetric(address_of(x), x.nbytes)


@pytest.fixture(params=["a core each", "one core"])
def cores(request):
    """Where ranks have a core each, slices are owned; where they share cores, claimed."""
    with contextlib.nullcontext() if request.param == "a core each" else one_core():
        yield request.param


def test_what_empty_gives(ranks):
    def check(comm):
        for dtype, shape in itertools.product(
            DTYPES, [(), (0,), (3,), 5, [2, 3], (4, 0, 2), (7, 5, 3)]
        ):
            x = comm.empty(shape, getattr(torch, dtype))
            assert type(x) is torch.Tensor and x.dtype == getattr(torch, dtype)
            assert tuple(x.shape) == tuple(torch.empty(shape).shape) and x.is_contiguous()
            assert not x.requires_grad
            if dtype == "bfloat16":
                continue
            y = comm.empty(shape, dtype, "cpu")
            assert type(y) is np.ndarray and y.dtype == np.dtype(dtype) and y.flags.writeable
            assert y.shape == tuple(x.shape) and y.flags.c_contiguous
            assert (
                comm.empty(shape, np.dtype(dtype)).dtype
                == comm.empty(shape, y.dtype.type).dtype
                == dtype
            )
            if x.numel():
                assert address_of(x) % 64 == 0 and address_of(y) % 64 == 0
                assert is_symmetric(comm, x) and is_symmetric(comm, y)
                assert not np.shares_memory(values_of(x), y) or dtype == "bfloat16"
        private = torch.ones(100)
        assert not is_symmetric(comm, private)

    ranks(3, check)


@pytest.mark.parametrize("size", (1, 2, 3, 8))
def test_allreduce_in_symmetric_memory(ranks, cores, size):
    slice_counts = {d: SLICE_BYTES // item_bytes(d) for d in DTYPES}
    every = [
        (dtype, op, count)
        for dtype in DTYPES
        for op in ops_of(dtype)
        for count in (
            0,
            1,
            size,
            1009,
            slice_counts[dtype] - 1,
            size * slice_counts[dtype] + 1,
            150_001,
        )
    ]

    def with_operands(case):
        dtype, op, count = case
        stack = [exact_values((count,), dtype, op, rank) for rank in range(size)]
        return case, stack, reduced(stack, op, dtype)

    cases = {
        algorithm: [*map(with_operands, share(every, 0.05, size, algorithm, cores, ranks.__name__))]
        for algorithm in ALGORITHMS
    }

    def check(comm, algorithm):
        for case, stack, total in cases[algorithm]:
            dtype, op, count = case
            mine = make("torch", stack[comm.rank], dtype)
            x, y = (comm.empty(count, mine.dtype) for _ in range(2))
            x.copy_(mine)
            y.copy_(mine)
            result = comm.allreduce(x, op)  # into private memory
            assert_equal(result, total, case)
            assert bits_of(x) == bits_of(mine)
            z = comm.empty(count, mine.dtype)
            assert comm.allreduce(x, op, out=z) is z  # from one to another
            assert bits_of(z) == bits_of(result) and bits_of(x) == bits_of(mine), case
            comm.allreduce_(x, op)
            assert bits_of(x) == bits_of(result), case
            assert comm.allreduce(mine, op, out=y) is y  # from private memory
            assert bits_of(y) == bits_of(result), case

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", (2, 3, 5))
def test_parts_at_other_offsets_on_each_rank(ranks, cores, size):
    """Also into another tensor, and where some ranks' memory is private."""
    count = 140_000
    inputs = [
        generator("parts", rank).standard_normal(count).astype(np.float32) for rank in range(size)
    ]
    total = reduced(inputs, "sum", "float32")

    def check(comm):
        one = comm.empty(count + 4099, np.float32)
        two = comm.empty(count + 4099, np.float32)
        private = np.empty(count + 4099, np.float32)
        for turn, length in itertools.product(range(8), (1, 31, 5000, count)):
            random_ = random.Random(repr((turn, comm.rank)))
            begin, end = random_.randrange(4000), random_.randrange(4000)
            source = random_.choice([one, two] if turn < 4 else [one, two, private])
            target = random_.choice([one, two] if turn < 4 else [one, two, private])
            for memory in (one, two, private):
                memory[:] = 7
            x = source[begin : begin + length]
            x[:] = inputs[comm.rank][:length]
            out = x if turn % 2 else target[end : end + length]
            if out is not x and np.shares_memory(x, out):
                out = x
            comm.allreduce(x, out=out)
            assert bits_of(out) == bits_of(total[:length]), (turn, length)
            if out is not x:
                assert bits_of(x) == bits_of(inputs[comm.rank][:length])
            out[:] = x[:] = 7
            assert all((memory == 7).all() for memory in (one, two, private))  # nothing beside it

    ranks(size, check)


def test_strided_and_misaligned_parts(ranks):
    def check(comm):
        x = comm.empty((301, 40), torch.float64)
        for view in (x[::2], x[:, 3], x.t(), x[5:, 1:7], x[::3, ::5]):
            x.fill_(7)
            view.copy_(torch.arange(view.numel()).view(view.shape) * (comm.rank + 1))
            comm.allreduce_(view)
            assert torch.equal(view, 6.0 * torch.arange(view.numel()).view(view.shape))
            view.fill_(7)
            assert (x == 7).all()
        raw = comm.empty(80_001, np.uint8)
        misaligned = raw[1:].view(np.float32)
        misaligned[:] = comm.rank
        comm.allreduce_(misaligned)
        assert (misaligned == 3).all()

    ranks(3, check)


def test_every_collective_takes_them(ranks):
    def check(comm):
        for count in (6, 60_000):
            x = comm.empty((count, 2), torch.int32)

            def fresh(x=x):
                return x.copy_(torch.arange(x.numel()).view(x.shape) + comm.rank)

            every = torch.stack(
                [torch.arange(x.numel()).view(x.shape).int() + r for r in range(comm.size)]
            )
            total = every.sum(0).int()
            part = torch.tensor_split(total, comm.size)[comm.rank]
            assert torch.equal(comm.reduce_scatter(fresh()), part)
            assert torch.equal(comm.allgather(fresh()), every.flatten(0, 1))
            assert torch.equal(comm.broadcast(fresh(), 1), every[1])
            assert torch.equal(comm.broadcast_(fresh(), 2), every[2])
            rooted = comm.reduce(fresh(), root=1)
            assert rooted is None if comm.rank != 1 else torch.equal(rooted, total)
            y = comm.empty(3, torch.int32).fill_(1)
            comm.grouped_allreduce_([fresh(), y])
            assert torch.equal(x, total) and y.tolist() == [3] * 3
            assert torch.equal(comm.allreduce_(fresh(), async_op=True).wait(), total)

    ranks(3, check)


def test_symmetric_for_one_communicator_is_ordinary_for_another(ranks):
    def check(comm):
        part, other = comm.split(0, key=-comm.rank), comm.split(comm.rank // 2)
        x = comm.empty(70_000, torch.float32).fill_(1)
        y = part.empty(70_000, torch.float32).fill_(2)
        assert is_symmetric(comm, x) and not is_symmetric(part, x) and not is_symmetric(other, x)
        assert (part.allreduce_(x) == 4).all()
        assert (comm.allreduce_(y) == 8).all()
        assert (other.allreduce_(y) == 16).all()
        assert (comm.allreduce(x, out=y) == 16).all()
        assert (part.allreduce(y, out=x) == 64).all()

    ranks(4, check)


def test_they_outlive_their_communicator(ranks):
    def check(comm):
        part = comm.split(0)
        x = part.empty(300_000, torch.float32).fill_(comm.rank)
        y = part.empty((2, 3), np.int64)
        y[:] = comm.rank
        view = x[100:200]
        part.allreduce_(x)
        part.close()
        del part, x
        gc.collect()
        comm.barrier()
        assert (view == 3).all() and (y == comm.rank).all()
        view.fill_(5)
        assert (comm.allreduce(view) == 15).all()
        return y.sum().item()

    assert ranks(3, check) == [0, 6, 12]


def test_a_view_keeps_the_memory(ranks):
    def check(comm):
        x = comm.empty(1000, np.float32)
        base = weakref.ref(x)
        view = x[10:20]
        view[:] = comm.rank
        del x
        for _ in range(20):  # would take its place
            comm.empty(1000, np.float32)[:] = -1
        assert (view == comm.rank).all()
        assert (comm.allreduce_(view) == 1).all()
        tensor = torch.from_numpy(view)
        del view
        comm.empty(1000, np.float32)[:] = -1
        assert (tensor == 1).all()
        del tensor
        assert base() is None

    ranks(2, check)


@pytest.mark.parametrize("size", (2, 5))
def test_ranks_drop_them_when_they_like(ranks, size):
    """No tensor is overwritten by another, however differently the ranks let go of theirs."""

    def check(comm):
        agreed, own = random.Random(11), random.Random(comm.rank)
        kept = []
        for turn in range(150):
            count = agreed.choice((1, 50, 700, 3000, 60_000, 300_000))
            x = comm.empty(count, np.int64)
            x[:] = mark = turn * 100 + comm.rank
            kept.append((mark, x))
            own.shuffle(kept)
            while len(kept) > own.randrange(1, 12):
                mark, dropped = kept.pop()
                assert (dropped == mark).all()
                del dropped
            if agreed.random() < 0.3:
                assert (comm.allreduce_(x) == sum(turn * 100 + r for r in range(size))).all()
                x[:] = turn * 100 + comm.rank
            del x
        assert all((x == mark).all() for mark, x in kept)

    ranks(size, check)


def test_freed_memory_is_used_again(ranks):
    def check(comm):
        def bytes_held():
            return comm.core.window_info()["symmetric_bytes"]

        x = comm.empty(200_000, torch.float32)
        del x
        comm.empty(1, torch.int8)
        first = bytes_held()
        for turn in range(50):
            x = comm.empty(200_000 - turn, torch.float32).fill_(1)
            y = comm.empty(100, torch.float32)
            comm.allreduce_(x, async_op=True)  # dropped while under way: still kept, still right
            del x, y
        comm.barrier()
        assert bytes_held() <= 4 * first, (first, bytes_held())

    ranks(3, check)


def test_dropped_while_under_way(ranks):
    def check(comm):
        for turn in range(30):
            x = comm.empty(90_000, torch.float32).fill_(turn)
            work = comm.allreduce_(x, async_op=True)
            del x
            junk = comm.empty(90_000, torch.float32).fill_(-1)
            assert (work.wait() == turn * comm.size).all()
            assert (junk == -1).all()

    ranks(3, check)


def test_sizes_must_agree(ranks):
    def check(comm):
        for mine in (comm.rank, 1000 + comm.rank, 10**6 * comm.rank):
            with pytest.raises(MismatchError, match=r"empty\(.* bytes\)"):
                comm.empty(mine, np.uint8)
        # The same number of bytes is enough: the rest is each rank's own.
        x = comm.empty((3, 4), np.float32) if comm.rank else comm.empty(12, torch.int32)
        x[:] = 1
        with pytest.raises(MismatchError):
            comm.allreduce_(x)
        assert (comm.allreduce_(comm.empty(9, np.int8) * 0 + 1) == 2).all()

    ranks(2, check)


def test_more_than_the_machine_has(ranks):
    def check(comm):
        with pytest.raises(ResourceError, match="bytes .* failed: Cannot allocate memory"):
            comm.empty(2**47, np.uint8)
        for shape in ((2**47, 1), (2**62, 8), (2**64 - 1,)):
            with pytest.raises(ValueError, match="too large"):
                comm.empty(shape, np.int16)
        assert (comm.allreduce_(comm.empty(9, np.int8) * 0 + 1) == comm.size).all()

    ranks(2, check)


def test_large_ones(ranks, cores):
    count = 8_000_009

    def check(comm):
        x = comm.empty(count, torch.float32)
        torch.arange(count, out=x).remainder_(1021).add_(comm.rank)
        comm.allreduce_(x, "avg")
        assert torch.equal(x, torch.arange(count).remainder_(1021) + 0.5)

    ranks(2, check)
