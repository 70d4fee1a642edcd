"""What the numbers are worth: rounding within its bound, the same bits on all ranks and in all
runs, rank order where it is promised, and the values at the edges of each type."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    FLOATS,
    SIZES,
    assert_equal,
    bits_of,
    generator,
    item_bytes,
    make,
    numpy_dtype,
    one_core,
    reduced,
    values_of,
    with_each,
)

# Unit roundoff of a sum, and of a stored result.
SUM_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24, "bfloat16": 2.0**-24}
STORED_ROUNDOFF = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 5e-324, "float32": 1.5e-45, "float16": 6e-8, "bfloat16": 1e-40}
IN_RANK_ORDER = ("auto", "one_shot", "two_shot")


def random_values(count, dtype, *seed):
    """Of both signs, over many powers of two: no two orders of summation agree."""
    random = generator(count, dtype, *seed)
    values = random.standard_normal(count) * 2.0 ** random.integers(-8, 8, count)
    return values_of(make("torch", values, dtype))


def ways_to_run(size):
    """Where every rank has a core and where not, as far as this machine has both."""
    return [contextlib.nullcontext] if size == 1 else [contextlib.nullcontext, one_core]


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_within_the_rounding_bound(ranks, size):
    inputs = {d: [random_values(3001, d, rank) for rank in range(size)] for d in FLOATS}

    def check(comm, _):
        for dtype, op in itertools.product(FLOATS, ("sum", "avg")):
            stack = np.array(inputs[dtype], np.longdouble)
            exact, magnitude = stack.sum(0), np.abs(stack).sum(0)
            roundings = size - 1
            if op == "avg":
                exact, magnitude, roundings = exact / size, magnitude / size, size
            bound = roundings * SUM_ROUNDOFF[dtype] * magnitude * (1 + 1e-6)
            bound += STORED_ROUNDOFF[dtype] * (np.abs(exact) + bound) + SMALLEST[dtype]
            result = comm.allreduce(make("torch", inputs[dtype][comm.rank], dtype), op)
            error = np.abs(values_of(result).astype(np.longdouble) - exact)
            assert (error <= bound).all(), (dtype, op, float((error / bound).max()))

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", SIZES)
def test_the_same_bits_on_all_ranks_and_in_all_runs(ranks, size):
    counts = (1, 1000, 40011)
    inputs = {
        (d, n): [random_values(n, d, rank) for rank in range(size)] for d in FLOATS for n in counts
    }

    def bits(comm, _):
        results = []
        for (dtype, _), values in inputs.items():
            x = make("torch", values[comm.rank], dtype)
            results.append(bits_of(comm.allreduce(x, "sum")))
            results.append(bits_of(comm.allreduce(x, "avg")))
            results.append(bits_of(comm.allreduce(x, "prod")))
        return results

    first = ranks(size, with_each(ALGORITHMS, bits))
    again = ranks(size, with_each(ALGORITHMS, bits))
    assert all(other == first[0] for other in first + again)


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_rank_order_wherever_an_element_lies(ranks, size):
    """An element's bits depend on the inputs alone: not on count, offset, grouping or memory."""
    count = 120007
    pieces = [(0, count), (1, 40000), (3, 3 + 9), (517, 518), (70000, count), (64, 64 + 4096)]
    dtypes = ("float32", "bfloat16") if size > 3 else FLOATS
    inputs = {d: [random_values(count, d, rank) for rank in range(size)] for d in dtypes}
    sums = {(d, op): reduced(inputs[d], op, d) for d in dtypes for op in ("sum", "avg")}

    def check(comm, _):
        for dtype, op in sums:
            whole = make("torch", inputs[dtype][comm.rank], dtype)
            expected = make("torch", sums[dtype, op], dtype)
            symmetric = comm.empty(count, whole.dtype)
            for begin, end in pieces:
                case = (dtype, op, begin, end)
                wanted = bits_of(expected[begin:end])
                assert bits_of(comm.allreduce(whole[begin:end], op)) == wanted, case
                symmetric.copy_(whole)
                comm.allreduce_(symmetric[begin:end], op)
                assert bits_of(symmetric[begin:end]) == wanted, case
                symmetric[begin:end] = whole[begin:end]
                assert bits_of(symmetric) == bits_of(whole), case  # nothing else was written
            parts = [whole[begin:end] for begin, end in pieces]
            for (begin, end), result in zip(pieces, comm.grouped_allreduce(parts, op), strict=True):
                assert bits_of(result) == bits_of(expected[begin:end]), (
                    dtype,
                    op,
                    begin,
                    "grouped",
                )
            assert bits_of(comm.reduce_scatter(whole, op)) == bits_of(
                torch.tensor_split(expected, size)[comm.rank]
            )

    for way in ways_to_run(size):
        with way():
            ranks(size, with_each(IN_RANK_ORDER, check))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_16_bit_sums_are_accumulated_in_32_bits(ranks, dtype):
    """In 16 bits each of the small numbers would vanish in the large one, a large sum overflow."""
    large = 2048.0 if dtype == "float16" else 256.0
    most = 60000.0 if dtype == "float16" else 3e38
    size = 8

    def check(comm, _):
        for big in range(size):
            x = torch.full((1000,), large if comm.rank == big else 1.0).to(getattr(torch, dtype))
            total = comm.allreduce(x)
            assert (total == torch.tensor(large + size - 1).to(x.dtype)).all(), (big, total[0])
        if dtype == "float16":
            x = torch.full((1000,), most, dtype=torch.float16)
            assert (comm.allreduce(x, "avg") == most).all()
            assert torch.isinf(comm.allreduce(x, "sum")).all()
        x = torch.full((1000,), -most if comm.rank else most).to(getattr(torch, dtype))
        if dtype == "bfloat16":
            x /= size  # bfloat16 has float32's range: partial sums must fit
        value = float(x[0].abs())
        assert (
            comm.allreduce(x).float() == torch.tensor((2 - size) * value).to(x.dtype).float()
        ).all()

    ranks(size, with_each(ALGORITHMS, check))


def test_every_16_bit_pattern_survives(ranks):
    """Widened, combined with what changes nothing, and narrowed: still the same number."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)

    def check(comm, _):
        for dtype in (torch.float16, torch.bfloat16):
            x = patterns.view(dtype)
            for op, neutral in (("sum", 0.0), ("prod", 1.0), ("max", -np.inf), ("min", np.inf)):
                mine = x if comm.rank == 1 else torch.full_like(x, neutral)
                result = comm.allreduce(mine, op)
                same = (result == x) | (torch.isnan(result) & torch.isnan(x))
                assert same.all(), (dtype, op, x[~same][:5], result[~same][:5])
            if dtype == torch.bfloat16:
                continue  # the sum of two large ones is more than float32 holds
            average = comm.allreduce(x, "avg")
            same = (average == x) | (torch.isnan(average) & torch.isnan(x))
            assert same.all(), (dtype, x[~same][:5], average[~same][:5])

    ranks(2, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", (2, 3, 8))
def test_nan_and_infinity(ranks, size):
    def check(comm, _):
        for dtype, whose, count in itertools.product(FLOATS, {0, size // 2, size - 1}, (37, 5000)):
            mine = comm.rank == whose
            kind = getattr(torch, dtype)
            x = torch.full((count,), float(comm.rank), dtype=kind)
            if mine:
                x[::2] = float("nan")
            for op in ("min", "max", "sum", "prod", "avg"):
                result = comm.allreduce(x, op)
                assert torch.isnan(result[::2]).all(), (dtype, whose, op)
                assert not torch.isnan(result[1::2]).any(), (dtype, whose, op)
            x = torch.full((count,), float("inf") if mine else -1.0, dtype=kind)
            assert (comm.allreduce(x) == float("inf")).all()
            assert (comm.allreduce(x, "max") == float("inf")).all()
            assert (comm.allreduce(x, "min") == -1).all()
            assert (comm.allreduce(-x, "min") == -float("inf")).all()
            x = torch.full((count,), float("inf") if mine else -float("inf"), dtype=kind)
            assert torch.isnan(comm.allreduce(x)).all()

    ranks(size, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", (2, 3, 8))
def test_even_nan_and_zero_have_the_same_bits_everywhere(ranks, size):
    def bits(comm, _):
        results = []
        for dtype, count in itertools.product(
            ("float64", "float32", "float16", "bfloat16"), (1, 19, 20011)
        ):
            integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[item_bytes(dtype)]
            x = torch.full((count,), float("nan"), dtype=getattr(torch, dtype))
            x.view(integers)[:] ^= comm.rank + 1  # another payload on each rank
            x[1::3] = -0.0 if comm.rank % 2 else 0.0
            x[2::3] = float("inf") if comm.rank % 2 else -float("inf")
            results += [
                bits_of(comm.allreduce(x, op)) for op in ("sum", "avg", "min", "max", "prod")
            ]
        return results

    first = ranks(size, with_each(ALGORITHMS, bits))
    assert all(other == first[0] for other in first)


def test_sums_of_negative_zeros_are_negative(ranks):
    def check(comm, _):
        for dtype, count in itertools.product(FLOATS, (1, 1000, 70000)):
            x = torch.full((count,), -0.0, dtype=getattr(torch, dtype))
            for op in ("sum", "avg", "min", "max"):
                assert torch.signbit(comm.allreduce(x, op)).all(), (dtype, op)

    ranks(3, with_each(ALGORITHMS, check))


# By hand, not by the reference: per rank, op, and the result.
INTEGER_CASES = [
    ("int8", [100, 100], "sum", -56),
    ("int8", [100, 100], "avg", -28),  # the sum wraps, then is divided
    ("int8", [-128, -128, -1], "sum", -1),
    ("int8", [-4, -3], "avg", -3),  # toward zero: not -4
    ("int8", [4, 3], "avg", 3),
    ("int8", [-1, 0], "avg", 0),
    ("int8", [16, 16], "prod", 0),
    ("int8", [-128, -1], "prod", -128),
    ("int8", [-128, 127], "min", -128),
    ("uint8", [200, 100], "sum", 44),
    ("uint8", [200, 100], "avg", 22),
    ("uint8", [200, 100], "max", 200),
    ("uint8", [255, 255, 255], "prod", 255),
    ("int16", [32767, 1], "sum", -32768),
    ("int16", [-5, -6], "avg", -5),
    ("int32", [2**31 - 1, 1], "sum", -(2**31)),
    ("int32", [2**16, 2**16], "prod", 0),
    ("int32", [-(2**31), -(2**31) + 1], "max", -(2**31) + 1),
    ("int64", [2**63 - 1, 1], "sum", -(2**63)),
    ("int64", [2**62, 2**62], "avg", -(2**62)),
    ("int64", [-(2**63), 2**63 - 1], "avg", 0),
    ("int64", [2**53 + 1, 0, 0], "sum", 2**53 + 1),  # more than a double holds
    ("int64", [3 * 10**18, 5], "prod", 15 * 10**18 - 2**64),
    ("bool", [True, False], "sum", True),
    ("bool", [True, True], "sum", True),
    ("bool", [True, False], "max", True),
    ("bool", [True, False], "prod", False),
    ("bool", [True, False], "min", False),
    ("bool", [True, True], "min", True),
]


def test_integers(ranks):
    def check(comm, _):
        for (dtype, values, op, result), count in itertools.product(INTEGER_CASES, (1, 133, 9001)):
            if len(values) != comm.size:
                continue
            x = np.full(count, values[comm.rank], dtype)
            assert (comm.allreduce(x, op) == result).all(), (dtype, values, op, count)
            x = torch.full((count,), values[comm.rank], dtype=getattr(torch, dtype))
            assert (comm.allreduce_(x, op) == result).all(), (dtype, values, op, count)

    ranks(2, with_each(ALGORITHMS, check))
    ranks(3, with_each(ALGORITHMS, check))


@pytest.mark.parametrize("size", (1, 2, 5))
def test_any_byte_but_zero_is_true(ranks, size):
    """Bytes that no comparison made, as in a view of other memory."""

    def check(comm, _):
        row = np.array([0, 1, 2, 128, 255, 0, 64], np.uint8)
        bytes_ = np.resize(np.roll(row, comm.rank), 5000)
        truth = [np.resize(np.roll(row, rank), 5000) != 0 for rank in range(size)]
        for x in (bytes_.view(bool), torch.from_numpy(bytes_.copy()).view(torch.bool)):
            for op in ("sum", "max", "min", "prod"):
                result = comm.allreduce(x, op)
                assert_equal(result, reduced(truth, op, "bool"), op)
                if size > 1:
                    assert set(bits_of(result)) <= {0, 1}, op

    ranks(size, with_each(ALGORITHMS, check))


def test_flushed_denormals_do_not_change_16_bit_numbers(ranks):
    def check(comm):
        if not torch.set_flush_denormal(True):
            return
        try:
            x = torch.full((100,), 1, dtype=torch.int16).view(torch.float16)  # the smallest
            assert bits_of(comm.allreduce(x, "max")) == bits_of(x)
        finally:
            torch.set_flush_denormal(False)

    ranks(2, check)


def test_dtype_names_of_numpy_and_torch_mean_the_same(ranks):
    def check(comm):
        for dtype in (
            "float64",
            "float32",
            "float16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
        ):
            x = np.ones(3, numpy_dtype(dtype))
            sums = comm.allreduce(x) if comm.rank else comm.allreduce(make("torch", x, dtype))
            assert values_of(sums).tolist() == [1 if dtype == "bool" else 2] * 3
        # Names that are the same type under another letter.
        assert comm.allreduce(np.ones(2, np.longlong)).tolist() == [2, 2]
        assert comm.allreduce(np.ones(2, "l")).tolist() == [2, 2]

    ranks(2, check)
