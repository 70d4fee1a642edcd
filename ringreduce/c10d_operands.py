"""What torch passes to a process group, and what comes back, in the terms of a Communicator.

Options with the op, the root and whether the caller waits; tensors in lists of lists; dtypes that
only travel. The calls themselves are in c10d_group.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringreduce import _core
from ringreduce.c10d_work import Waitable
from ringreduce.errors import MismatchError
from ringreduce.work import Work

ReduceOp = dist.ReduceOp
OPS = (
    (ReduceOp.SUM, "sum"),
    (ReduceOp.AVG, "avg"),
    (ReduceOp.PRODUCT, "prod"),
    (ReduceOp.MIN, "min"),
    (ReduceOp.MAX, "max"),
)
# Of integers and truth values. They come of an allgather, so their names are our own.
BITWISE = {
    "band": (ReduceOp.BAND, torch.bitwise_and),
    "bor": (ReduceOp.BOR, torch.bitwise_or),
    "bxor": (ReduceOp.BXOR, torch.bitwise_xor),
}
DTYPES = {getattr(torch, name) for name in _core.DTYPES}
# Where values are only moved, any dtype will do, as one of the same size.
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

Gathered = tuple[Tensor, list[int]]  # of all ranks, flat; and how many elements each gave


def waitable(started: Any, asynchronous: bool) -> Waitable:
    """The Work of an asynchronous call; one that is over, with its result, of any other."""
    return started if asynchronous else Work((), started)


def is_asynchronous(opts: Any) -> bool:
    """Older torch does not say, and waits anyway."""
    return bool(getattr(opts, "asyncOp", True))


def root_of(opts: Any, default: int = 0) -> int:
    """Of a call with options, or with the rank itself in their place."""
    return opts if isinstance(opts, int) else int(getattr(opts, "rootRank", default))


def factor_and_op(opts: Any) -> tuple[Any, str]:
    """The factor of PREMUL_SUM, else None; and our name of the op. opts: options, op, or None."""
    op = getattr(opts, "reduceOp", opts)
    if op is None or isinstance(op, int):
        return None, "sum"
    for known, name in (*OPS, *((known, name) for name, (known, _) in BITWISE.items())):
        if op == known:
            return None, name
    if op == ReduceOp.PREMUL_SUM:
        return op.__getstate__()[1], "sum"  # as pickle sees it: torch 2.6 has no other name
    raise ValueError(f"the ringreduce backend has no op {op}")


def op_of(opts: Any, xs: Sequence[Tensor]) -> str:
    """Our name of the op, the factor of PREMUL_SUM being applied to the tensors."""
    factor, name = factor_and_op(opts)
    if factor is not None:
        with torch.no_grad():
            for x in xs:
                x.mul_(factor)
    return name


def combine_bits(op: str, gathered: Gathered, size: int) -> Tensor:
    """What the ranks gave, equally many elements each, combined bit by bit in rank order."""
    rows = equal_parts(gathered, size).view(size, -1) if sum(gathered[1]) else gathered[0][None]
    return functools.reduce(BITWISE[op][1], rows.unbind())


def list_of(xs: Any) -> list[Tensor]:
    return [xs] if isinstance(xs, Tensor) else list(xs)


def single(xs: Any) -> Tensor:
    """torch passes lists of one tensor: one for each device of a rank, of which there is one."""
    xs = list_of(xs)
    if len(xs) != 1:
        raise ValueError(f"expected one tensor, not {len(xs)}")
    return xs[0]


def inner(xs: Any) -> list[Tensor]:
    """The list in a list of one list, or a list itself."""
    if len(xs) == 1 and not isinstance(xs[0], Tensor):
        return list(xs[0])
    return list(xs)


def carried(x: Tensor) -> Tensor:
    """x as a tensor of a dtype that we know, on the same memory."""
    return x if x.dtype in DTYPES else x.view(CARRIERS[x.dtype.itemsize])


def check_parts(what: str, whole: Tensor, part: Tensor, size: int) -> None:
    """Local: raises TypeError or ValueError unless whole holds such a part of each rank."""
    if whole.dtype != part.dtype:
        raise TypeError(f"{what} from or to {whole.dtype}, but this rank's part is {part.dtype}")
    if whole.numel() != size * part.numel():
        raise ValueError(
            f"{what} of {part.numel()} elements for each of {size} ranks needs a tensor of "
            f"{size * part.numel()} elements for all, not {whole.numel()}"
        )


def split_rows(tensor: Tensor, sizes: Sequence[int], size: int) -> list[Tensor]:
    """Of dimension 0, for each rank: so many rows, or equally many where no sizes are given."""
    rows = tensor.shape[0]
    if sizes and (len(sizes) != size or sum(sizes) != rows or min(sizes) < 0):
        raise ValueError(f"split sizes {list(sizes)} do not part {rows} rows among {size} ranks")
    if not sizes and rows % size:
        raise ValueError(f"{rows} rows cannot be split evenly over {size} ranks: give split sizes")
    return list(tensor.split(list(sizes or [rows // size] * size)))


def equal_parts(gathered: Gathered, size: int) -> Tensor:
    whole, counts = gathered
    if counts != [len(whole) // size] * size:
        raise MismatchError(f"the ranks gave {counts} elements: they must give equally many")
    return whole


def fill(outputs: Sequence[Tensor], gathered: Gathered) -> None:
    whole, counts = gathered
    expected = [x.numel() for x in outputs]
    if counts != expected:
        raise MismatchError(f"the ranks sent {counts} elements, but the outputs take {expected}")
    for output, part in zip(outputs, whole.split(counts), strict=True):
        output.copy_(part.view(output.shape))
