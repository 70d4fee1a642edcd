"""What a collective must give, computed with numpy alone, and operands for which that is exact.

Values are kept in numpy's dtypes, bfloat16 as float32; `make` and `values_of` go to and from the
arrays that the library takes. Starts no ranks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ringreduce.communicator import Communicator

FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
COMPLEX = ("complex64", "complex128")
DTYPES = (*FLOATS, *INTEGERS, "bool", *COMPLEX)
OPS = ("sum", "avg", "min", "max", "prod")
ALGORITHMS = ("auto", "one_shot", "two_shot", "ring", "tree")
SIZES = (1, 2, 3, 5, 8)
FRAMEWORKS = ("torch", "numpy")


def ops_of(dtype: str) -> tuple[str, ...]:
    if dtype == "bool":
        return ("sum", "min", "max", "prod")
    return ("sum", "avg", "prod") if dtype in COMPLEX else OPS


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


def item_bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def generator(*seed: object) -> np.random.Generator:
    """The same numbers in every run: unlike hash(), crc32 knows no seed of the process."""
    return np.random.default_rng(zlib.crc32(repr(seed).encode()))


def share(cases: Iterable, part: float, *setting: object) -> list:
    """A part of the cases, another one for each setting: together they see each case many times."""
    listed = list(cases)
    kept = generator("share", setting).random(len(listed)) < part
    return [case for case, keep in zip(listed, kept, strict=True) if keep]


def exact_values(shape: tuple[int, ...], dtype: str, op: str, seed: object) -> np.ndarray:
    """Numbers that up to 8 ranks combine without rounding in any order; integers wrap around."""
    random = generator(shape, dtype, op, seed)
    kind = numpy_dtype(dtype)
    if dtype == "bool":
        # With 8 ranks an even coin would make nearly every "or" true and every "and" false.
        return random.random(shape) < (0.1 if op in ("sum", "max") else 0.9)
    if dtype in INTEGERS:
        limits = np.iinfo(kind)
        return random.integers(limits.min, limits.max, shape, kind, endpoint=True)
    if op == "prod":
        factors = [1, -1, 2, -0.5] if dtype in FLOATS else [1, -1, 1j, -1j, 1 + 1j, 0.5 - 0.5j]
        return np.asarray(random.choice(factors, shape)).astype(kind)
    values = random.integers(-8, 8, shape, endpoint=True).astype(kind)
    if dtype in COMPLEX:
        values = values + (1j * random.integers(-8, 8, shape, endpoint=True)).astype(kind)
    return np.asarray(values)


def reduced(inputs: list[np.ndarray], op: str, dtype: str) -> np.ndarray:
    """The inputs combined in rank order, with the roundings that the library promises."""
    kind = numpy_dtype(dtype)
    wide = np.dtype("float32") if dtype in ("float16", "bfloat16") else kind
    if dtype == "bool":
        combine = np.logical_or if op in ("sum", "max") else np.logical_and
        return np.asarray(functools.reduce(combine, inputs))
    combine = {"min": np.minimum, "max": np.maximum, "prod": np.multiply}.get(op, np.add)
    with np.errstate(all="ignore"):
        total = np.asarray(functools.reduce(combine, [x.astype(wide) for x in inputs]))
        if op == "avg":
            total = divided(total, len(inputs))
        if dtype == "bfloat16":
            return torch.from_numpy(total.copy()).to(torch.bfloat16).float().numpy()
        return total.astype(kind)


def divided(total: np.ndarray, size: int) -> np.ndarray:
    """One division in total's own type: integers toward zero, complex numbers by parts."""
    if total.dtype.kind == "c":
        parts = np.ascontiguousarray(total).reshape(-1).view(total.real.dtype)
        return (parts / parts.dtype.type(size)).view(total.dtype).reshape(total.shape)
    if total.dtype.kind in "iu":
        wide = total.astype(np.int64)
        return ((wide - np.fmod(wide, size)) // size).astype(total.dtype)
    return np.asarray(total / total.dtype.type(size))


def make(framework: str, values: np.ndarray, dtype: str):
    """A new array of the framework; numpy has no bfloat16."""
    if framework == "numpy":
        return np.array(values, dtype=numpy_dtype(dtype))
    return torch.from_numpy(np.array(values, dtype=numpy_dtype(dtype))).to(getattr(torch, dtype))


def values_of(x) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    x = x.detach()
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def bits_of(x) -> bytes:
    """The elements in logical order, as they are in memory."""
    if isinstance(x, np.ndarray):
        return x.tobytes()
    x = x.detach()
    return (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy().tobytes()


def frameworks_of(dtype: str) -> tuple[str, ...]:
    return ("torch",) if dtype == "bfloat16" else FRAMEWORKS


def assert_equal(x, values: np.ndarray, case: object) -> None:
    """The same shape and numbers; NaN equals NaN, and 0 equals -0."""
    found = values_of(x)
    assert found.shape == values.shape, (case, found.shape, values.shape)
    if not np.array_equal(found, values, equal_nan=values.dtype.kind in "fc"):
        wrong = np.argwhere(~((found == values) | ((found != found) & (values != values))))
        first = tuple(wrong[0])
        raise AssertionError(
            f"{case}: {len(wrong)} of {values.size} wrong, first at {first}: {found[first]!r}, "
            f"expected {values[first]!r}"
        )


def with_each(
    algorithms: Iterable[str], check: Callable[[Communicator, str], Any]
) -> Callable[[Communicator], dict[str, Any]]:
    """For a rank: check(comm, algorithm) with each in turn, since a start of ranks costs the most.

    It returns the results by algorithm.
    """

    def check_all(comm: Communicator) -> dict[str, Any]:
        results = {}
        for algorithm in algorithms:
            part = comm.split(0, algorithm=algorithm)
            assert part is not None
            try:
                results[algorithm] = check(part, algorithm)
            except AssertionError as error:
                raise AssertionError(f"{algorithm}: {error}") from error
            part.close()
        return results

    return check_all


@contextlib.contextmanager
def one_core():
    """Ranks that are started within outnumber the cores, if they are two or more, anywhere."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
