"""Every collective, algorithm, dtype and op on a GPU: exact, at any count and alignment."""

from __future__ import annotations

import functools
import hashlib
import itertools

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
    make,
    ops_of,
    reduced,
    share,
)

from ringreduce.testing import run_threads

pytestmark = pytest.mark.cuda

COUNTS = (1, 3, 257, 4099, 50_021)
GUARD = 7  # what lies around a tensor, in elements, and must stay as it is
KINDS = ("allreduce", "in place", "reduce_scatter", "allgather", "broadcast", "reduce")
CASES = [
    (dtype, op, count, kind)
    for dtype in DTYPES
    for op in ops_of(dtype)
    for count in COUNTS
    for kind in KINDS
]


@functools.lru_cache(maxsize=4)
def operands(dtype: str, op: str, count: int, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Of all ranks, whose threads share them, and what they give."""
    inputs = [exact_values((count,), dtype, op, rank) for rank in range(size)]
    return inputs, reduced(inputs, op, dtype)


def inside(values: np.ndarray, dtype: str, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values on the GPU, in the midst of other memory, off any alignment; and all of it."""
    data = make("torch", values, dtype)
    whole = torch.ones(GUARD + offset + data.numel() + GUARD, dtype=data.dtype, device="cuda")
    x = whole[GUARD + offset :][: data.numel()].view(data.shape)
    x.copy_(data)
    return x, whole


def assert_guards(x: torch.Tensor, whole: torch.Tensor, case: object) -> None:
    begin = x.storage_offset()
    edges = torch.cat([whole[:begin], whole[begin + x.numel() :]])
    assert bool((edges == 1).all()), case


def collective(comm, kind, x, op):
    """What it gives on this rank."""
    if kind == "in place":
        assert comm.allreduce_(x, op) is x
        return x
    if kind == "broadcast":
        return comm.broadcast_(x, comm.size - 1)
    if kind == "reduce":
        return comm.reduce(x, op, comm.size // 2)
    if kind == "allgather":
        return comm.allgather(x[: len(x) - comm.rank] if len(x) > comm.rank else x)
    return getattr(comm, kind)(x, op)


def expected(kind, inputs, total, rank):
    size = len(inputs)
    if kind == "broadcast":
        return inputs[-1]
    if kind == "reduce":
        return total if rank == size // 2 else None
    if kind == "reduce_scatter":
        return np.array_split(total, size)[rank]
    if kind == "allgather":
        return np.concatenate(
            [y[: len(y) - other] if len(y) > other else y for other, y in enumerate(inputs)]
        )
    return total


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_exact(algorithm, size):
    """A share of all cases for each algorithm and number of ranks, another one for each."""
    cases = share(CASES, 0.1, algorithm, size)

    def run(comm):
        for number, case in enumerate(cases):
            dtype, op, count, kind = case
            inputs, total = operands(dtype, op, count, comm.size)
            x, whole = inside(inputs[comm.rank], dtype, (number + comm.rank) % 4)
            result = collective(comm, kind, x, op)
            wanted = expected(kind, inputs, total, comm.rank)
            assert (result is None) == (wanted is None), case
            if result is not None:
                assert result.is_cuda
                assert_equal(result.cpu(), wanted, (*case, comm.rank))
            assert_guards(x, whole, case)
        comm.check()

    run_threads(size, run, algorithm=algorithm, timeout=60.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_message_larger_than_all_staging(algorithm):
    count = 12_000_007

    def run(comm):
        x = torch.arange(count, device="cuda", dtype=torch.int32) * (comm.rank + 1)
        total = torch.arange(count, device="cuda", dtype=torch.int32) * 10
        assert torch.equal(comm.allreduce(x), total)
        parts = total.tensor_split(comm.size)
        assert torch.equal(comm.reduce_scatter(x), parts[comm.rank])
        assert torch.equal(comm.allgather(parts[comm.rank].clone()), total)
        y = x if comm.rank == 2 else torch.empty_like(x)
        assert torch.equal(
            comm.broadcast_(y, 2), torch.arange(count, device="cuda", dtype=torch.int32) * 3
        )

    run_threads(4, run, algorithm=algorithm, timeout=60.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_bits_on_all_ranks_and_in_all_runs(algorithm, dtype):
    def run(comm):
        digests = []
        for count in (100, 70_001, 1_000_003):
            values = generator(count, comm.rank).standard_normal(count)
            for offset in (0, 1):
                x, _ = inside(values, dtype, offset if algorithm in ("one_shot", "two_shot") else 0)
                digests.append(hashlib.sha256(bits_of(comm.allreduce_(x).cpu())).hexdigest())
        if algorithm in ("one_shot", "two_shot"):  # rank order, wherever the tensor lies
            assert digests[::2] == digests[1::2]
        return digests

    first = run_threads(3, run, algorithm=algorithm)
    again = run_threads(3, run, algorithm=algorithm)
    assert first[0] == first[1] == first[2] == again[0] == again[1] == again[2]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_the_same_bits_as_on_the_cpu(algorithm):
    def run(comm):
        for dtype, op, count in itertools.product(
            ("float32", "float16", "bfloat16", "float64"), ("sum", "avg", "prod"), (33, 5003)
        ):
            values = generator(count, comm.rank, op).standard_normal(count)
            x = make("torch", values, dtype)
            on_gpu = comm.allreduce(x.cuda(), op)
            assert bits_of(on_gpu.cpu()) == bits_of(comm.allreduce(x, op)), (dtype, op, count)

    run_threads(3, run, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_and_infinity(algorithm):
    nan, inf = float("nan"), float("inf")

    def run(comm):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            x = torch.ones(1001, dtype=dtype, device="cuda")
            x[comm.rank] = nan
            x[100 + comm.rank :: 100] = inf if comm.rank else -inf
            for op in ("min", "max", "sum", "prod", "avg"):
                result = comm.allreduce(x, op)
                assert result[: comm.size].isnan().all(), (dtype, op)
                assert not result[comm.size : 100].isnan().any(), (dtype, op)
            assert comm.allreduce(x, "min")[100] == -inf and comm.allreduce(x, "max")[101] == inf

    run_threads(3, run, algorithm=algorithm)


def test_no_elements_and_one_rank():
    def run(comm):
        assert comm.allreduce(torch.empty(0, 3, device="cuda")).shape == (0, 3)
        assert comm.allgather(torch.empty(0, 3, device="cuda")).shape == (0, 3)
        x = torch.full((), 2.0, device="cuda")
        assert comm.allreduce(x).item() == 2.0 * comm.size
        assert comm.allgather(x).tolist() == [2.0] * comm.size
        assert comm.reduce_scatter(torch.ones(2, 5, device="cuda")).shape[1] == 5
        y = comm.broadcast(x)
        assert y.data_ptr() != x.data_ptr() and y.item() == 2.0
        comm.check()

    for size in (1, 2, 5):
        run_threads(size, run)
