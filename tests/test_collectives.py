"""Every collective on every dtype, op and algorithm, against numpy: exactly, and around all sizes
at which the core changes its ways."""

import functools
import itertools
import multiprocessing

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    COMPLEX,
    DTYPES,
    SIZES,
    assert_equal,
    bits_of,
    exact_values,
    frameworks_of,
    item_bytes,
    make,
    ops_of,
    reduced,
    share,
    values_of,
    with_each,
)

pytestmark = pytest.mark.core

# Bytes of a message at which something changes: auto's two limits, one_shot's, a slot of the wire.
LIMITS_BYTES = (2048, 8192, 65536)
# Those that differ where there is more than the allreduce.
FOR_OTHERS = ("two_shot", "ring")


@functools.cache
def operands(size, dtype, op, shape):
    """(inputs by rank, their reduction). Made before the ranks start, which share the cache."""
    inputs = [exact_values(shape, dtype, op, rank) for rank in range(size)]
    return inputs, reduced(inputs, op, dtype)


def combinations():
    for dtype in DTYPES:
        for op, framework in itertools.product(ops_of(dtype), frameworks_of(dtype)):
            yield dtype, op, framework


def drawn(shapes, part, algorithms, size, runner):
    """By algorithm: the part that falls to it of all (dtype, op, framework, shape)."""
    every = [(*first, shape) for first, shape in itertools.product(combinations(), shapes)]
    cases = {algorithm: share(every, part, size, algorithm, runner) for algorithm in algorithms}
    for dtype, op, _, shape in itertools.chain(*cases.values()):
        operands(size, dtype, op, shape)
    return cases


def check_fresh(result, x, before):
    """The result is of x's kind, shares nothing with it, and left it as it was."""
    assert type(result) is type(x) and result.dtype == x.dtype
    assert bits_of(x) == before
    assert not np.shares_memory(values_of(result), values_of(x)) or result.nbytes == 0


@pytest.mark.parametrize("size", SIZES)
def test_allreduce(ranks, size):
    shapes = [(), (0,), (1,), (size - 1,), (size,), (size + 1,), (3, 0, 2), (7, 11), (1009,)]
    cases = drawn(shapes, 0.12, ALGORITHMS, size, ranks.__name__)

    def check(comm, algorithm):
        for case in cases[algorithm]:
            dtype, op, framework, shape = case
            inputs, total = operands(size, dtype, op, shape)
            x = make(framework, inputs[comm.rank], dtype)
            before = bits_of(x)
            result = comm.allreduce(x, op)
            assert_equal(result, total, case)
            check_fresh(result, x, before)
            out = make(framework, np.zeros(shape), dtype)
            assert comm.allreduce(x, op, out=out) is out
            assert bits_of(out) == bits_of(result) and bits_of(x) == before, case
            assert comm.allreduce_(x, op) is x
            assert bits_of(x) == bits_of(result), case

    ranks(size, with_each(ALGORITHMS, check))


def boundary_counts(size, chunk_bytes, dtype):
    """One element less, none and one more than what ends a chunk, a slice or a way of doing it."""
    item = item_bytes(dtype)
    ends = [limit // item for limit in LIMITS_BYTES]
    chunk = chunk_bytes // item
    ends += [size * chunk, 2 * size * chunk]
    counts = {end + more for end in ends for more in (-1, 0, 1)}
    # More rounds than the staging ring and the wire's FIFOs have slots, with a rest.
    return sorted(counts | {9 * size * chunk + 1013})


@pytest.mark.parametrize("size", SIZES)
def test_allreduce_where_chunks_end(ranks, size):
    dtypes = ("int8", "bfloat16", "float32", "complex128")
    total = size * (size + 1) // 2
    # A period that is prime, so that no two chunks are alike.
    patterns = {dtype: exact_values((8191,), dtype, "sum", 0) for dtype in dtypes}

    def check(comm, algorithm):
        chunk_bytes = comm.core.window_info()["chunk_bytes"]
        every = [(d, count) for d in dtypes for count in boundary_counts(size, chunk_bytes, d)]
        for dtype, count in share(every, 0.25, size, algorithm, ranks.__name__):
            values = np.resize(patterns[dtype], count)
            x = make("torch", values, dtype) * (comm.rank + 1)
            comm.allreduce_(x)
            # Floats: at most 8 * 36, and odd factors below 256, so exact even in 8 bits.
            assert_equal(x, values_of(make("torch", values, dtype) * total), (dtype, count))

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter(ranks, size):
    rows = sorted({0, 1, size - 1, size, size + 1, 2 * size + 1, 61})
    shapes = [(n, *rest) for n, rest in itertools.product(rows, [(), (3,), (2, 5), (0,)])]
    cases = drawn(shapes, 0.15, FOR_OTHERS, size, ranks.__name__)
    large = exact_values((size * 70001 + 1, 3), "int32", "sum", 0)

    def check(comm, algorithm):
        for case in cases[algorithm]:
            dtype, op, framework, shape = case
            inputs, total = operands(size, dtype, op, shape)
            x = make(framework, inputs[comm.rank], dtype)
            before = bits_of(x)
            result = comm.reduce_scatter(x, op)
            assert_equal(result, np.array_split(total, size)[comm.rank], case)
            check_fresh(result, x, before)
        result = comm.reduce_scatter(large * np.int32(comm.rank + 1))
        total = large * np.int32(size * (size + 1) // 2)
        assert_equal(result, np.array_split(total, size)[comm.rank], "large")

    ranks(size, with_each(FOR_OTHERS, check))


@pytest.mark.parametrize("size", SIZES)
def test_allgather(ranks, size):
    rests = [(), (1,), (3,), (0,), (2, 2)]
    lengths = [
        [4] * size,
        [0] * size,
        list(range(size)),  # the first has none
        [size - rank for rank in range(size)],
        [0] * (size - 1) + [5],  # only the last has any
        [1] + [0] * (size - 1),
    ]
    long = [100003 if rank == size // 2 else rank for rank in range(size)]
    every = list(itertools.product(DTYPES, rests, lengths))
    cases = {a: share(every, 0.3, size, a, ranks.__name__) for a in FOR_OTHERS}
    for some in cases.values():
        some += [("int16", (3,), long), ("complex128", (), long)]
    inputs = {
        algorithm: [
            [exact_values((n, *rest), dtype, "sum", rank) for rank, n in enumerate(rows)]
            for dtype, rest, rows in some
        ]
        for algorithm, some in cases.items()
    }

    def check(comm, algorithm):
        for case, values in zip(cases[algorithm], inputs[algorithm], strict=True):
            for framework in frameworks_of(case[0]):
                x = make(framework, values[comm.rank], case[0])
                before = bits_of(x)
                result = comm.allgather(x)
                assert_equal(result, np.concatenate(values), (framework, case))
                check_fresh(result, x, before)

    ranks(size, with_each(FOR_OTHERS, check))


def test_allgather_of_scalars(ranks):
    def check(comm):
        for dtype in DTYPES:
            inputs = [exact_values((), dtype, "sum", rank) for rank in range(3)]
            for framework in frameworks_of(dtype):
                result = comm.allgather(make(framework, inputs[comm.rank], dtype))
                assert_equal(result, np.stack(inputs), (dtype, framework))

    ranks(3, check)


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_and_reduce_from_every_root(ranks, size):
    shapes = [(), (0,), (1,), (size + 1,), (5, 7)]
    every = list(itertools.product(range(size), DTYPES, shapes))
    cases = {a: share(every, 0.7 / size, size, a, ranks.__name__) for a in FOR_OTHERS}
    for some in cases.values():
        some += [(root, "int8", (40009, 2)) for root in range(size)]
    for _, dtype, shape in itertools.chain(*cases.values()):
        operands(size, dtype, "sum", shape)

    def check(comm, algorithm):
        for root, dtype, shape in cases[algorithm]:
            inputs, total = operands(size, dtype, "sum", shape)
            for framework in frameworks_of(dtype):
                x = make(framework, inputs[comm.rank], dtype)
                before = bits_of(x)
                case = (root, dtype, shape, framework)
                sent = comm.broadcast(x, root)
                assert_equal(sent, inputs[root], case)
                check_fresh(sent, x, before)
                onto_root = comm.reduce(x, "sum", root)
                if comm.rank == root:
                    assert_equal(onto_root, total, case)
                    check_fresh(onto_root, x, before)
                else:
                    assert onto_root is None
                    assert bits_of(x) == before, case
                assert comm.broadcast_(x, root) is x
                assert bits_of(x) == bits_of(sent), case

    ranks(size, with_each(FOR_OTHERS, check))


@pytest.mark.parametrize("size", SIZES)
def test_reduce_knows_every_op(ranks, size):
    def check(comm):
        for dtype, op, framework in combinations():
            inputs, total = operands(size, dtype, op, (13,))
            result = comm.reduce(make(framework, inputs[comm.rank], dtype), op, root=size - 1)
            if comm.rank == size - 1:
                assert_equal(result, total, (dtype, op, framework))

    ranks(size, check)


@pytest.mark.parametrize("size", SIZES)
def test_barrier_lets_nobody_out_before_all_are_in(ranks, size):
    entered = multiprocessing.get_context("fork").Value("i", 0)

    def check(comm, algorithm):
        begin = 30 * size * ALGORITHMS.index(algorithm)
        for turn in range(1, 31):
            with entered.get_lock():
                entered.value += 1
            assert comm.barrier() is None
            assert entered.value == begin + turn * size
            comm.barrier()

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", SIZES)
def test_grouped_allreduce(ranks, size):
    shapes = [(3,), (), (0, 4), (5, 2), (1,), (40009,), (17, 3)]
    lists = [
        [],
        [("float32", (4,))],
        [("float32", (0,))],
        [("float64", shape) for shape in shapes],
        [("bfloat16", shape) for shape in shapes],
        [(dtype, shapes[i % 5]) for i, dtype in enumerate(DTYPES)],
        [
            (dtype, shape)
            for shape in shapes[:5]
            for dtype in ("int64", "float16", "int64", "uint8")
        ],
    ]

    def check(comm, algorithm):
        setting = size, algorithm, ranks.__name__
        for members, op in share(
            itertools.product(lists, ("sum", "avg", "prod", "max")), 0.4, setting
        ):
            members = [(d, s) for d, s in members if op in ops_of(d)]
            for framework in ("torch", "numpy"):
                if framework == "numpy":
                    members = [(d, s) for d, s in members if d != "bfloat16"]
                cases = [operands(size, d, op, s) for d, s in members]
                xs = [
                    make(framework, c[0][comm.rank], d)
                    for c, (d, _) in zip(cases, members, strict=True)
                ]
                before = [bits_of(x) for x in xs]
                results = comm.grouped_allreduce(tuple(xs), op)
                assert [bits_of(x) for x in xs] == before
                returned = comm.grouped_allreduce_(iter(xs), op)
                assert isinstance(results, list) and isinstance(returned, list)
                assert all(a is b for a, b in zip(returned, xs, strict=True))
                for i, (_, total) in enumerate(cases):
                    assert_equal(results[i], total, (members[i], op, framework))
                    assert bits_of(xs[i]) == bits_of(results[i])

    ranks(size, with_each(ALGORITHMS, check))


def test_grouped_lists_may_mix_torch_and_numpy(ranks):
    def check(comm):
        xs = [torch.full((3,), 1.5), np.full(2, 2.0, np.float32), np.ones(4, np.int8)]
        sums = comm.grouped_allreduce(xs)
        assert [type(x) for x in sums] == [type(x) for x in xs]
        assert [x.tolist() for x in sums] == [[4.5] * 3, [6.0] * 2, [3] * 4]

    ranks(3, check)


def test_a_world_of_one_copies(ranks):
    def check(comm):
        for dtype, op, framework in combinations():
            x = make(framework, exact_values((6,), dtype, op, 1), dtype)
            before = bits_of(x)
            for result in (
                comm.allreduce(x, op),
                comm.reduce_scatter(x, op),
                comm.reduce(x, op),
                comm.allgather(x),
                comm.broadcast(x),
                comm.grouped_allreduce([x], op)[0],
            ):
                assert bits_of(result) == before
                check_fresh(result, x, before)
        assert comm.size == 1 and comm.rank == 0 and comm.local_rank == 0 and comm.local_size == 1

    ranks(1, check)


def test_kinds_follow_each_other_in_any_order(ranks):
    """Staging ring, wire and the places used by turns go on from one collective to the next."""
    order = generator_of_kinds()

    def check(comm, _):
        ones = np.arange(comm.size, dtype=np.int64)
        for kind, count in order:
            mine = np.full(count, comm.rank + 1, np.int32)
            total = comm.size * (comm.size + 1) // 2
            if kind == "allreduce":
                assert (comm.allreduce(mine) == total).all()
            elif kind == "reduce_scatter":
                result = comm.reduce_scatter(mine)
                assert (result == total).all()
                assert len(result) == len(np.array_split(mine, comm.size)[comm.rank])
            elif kind == "allgather":
                assert (comm.allgather(mine) == np.repeat(ones + 1, count)).all()
            elif kind == "broadcast":
                root = count % comm.size
                assert (comm.broadcast(mine, root) == root + 1).all()
            elif kind == "reduce":
                root = count % comm.size
                result = comm.reduce(mine, root=root)
                assert result is None if comm.rank != root else (result == total).all()
            else:
                comm.barrier()

    for size in (2, 5):
        ranks(size, with_each(ALGORITHMS, check))


def generator_of_kinds():
    random = np.random.default_rng(5)
    kinds = ("allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "barrier")
    counts = (0, 1, 7, 500, 5000, 20000, 100000, 400000)
    weights = np.array([8, 8, 8, 8, 8, 8, 4, 1]) / 53
    return [(str(random.choice(kinds)), int(random.choice(counts, p=weights))) for _ in range(80)]


def test_complex_products_are_true_products(ranks):
    def check(comm):
        for dtype in COMPLEX:
            x = np.full(5, 1 + 2j if comm.rank == 0 else 3 - 1j, dtype)
            assert (comm.allreduce(x, "prod") == (1 + 2j) * (3 - 1j)).all()

    ranks(2, check)
