"""The simulator as Python sees it: results against numpy, counts against the formulas, errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ringreduce import _core

Array = npt.NDArray[np.generic]

ALLREDUCES = (
    *("ring_allreduce", "tree_allreduce", "one_shot", "two_shot"),
    *("doubling_allreduce", "staged_allreduce"),
)
SIZES = (1, 2, 3, 5, 8, 64)


def messages(size: int, count: int, dtype: str = "int64") -> Array:
    """(size, count) small whole numbers: sums and products of few are exact in every dtype."""
    return np.random.default_rng(size * 1000 + count).integers(-4, 5, (size, count)).astype(dtype)


def simulate(
    algorithm: str, inputs: Array, op: str = "sum", chunk: int = 4, **options: Any
) -> dict[str, Any]:
    """_core.simulate, but for elements instead of bytes."""
    size, count = inputs.shape
    as_bytes = np.ascontiguousarray(inputs).view(np.uint8).reshape(size, -1)
    dtype = _core.DTYPES[inputs.dtype.name]
    result = _core.simulate(algorithm, as_bytes, dtype, _core.OPS[op], chunk, **options)
    result["outputs"] = result["outputs"].view(inputs.dtype).reshape(size, count)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", ALLREDUCES)
def test_allreduce(algorithm: str, size: int) -> None:
    for count in (0, 1, size - 1, size, size + 1, 3, 4, 5, 97):
        inputs = messages(size, count)
        for claims in (False, True):
            result = simulate(algorithm, inputs, claims=claims)
            assert np.array_equal(result["outputs"], np.tile(inputs.sum(axis=0), (size, 1)))


@pytest.mark.parametrize("algorithm", ALLREDUCES)
@pytest.mark.parametrize(
    ("op", "dtype", "reduced"),
    [
        ("max", "int8", lambda x: x.max(axis=0)),
        ("min", "float16", lambda x: x.min(axis=0)),
        ("prod", "float64", lambda x: x.prod(axis=0)),
        ("avg", "float32", lambda x: x.sum(axis=0) / np.float32(7)),
        ("sum", "complex64", lambda x: x.sum(axis=0)),
    ],
)
def test_ops_and_dtypes(
    algorithm: str, op: str, dtype: str, reduced: Callable[[Array], Array]
) -> None:
    inputs = messages(7, 50, dtype)
    assert np.array_equal(
        simulate(algorithm, inputs, op)["outputs"], np.tile(reduced(inputs), (7, 1))
    )


@pytest.mark.parametrize("kind", ["ring", "staged"])
def test_uneven_blocks(kind: str) -> None:
    lengths = [3, 0, 11, 1, 6]
    inputs = messages(5, sum(lengths))
    ends = np.cumsum(lengths)
    gathered = simulate(f"{kind}_allgather", inputs, lengths=lengths)["outputs"]
    scattered = simulate(f"{kind}_reduce_scatter", inputs, lengths=lengths)["outputs"]
    for rank, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        block = slice(end - length, end)
        assert np.array_equal(gathered[:, block], np.tile(inputs[rank, block], (5, 1)))
        assert np.array_equal(scattered[rank, block], inputs[:, block].sum(axis=0))


@pytest.mark.parametrize("algorithm", ALLREDUCES[:5])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_counts_and_costs(algorithm: str, dtype: str) -> None:
    result = simulate(algorithm, messages(16, 256, dtype), alpha_s=1.0)
    for rank, cost in zip(result["ranks"], result["costs"], strict=True):
        fetched = rank["bytes_received"] if algorithm in ("one_shot", "two_shot") else 0
        assert rank["bytes_sent"] + fetched == cost["moved_bytes"]
        assert rank["finish_s"] <= result["finish_s"] == cost["steps"]
    assert max(rank["finish_s"] for rank in result["ranks"]) == result["finish_s"]


def test_textbook() -> None:
    """16 ranks, 256 elements in chunks of 4: each number as the head of cost.h gives it."""
    count, size, chunk, item = 256, 16, 4, 8
    steps = {
        "one_shot": 1,
        "two_shot": 2,
        "ring_allreduce": 2 * 15 * 4,
        "tree_allreduce": 2 * 4 + 31,
    }
    moved = {"one_shot": 15 * count, "two_shot": 2 * 15 * 16, "ring_allreduce": 2 * 15 * 16}
    moved["tree_allreduce"] = 2 * count
    for algorithm, expected in steps.items():
        result = simulate(algorithm, messages(size, count), chunk=chunk)
        assert result["finish_s"] == expected
        assert max(cost["moved_bytes"] for cost in result["costs"]) == moved[algorithm] * item


@pytest.mark.parametrize("algorithm", ALLREDUCES)
def test_timing_changes_no_bit(algorithm: str) -> None:
    inputs = np.random.default_rng(1).standard_normal((13, 211)).astype(np.float32)
    first = simulate(algorithm, inputs)["outputs"]
    assert (first == first[0]).all()
    for seed in range(10):
        options: dict[str, Any] = {
            "random_order": True,
            "max_delay_s": 7.0,
            "seed": seed,
            "claims": seed % 2 == 1,
        }
        assert np.array_equal(simulate(algorithm, inputs, **options)["outputs"], first)


def test_wrong_arguments() -> None:
    inputs = messages(3, 6)
    with pytest.raises(ValueError, match="no algorithm"):
        simulate("snail", inputs)
    with pytest.raises(ValueError, match="chunk"):
        simulate("ring_allreduce", inputs, chunk=0)
    with pytest.raises(ValueError, match="slot"):
        simulate("ring_allreduce", inputs, slots=0)
    with pytest.raises(ValueError, match="max is not defined for complex64"):
        simulate("ring_allreduce", inputs.astype(np.complex64), "max")
    with pytest.raises(ValueError, match="lengths"):
        simulate("ring_allreduce", inputs, lengths=[6, 1, 0])
    with pytest.raises(ValueError, match="whole elements"):
        _core.simulate("ring_allreduce", np.zeros((2, 7), np.uint8), _core.DTYPES["float32"], 0, 1)
    with pytest.raises(ValueError, match="at least one rank"):
        _core.simulate("ring_allreduce", np.zeros((0, 8), np.uint8), _core.DTYPES["int64"], 0, 1)
    with pytest.raises(ValueError, match="op"):
        _core.simulate("ring_allreduce", np.zeros((2, 8), np.uint8), _core.DTYPES["int64"], 9, 1)
