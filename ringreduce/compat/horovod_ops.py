"""The collectives of horovod.torch: averages by default, handles, gradients through every one.

How calls meet is in horovod_meeting.py. As there, the gradients of all but sums are averages over
the ranks, whatever the loss of each rank is meant to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringreduce.compat.horovod_types import (
    Adasum,
    Average,
    Compression,
    ProcessSet,
    Sum,
    global_process_set,
)
from ringreduce.work import Work

# As there, where calls start and end in such cycles: programs take a poll that is true at once for
# that of a call that is not asynchronous.
CYCLE_S = 1e-3


class Handle:
    """What asynchronous calls return, for `poll` and `synchronize`. Operands stay alive."""

    def __init__(self, works: Sequence[Work], finish: Callable[[list[Any]], Any]) -> None:
        self._works = works
        self._visible_s = time.monotonic() + CYCLE_S  # from when on it may be seen to have ended
        self._finish: Callable[[list[Any]], Any] | None = finish
        self._result: Any = None

    def done(self) -> bool:
        if self._finish is None:
            return True
        return time.monotonic() >= self._visible_s and all(work.done() for work in self._works)

    def wait(self) -> Any:
        results = [work.wait() for work in self._works]
        if self._finish is not None:
            with torch.no_grad():
                self._result = self._finish(results)
            self._finish = None
        return self._result


def poll(handle: Handle) -> bool:
    """Whether synchronize would return at once. Never true within a millisecond of the call."""
    return handle.done()


def synchronize(handle: Handle) -> Any:
    """Waits for an asynchronous call and returns what the synchronous one would."""
    return handle.wait()


def check_op(op: str | None, average: bool | None = None) -> str:
    """The op of a call, of which older scripts only say whether it averages."""
    if average is not None:
        if op is not None:
            raise ValueError("give op or average, not both")
        op = Average if average else Sum
    if op == Adasum:
        raise NotImplementedError("ringreduce has no Adasum: use Average")
    return Average if op is None else op


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Integers are rounded toward zero."""
    if factor == 1.0:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * factor
    return (tensor.double() * factor).to(tensor.dtype)


def _compressed(
    compression: Any,
    tensors: Sequence[Tensor],
    reduce: Callable[[list[Tensor]], Sequence[Tensor]],
) -> list[Tensor]:
    packed = [compression.compress(x) for x in tensors]
    reduced = reduce([x for x, _ in packed])
    return [
        compression.decompress(x, context) for x, (_, context) in zip(reduced, packed, strict=True)
    ]


# ---- allreduce


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    op = check_op(op, average)
    inputs = [scaled(x.detach(), prescale_factor) for x in tensors]
    work = process_set.named(name).grouped_allreduce(inputs, op, async_op=True)
    return Handle([work], lambda results: [scaled(x, postscale_factor) for x in results[0]])


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    op = check_op(op, average)
    with torch.no_grad():
        for x in tensors:
            if prescale_factor != 1.0:
                x.copy_(scaled(x, prescale_factor))
    work = process_set.named(name).grouped_allreduce_(list(tensors), op, async_op=True)

    def finish(results: list[Any]) -> list[Tensor]:
        for x in results[0]:
            if postscale_factor != 1.0:
                x.copy_(scaled(x, postscale_factor))
        return results[0]

    return Handle([work], finish)


def allreduce_async(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    """Arguments as of grouped_allreduce_async."""
    return _only(grouped_allreduce_async([tensor], *args, **kwargs))


def allreduce_async_(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    return _only(grouped_allreduce_async_([tensor], *args, **kwargs))


def allreduce_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return allreduce_async_(tensor, *args, **kwargs).wait()


def grouped_allreduce_(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    return grouped_allreduce_async_(tensors, *args, **kwargs).wait()


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, options: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        return tuple(grouped_allreduce_async(tensors, None, name, *options).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *grouped_allreduce_async(grads, None, None, *ctx.options).wait()


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """The averages, by default, as new tensors."""
    options = (check_op(op, average), prescale_factor, postscale_factor, process_set)
    return _compressed(compression, tensors, lambda xs: _Allreduce.apply(name, options, *xs))


def allreduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The average, by default, as a new tensor. Arguments as of grouped_allreduce."""
    return grouped_allreduce([tensor], *args, **kwargs)[0]


def sparse_allreduce_async(
    tensor: Tensor, name: str, op: str, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Sum or average of sparse tensors. Returns what is to be called for the result."""
    if op not in (Average, Sum):
        raise ValueError(f"sparse tensors can be summed and averaged: {op} needs dense ones")
    comm = process_set.named(name)
    own = tensor.detach().coalesce()
    works = [
        comm.allgather(x.contiguous(), async_op=True) for x in (own.indices().t(), own.values())
    ]

    def result() -> Tensor:
        indices, values = (work.wait() for work in works)
        if op == Average:
            values = values / process_set.size()
        return torch.sparse_coo_tensor(indices.t(), values, own.shape).coalesce()

    return result


# ---- allgather


def grouped_allgather_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    comm = process_set.named(name)
    works = [comm.allgather(x.detach(), async_op=True) for x in tensors]
    return Handle(works, lambda results: results)


def allgather_async(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    return _only(grouped_allgather_async([tensor], *args, **kwargs))


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.process_set = process_set
        ctx.shapes = [x.shape for x in tensors]
        return tuple(grouped_allgather_async(tensors, name, process_set).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm = ctx.process_set.named(None)
        rows = [shape[0] if shape else 1 for shape in ctx.shapes]
        table = comm.allgather(torch.tensor([rows])).view(comm.size, -1)
        found = []
        for i, grad in enumerate(comm.grouped_allreduce(grads, Average)):
            begin = int(table[: comm.rank, i].sum())
            found.append(grad[begin : begin + rows[i]].reshape(ctx.shapes[i]))
        return None, None, *found


def grouped_allgather(
    tensors: Sequence[Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    return list(_Allgather.apply(name, process_set, *tensors))


def allgather(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """All ranks' tensors joined along dimension 0, in which they may differ."""
    return _Allgather.apply(name, process_set, tensor)[0]


# ---- broadcast. root_rank is a rank of the world.


def broadcast_async(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    root = process_set.rank_of(root_rank)
    work = process_set.named(name).broadcast(tensor.detach(), root, async_op=True)
    return Handle([work], lambda results: results[0])


def broadcast_async_(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    root = process_set.rank_of(root_rank)
    work = process_set.named(name).broadcast_(tensor, root, async_op=True)
    return Handle([work], lambda results: results[0])


def broadcast_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return broadcast_async_(tensor, *args, **kwargs).wait()


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> Tensor:
        ctx.root, ctx.process_set = process_set.rank_of(root_rank), process_set
        return broadcast_async(tensor, root_rank, name, process_set).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        comm = ctx.process_set.named(None)
        mean = comm.allreduce(grads[0], Average)
        return mean if comm.rank == ctx.root else torch.zeros_like(mean), None, None, None


def broadcast(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    return _Broadcast.apply(tensor, root_rank, name, process_set)


# ---- reducescatter


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    op, comm = check_op(op), process_set.named(name)
    works = [
        comm.reduce_scatter(scaled(x.detach(), prescale_factor), op, async_op=True) for x in tensors
    ]
    return Handle(works, lambda results: [scaled(x, postscale_factor) for x in results])


def reducescatter_async(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    return _only(grouped_reducescatter_async([tensor], *args, **kwargs))


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, options: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        return tuple(grouped_reducescatter_async(tensors, name, *options).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op, process_set, prescale_factor, postscale_factor = ctx.options
        factor = prescale_factor * postscale_factor
        if op == Sum:
            factor *= process_set.size()
        scaled_grads = [scaled(grad, factor) for grad in grads]
        return None, None, *grouped_allgather_async(scaled_grads, None, process_set).wait()


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: str | None = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    options = (check_op(op), process_set, prescale_factor, postscale_factor)
    return _compressed(compression, tensors, lambda xs: _Reducescatter.apply(name, options, *xs))


def reducescatter(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """This rank's rows of the average: the first ranks get one more where they do not divide."""
    return grouped_reducescatter([tensor], *args, **kwargs)[0]


# ---- alltoall: everyone gets everything and keeps its part.


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    comm = process_set.named(name)
    rows = _splits(tensor, splits, comm.size)
    works = [comm.allgather(x, async_op=True) for x in (torch.tensor([rows]), tensor.detach())]

    def finish(results: list[Any]) -> Any:
        table, everything = results
        mine, begin = [], 0
        for row in table:
            skipped = begin + int(row[: comm.rank].sum())
            mine.append(everything[skipped : skipped + int(row[comm.rank])])
            begin += int(row.sum())
        received = table[:, comm.rank].to(torch.int32)
        return torch.cat(mine) if splits is None else (torch.cat(mine), received)

    return Handle(works, finish)


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, rows: list[int], name: str | None, process_set: ProcessSet
    ) -> Any:
        output, received = alltoall_async(tensor, rows, name, process_set).wait()
        ctx.process_set, ctx.received = process_set, received.tolist()
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = alltoall_async(grads[0], ctx.received, None, ctx.process_set).wait()
        return grad, None, None, None


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """What the ranks have for this one, joined along dimension 0.

    splits: rows for each rank, in equal parts where not given. With splits returns the rows that
    came from each rank, too.
    """
    rows = _splits(tensor, splits, process_set.size())
    output, received = _Alltoall.apply(tensor, rows, name, process_set)
    return output if splits is None else (output, received)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    process_set.named(None).barrier()


def _only(handle: Handle) -> Handle:
    """The handle of one tensor, from that of a list of one."""
    return Handle([_Adapted(handle)], lambda results: results[0][0])  # type: ignore[list-item]


class _Adapted:
    """A handle where a Work is expected."""

    def __init__(self, handle: Handle) -> None:
        self.wait, self.done = handle.wait, handle.done


def _splits(tensor: Tensor, splits: Tensor | Sequence[int] | None, size: int) -> list[int]:
    if splits is None:
        if tensor.shape[0] % size:
            raise ValueError(f"alltoall cannot split {tensor.shape[0]} rows evenly: give splits")
        return [tensor.shape[0] // size] * size
    rows = [int(n) for n in splits]
    if len(rows) != size or sum(rows) != tensor.shape[0] or min(rows) < 0:
        raise ValueError(f"splits {rows} do not part {tensor.shape[0]} rows among {size} ranks")
    return rows
