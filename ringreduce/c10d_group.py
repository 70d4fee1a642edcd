"""The process group of the torch.distributed backend: torch's calls in terms of a Communicator.

allreduce, broadcast, allgather, reduce_scatter, reduce and barrier are our own collectives. gather,
scatter and all_to_all are built on them, plainly: every rank receives everything and keeps its
part. How groups are made is in c10d.py, how they are waited for in c10d_work.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringreduce import _core
from ringreduce.c10d_channels import Channels, Counts
from ringreduce.c10d_work import Callbacks, GroupWork, Together, Waitable
from ringreduce.communicator import Communicator
from ringreduce.errors import MismatchError
from ringreduce.work import Work

# Its overloads cannot be typed twice.
_ProcessGroup: Any = dist.ProcessGroup
ReduceOp = dist.ReduceOp
OPS = (
    (ReduceOp.SUM, "sum"),
    (ReduceOp.AVG, "avg"),
    (ReduceOp.PRODUCT, "prod"),
    (ReduceOp.MIN, "min"),
    (ReduceOp.MAX, "max"),
)
DTYPES = {getattr(torch, name) for name in _core.DTYPES}
# Where values are only moved, any dtype will do, as one of the same size.
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

Open = Callable[[str, int, int], Communicator]  # part of the group, rank, size
Gathered = tuple[Tensor, list[int]]


class ProcessGroup(_ProcessGroup):
    """Ranks 0 to size - 1, as torch.distributed knows them.

    Calls must come in the same order on all ranks, as everywhere. What a callback of a future calls
    is ordered by the callbacks, and runs on a communicator of its own, opened by its first use.
    Raises what the functions of ringreduce raise, from the backward() of a DDP model too.
    """

    # Where torch puts what it sends by itself, as objects. With "cuda" it would look for backends
    # of its own.
    _device_types = property(lambda self: [torch.device("cpu")])

    def __init__(
        self, rank: int, size: int, open_communicator: Open, counts: Counts, timeout_s: float
    ) -> None:
        super().__init__(rank, size)
        self._open = open_communicator
        self._main = open_communicator("", rank, size)
        self._of_callbacks: Communicator | None = None
        self._callbacks = Callbacks()
        self._channels = Channels(rank, size, open_communicator, counts, timeout_s)
        self._name = self._description = ""

    # ---- What torch asks about a group.

    def getBackendName(self) -> str:
        return "ringreduce"

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def shutdown(self) -> None:
        """Local: finishes what is under way, then closes. Raises the error of a lost Work."""
        self._callbacks.close()
        self._channels.close()
        for comm in (self._main, self._of_callbacks):
            if comm is not None and not comm.core.closed:
                try:
                    comm.core.drain(comm.bootstrap.settings.timeout_s)
                finally:
                    comm.close()

    def abort(self) -> None:
        for comm in (self._main, self._of_callbacks):
            if comm is not None:
                comm.core.abort("a torch process group was aborted")

    # ---- Our own collectives.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> GroupWork:
        tensor = _single(tensors)
        if tensor.layout is torch.sparse_coo:
            return self._allreduce_sparse(tensor, opts)
        op = _op(opts, [tensor])
        asynchronous = _asynchronous(opts)
        started = self._comm().allreduce_(tensor, op, async_op=asynchronous)
        return self._work(started, asynchronous, [tensor])

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> GroupWork:
        xs = _list(tensors)
        op, asynchronous = _op(opts, xs), _asynchronous(opts)
        started = self._comm().grouped_allreduce_(xs, op, async_op=asynchronous)
        return self._work(started, asynchronous, xs)

    def broadcast(
        self, tensors: Any, opts: Any = None, timeout: Any = None, root: int = 0
    ) -> GroupWork:
        tensor = _single(tensors)
        asynchronous = _asynchronous(opts)
        started = self._comm().broadcast_(
            _carried(tensor), _root(opts, root), async_op=asynchronous
        )
        return self._work(started, asynchronous, [tensor])

    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None, root: int = 0
    ) -> GroupWork:
        tensor = _single(tensors)
        root, asynchronous = _root(opts, root), _asynchronous(opts)
        factor, name = _factor_and_op(op if op is not None else opts)
        x = tensor.detach() if factor is None else tensor.detach() * factor
        started = self._comm().reduce(x, name, root, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            if results[0] is not None:
                tensor.copy_(results[0])

        return self._work(started, asynchronous, [tensor], finish)

    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        """Tensors of any size from each rank; only their numbers of elements must fit."""
        outputs = _inner(output_tensors)
        started = self._gather(_single(input_tensors), opts)
        return self._finished_by(started, output_tensors, lambda found: _fill(outputs, found))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        for output, x in zip(outputs, inputs, strict=True):
            if output.numel() != self.size() * x.numel():
                raise ValueError(
                    f"the output of an allgather of {x.numel()} elements from {self.size()} ranks "
                    f"must have {self.size() * x.numel()} elements, not {output.numel()}"
                )
        started = [self._gather(x, opts) for x in inputs]

        def finish(results: list[Any]) -> None:
            for output, gathered in zip(outputs, results, strict=True):
                output.copy_(_equal_parts(gathered, self.size()).view(output.shape))

        return GroupWork(started, list(outputs), self._callbacks, finish)

    def allgather_coalesced(
        self, output_lists: Any, input_list: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        """output_lists: for each rank, in its order, a tensor for each input."""
        started = [self._gather(x, opts) for x in input_list]

        def finish(results: list[Any]) -> None:
            for i, gathered in enumerate(results):
                _fill([outputs[i] for outputs in output_lists], gathered)

        return GroupWork(started, output_lists, self._callbacks, finish)

    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        output, inputs = _single(output_tensors), _inner(input_tensors)
        if len(inputs) != self.size():
            raise ValueError(f"reduce_scatter takes {self.size()} inputs, not {len(inputs)}")
        if inputs[self.rank()].numel() != output.numel():
            raise ValueError(
                f"the output has {output.numel()} elements, input {self.rank()} has "
                f"{inputs[self.rank()].numel()}"
            )
        flat = torch.cat([x.detach().reshape(-1) for x in inputs])
        counts = [x.numel() for x in inputs]
        if len(set(counts)) == 1:
            return self.reduce_scatter_single_coalesced([output], [flat], opts)
        # Our reduce_scatter splits evenly; parts of any size are cut out of the whole.
        op, asynchronous = _op(opts, [flat]), _asynchronous(opts)
        started = self._comm().allreduce_(flat, op, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            output.copy_(results[0].split(counts)[self.rank()].view(output.shape))

        return self._work(started, asynchronous, [output], finish)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        started: list[Waitable] = []
        factor, op = _factor_and_op(opts)
        asynchronous = _asynchronous(opts)
        for output, x in zip(outputs, inputs, strict=True):
            if x.numel() != self.size() * output.numel():
                raise ValueError(
                    f"the input of a reduce_scatter of {output.numel()} elements to each of "
                    f"{self.size()} ranks must have {self.size() * output.numel()} elements, "
                    f"not {x.numel()}"
                )
        for output, x in zip(outputs, inputs, strict=True):
            rows = x.detach().reshape(self.size(), output.numel())
            rows = rows if factor is None else rows * factor
            result = self._comm().reduce_scatter(rows, op, async_op=asynchronous)
            started.append(_waitable(result, asynchronous))

        def finish(results: list[Any]) -> None:
            for output, row in zip(outputs, results, strict=True):
                output.copy_(row.view(output.shape))

        return GroupWork(started, list(outputs), self._callbacks, finish)

    def barrier(self, opts: Any = None, timeout: Any = None) -> GroupWork:
        asynchronous = _asynchronous(opts)
        return self._work(self._comm().barrier(async_op=asynchronous), asynchronous, [])

    # ---- Built on those.

    def gather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        x = _single(input_tensors)
        started = self._gather(x, opts)
        if self.rank() != _root(opts):
            return GroupWork([started], [x], self._callbacks)
        outputs = _inner(output_tensors)
        return self._finished_by(started, output_tensors, lambda found: _fill(outputs, found))

    def scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        """All parts have the size of the output."""
        output, root = _single(output_tensors), _root(opts)
        asynchronous = _asynchronous(opts)
        if self.rank() == root:
            inputs = _inner(input_tensors)
            if len(inputs) != self.size() or any(x.numel() != output.numel() for x in inputs):
                raise ValueError(f"scatter takes {self.size()} inputs of the output's size")
            rows = torch.stack([x.detach().reshape(-1) for x in inputs])
        else:
            rows = output.new_empty(self.size(), output.numel())
        started = self._comm().broadcast_(_carried(rows), root, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            output.copy_(rows[self.rank()].view(output.shape))

        return self._work(started, asynchronous, [output], finish)

    def alltoall(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        outputs, inputs = _list(output_tensors), _list(input_tensors)
        if not len(outputs) == len(inputs) == self.size():
            raise ValueError(f"all_to_all takes {self.size()} inputs and as many outputs")
        counts = torch.tensor([x.numel() for x in inputs])
        flat = torch.cat([x.detach().reshape(-1) for x in inputs])
        started = [self._gather(counts, opts), self._gather(flat, opts)]

        def finish(results: list[Any]) -> None:
            (rows, row_sizes), (whole, sizes) = results
            mine = [
                part.split(row.tolist())[self.rank()]
                for row, part in zip(rows.split(row_sizes), whole.split(sizes), strict=True)
            ]
            _fill(outputs, (torch.cat(mine), [part.numel() for part in mine]))

        return GroupWork(started, outputs, self._callbacks, finish)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
        timeout: Any = None,
    ) -> GroupWork:
        """Split sizes are of dimension 0; none at all: in equal parts."""
        outputs = self._rows_of(output, output_split_sizes)
        return self.alltoall(outputs, self._rows_of(input, input_split_sizes), opts)

    def send(self, tensors: Any, dst_rank: int, tag: int = 0) -> GroupWork:
        tensor = _single(tensors)
        started = self._channels.send(_carried(tensor), dst_rank, tag)
        return GroupWork([started], [tensor], self._callbacks)

    def recv(self, tensors: Any, src_rank: int, tag: int = 0) -> GroupWork:
        tensor = _single(tensors)
        started = self._channels.receive(_carried(tensor), src_rank, tag)
        return GroupWork([started], [tensor], self._callbacks)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> GroupWork:
        tensor = _single(tensors)
        started = self._channels.receive_any(_carried(tensor), tag)
        return GroupWork([started], [tensor], self._callbacks)

    def _start_coalescing(self, device: Any) -> None:
        """What is called until the end leaves at once, call by call, as always."""
        self._callbacks.coalesced = []

    def _end_coalescing(self, device: Any) -> GroupWork:
        works, self._callbacks.coalesced = self._callbacks.coalesced or [], None
        return GroupWork([Together(works)], [], self._callbacks)

    # The same calls under the names of older torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # ---- Parts of the above.

    def _comm(self) -> Communicator:
        if not self._callbacks.here():
            return self._main
        if self._of_callbacks is None:
            self._of_callbacks = self._open("callbacks", self.rank(), self.size())
        return self._of_callbacks

    def _work(
        self,
        started: Any,
        asynchronous: bool,
        value: list[Any],
        finish: Callable[[list[Any]], None] | None = None,
    ) -> GroupWork:
        return GroupWork([_waitable(started, asynchronous)], value, self._callbacks, finish)

    def _finished_by(
        self, started: Work, value: Any, finish: Callable[[Gathered], None]
    ) -> GroupWork:
        return GroupWork([started], value, self._callbacks, lambda results: finish(results[0]))

    def _gather(self, x: Tensor, opts: Any) -> Work:
        """Its result: what all ranks gave, flat, and the number of elements of each."""
        flat = _carried(x.detach()).reshape(-1)
        work = self._comm().gather_rows(flat, async_op=_asynchronous(opts))

        def result() -> Gathered:
            whole, counts = work.wait()
            return whole.view(x.dtype), counts

        return Work((work,), finish=result)

    def _allreduce_sparse(self, tensor: Tensor, opts: Any) -> GroupWork:
        """The sum of sparse tensors: everyone's entries, in rank order."""
        if _factor_and_op(opts) != (None, "sum"):
            raise ValueError("sparse tensors can be summed, not reduced by another op")
        own = tensor.detach().coalesce()
        started = [self._gather(own.indices().t(), opts), self._gather(own.values(), opts)]

        def finish(results: list[Any]) -> None:
            indices = results[0][0].view(-1, own.sparse_dim()).t()
            values = results[1][0].view(-1, *own.values().shape[1:])
            tensor.copy_(torch.sparse_coo_tensor(indices, values, own.shape).coalesce())

        return GroupWork(started, [tensor], self._callbacks, finish)

    def _rows_of(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if sizes:
            return list(tensor.split(list(sizes)))
        if tensor.shape[0] % self.size():
            raise ValueError(
                f"all_to_all_single cannot split {tensor.shape[0]} rows evenly over {self.size()} "
                "ranks: give the split sizes"
            )
        return list(tensor.chunk(self.size())) if tensor.shape[0] else [tensor] * self.size()


def _waitable(started: Any, asynchronous: bool) -> Waitable:
    """The Work of an asynchronous call; one that is over, with its result, of any other."""
    return started if asynchronous else Work((), started)


def _asynchronous(opts: Any) -> bool:
    """Older torch does not say, and waits anyway."""
    return bool(getattr(opts, "asyncOp", True))


def _root(opts: Any, default: int = 0) -> int:
    """Of a call with options, or with the rank itself in their place."""
    return opts if isinstance(opts, int) else int(getattr(opts, "rootRank", default))


def _factor_and_op(opts: Any) -> tuple[Any, str]:
    """The factor of PREMUL_SUM, else None; and our name of the op. opts: options, op, or None."""
    op = getattr(opts, "reduceOp", opts)
    if op is None or isinstance(op, int):
        return None, "sum"
    for known, name in OPS:
        if op == known:
            return None, name
    if op == ReduceOp.PREMUL_SUM:
        return op.factor, "sum"
    name = next((name for name, x in ReduceOp.RedOpType.__members__.items() if op == x), str(op))
    raise ValueError(
        f"the ringreduce backend has no op {name}: use SUM, AVG, PRODUCT, MIN, MAX or PREMUL_SUM"
    )


def _op(opts: Any, xs: Sequence[Tensor]) -> str:
    """Our name of the op, the factor of PREMUL_SUM being applied to the tensors."""
    factor, name = _factor_and_op(opts)
    if factor is not None:
        with torch.no_grad():
            for x in xs:
                x.mul_(factor)
    return name


def _list(xs: Any) -> list[Tensor]:
    return [xs] if isinstance(xs, Tensor) else list(xs)


def _single(xs: Any) -> Tensor:
    """torch passes lists of one tensor: one for each device of a rank, of which there is one."""
    xs = _list(xs)
    if len(xs) != 1:
        raise ValueError(f"expected one tensor, not {len(xs)}")
    return xs[0]


def _inner(xs: Any) -> list[Tensor]:
    """The list in a list of one list, or a list itself."""
    if len(xs) == 1 and not isinstance(xs[0], Tensor):
        return list(xs[0])
    return list(xs)


def _carried(x: Tensor) -> Tensor:
    """x as a tensor of a dtype that we know, on the same memory."""
    return x if x.dtype in DTYPES else x.view(CARRIERS[x.dtype.itemsize])


def _equal_parts(gathered: Gathered, size: int) -> Tensor:
    whole, counts = gathered
    if counts != [len(whole) // size] * size:
        raise MismatchError(f"the ranks gave {counts} elements: they must give equally many")
    return whole


def _fill(outputs: Sequence[Tensor], gathered: Gathered) -> None:
    whole, counts = gathered
    expected = [x.numel() for x in outputs]
    if counts != expected:
        raise MismatchError(f"the ranks sent {counts} elements, but the outputs take {expected}")
    for output, part in zip(outputs, whole.split(counts), strict=True):
        output.copy_(part.view(output.shape))
