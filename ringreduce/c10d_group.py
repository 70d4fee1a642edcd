"""The process group of the torch.distributed backend: torch's calls in terms of a Communicator.

allreduce, broadcast, allgather, reduce_scatter, reduce and barrier are our own collectives. gather,
scatter and all_to_all are built on them, plainly: every rank receives everything and keeps its
part. How groups are made is in c10d.py, how they are waited for in c10d_work.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringreduce.c10d_barrier import MonitoredBarrier
from ringreduce.c10d_channels import Channels, Counts
from ringreduce.c10d_operands import (
    BITWISE,
    Gathered,
    carried,
    check_parts,
    combine_bits,
    equal_parts,
    factor_and_op,
    fill,
    inner,
    is_asynchronous,
    list_of,
    op_of,
    root_of,
    single,
    split_rows,
    waitable,
)
from ringreduce.c10d_work import Callbacks, GroupWork, Together, Waitable
from ringreduce.communicator import Communicator
from ringreduce.profiling import spanned
from ringreduce.work import Work

# Its overloads cannot be typed twice.
_ProcessGroup: Any = dist.ProcessGroup
Open = Callable[[str, int, int], Communicator]  # part of the group, rank, size
NO_LIMIT = timedelta(0)  # as a timeout of options: that of the group


class ProcessGroup(_ProcessGroup):
    """Ranks 0 to size - 1, as torch.distributed knows them.

    Calls must come in the same order on all ranks, as everywhere. What a callback of a future calls
    is ordered by the callbacks, and runs on a communicator of its own, opened by its first use.
    Raises what the functions of ringreduce raise, from the backward() of a DDP model too. Ranges in
    torch.profiler have torch's names, as in ringreduce:all_to_all, around those of our collectives.
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
        self._monitored_barrier = MonitoredBarrier(rank, size, counts)
        self._timeout_s = timeout_s
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

    # torch asks the backend of a device what it can do, and there is none but the group.
    supports_coalescing = True
    supports_splitting = supports_time_estimate = supports_shrinking = False

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def _get_sequence_number_for_group(self) -> int:
        return self._main.core.sequence

    def set_timeout(self, timeout: timedelta) -> None:
        raise NotImplementedError("the timeout of a group is given when it is made, and stays")

    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ringreduce splits no groups: use torch.distributed.new_group")

    merge_remote_group = split_group

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

    @spanned("ringreduce:all_reduce")
    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> GroupWork:
        tensor = single(tensors)
        if tensor.layout is torch.sparse_coo:
            return self._allreduce_sparse(tensor, opts)
        op, asynchronous = op_of(opts, [tensor]), is_asynchronous(opts)
        if op in BITWISE:
            return self._reduce_bits(op, [tensor], [tensor], opts)
        started = self._comm().allreduce_(tensor, op, async_op=asynchronous)
        return self._work(started, asynchronous, [tensor])

    @spanned("ringreduce:all_reduce_coalesced")
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> GroupWork:
        xs = list({id(x): x for x in list_of(tensors)}.values())  # one that comes twice, once
        op, asynchronous = op_of(opts, xs), is_asynchronous(opts)
        if op in BITWISE:
            return self._reduce_bits(op, xs, xs, opts)
        started = self._comm().grouped_allreduce_(xs, op, async_op=asynchronous)
        return self._work(started, asynchronous, list_of(tensors))

    @spanned("ringreduce:broadcast")
    def broadcast(
        self, tensors: Any, opts: Any = None, timeout: Any = None, root: int = 0
    ) -> GroupWork:
        tensor = single(tensors)
        asynchronous = is_asynchronous(opts)
        started = self._comm().broadcast_(
            carried(tensor), root_of(opts, root), async_op=asynchronous
        )
        return self._work(started, asynchronous, [tensor])

    @spanned("ringreduce:reduce")
    def reduce(
        self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None, root: int = 0
    ) -> GroupWork:
        tensor = single(tensors)
        root, asynchronous = root_of(opts, root), is_asynchronous(opts)
        factor, name = factor_and_op(op if op is not None else opts)
        if name in BITWISE:
            outputs = [tensor] if self.rank() == self._main.check_root(root) else []
            return self._reduce_bits(name, [tensor], outputs, opts)
        x = tensor.detach() if factor is None else tensor.detach() * factor
        started = self._comm().reduce(x, name, root, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            if results[0] is not None:
                tensor.copy_(results[0])

        return self._work(started, asynchronous, [tensor], finish)

    @spanned("ringreduce:all_gather")
    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        """Tensors of any size from each rank; only their numbers of elements must fit."""
        outputs = inner(output_tensors)
        started = self._gather(single(input_tensors), opts)
        return self._finished_by(started, output_tensors, lambda found: fill(outputs, found))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    @spanned("ringreduce:all_gather_single")
    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        for output, x in zip(outputs, inputs, strict=True):
            check_parts("allgather", output, x, self.size())
        started = [self._gather(x, opts) for x in inputs]

        def finish(results: list[Any]) -> None:
            for output, gathered in zip(outputs, results, strict=True):
                output.copy_(equal_parts(gathered, self.size()).view(output.shape))

        return GroupWork(started, list(outputs), self._callbacks, finish)

    @spanned("ringreduce:all_gather_coalesced")
    def allgather_coalesced(
        self, output_lists: Any, input_list: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        """output_lists: for each rank, in its order, a tensor for each input."""
        started = [self._gather(x, opts) for x in input_list]

        def finish(results: list[Any]) -> None:
            for i, gathered in enumerate(results):
                fill([outputs[i] for outputs in output_lists], gathered)

        return GroupWork(started, output_lists, self._callbacks, finish)

    @spanned("ringreduce:reduce_scatter")
    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        output, inputs = single(output_tensors), inner(input_tensors)
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
        op, asynchronous = op_of(opts, [flat]), is_asynchronous(opts)
        if op in BITWISE:
            raise ValueError(f"reduce_scatter to parts of different sizes has no {op}")
        started = self._comm().allreduce_(flat, op, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            output.copy_(results[0].split(counts)[self.rank()].view(output.shape))

        return self._work(started, asynchronous, [output], finish)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    @spanned("ringreduce:reduce_scatter_single")
    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> GroupWork:
        started: list[Waitable] = []
        factor, op = factor_and_op(opts)
        asynchronous = is_asynchronous(opts)
        for output, x in zip(outputs, inputs, strict=True):
            check_parts("reduce_scatter", x, output, self.size())
        if op in BITWISE:
            return self._reduce_bits(op, inputs, outputs, opts)
        for output, x in zip(outputs, inputs, strict=True):
            rows = x.detach().reshape(self.size(), output.numel())
            rows = rows if factor is None else rows * factor
            result = self._comm().reduce_scatter(rows, op, async_op=asynchronous)
            started.append(waitable(result, asynchronous))

        def finish(results: list[Any]) -> None:
            for output, row in zip(outputs, results, strict=True):
                output.copy_(row.view(output.shape))

        return GroupWork(started, list(outputs), self._callbacks, finish)

    @spanned("ringreduce:barrier")
    def barrier(self, opts: Any = None, timeout: Any = None) -> GroupWork:
        limit = getattr(opts, "timeout", NO_LIMIT)
        asynchronous = is_asynchronous(opts) or limit > NO_LIMIT
        work = self._work(self._comm().barrier(async_op=asynchronous), asynchronous, [])
        work.limit_s = limit.total_seconds() if limit > NO_LIMIT else None
        return work

    @spanned("ringreduce:monitored_barrier")
    def monitored_barrier(
        self, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        """A barrier that names the first rank that has not come in time, or all. See there."""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        self._monitored_barrier(limit_s, wait_all_ranks)

    # ---- Built on those.

    @spanned("ringreduce:gather")
    def gather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        x, root = single(input_tensors), self._main.check_root(root_of(opts))
        started = self._gather(x, opts, root)
        if self.rank() != root:
            return GroupWork([started], [x], self._callbacks)
        outputs = inner(output_tensors)
        return self._finished_by(started, output_tensors, lambda found: fill(outputs, found))

    @spanned("ringreduce:scatter")
    def scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        """All parts have the size of the output."""
        output, root = single(output_tensors), root_of(opts)
        asynchronous = is_asynchronous(opts)
        if self.rank() == root:
            inputs = inner(input_tensors)
            if len(inputs) != self.size() or any(x.numel() != output.numel() for x in inputs):
                raise ValueError(f"scatter takes {self.size()} inputs of the output's size")
            rows = torch.stack([x.detach().reshape(-1) for x in inputs])
        else:
            rows = output.new_empty(self.size(), output.numel())
        started = self._comm().broadcast_(carried(rows), root, async_op=asynchronous)

        def finish(results: list[Any]) -> None:
            output.copy_(rows[self.rank()].view(output.shape))

        return self._work(started, asynchronous, [output], finish)

    @spanned("ringreduce:all_to_all")
    def alltoall(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Any = None
    ) -> GroupWork:
        outputs, inputs = list_of(output_tensors), list_of(input_tensors)
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
            fill(outputs, (torch.cat(mine), [part.numel() for part in mine]))

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
        outputs = split_rows(output, output_split_sizes, self.size())
        return self.alltoall(outputs, split_rows(input, input_split_sizes, self.size()), opts)

    @spanned("ringreduce:send")
    def send(self, tensors: Any, dst_rank: int, tag: int = 0) -> GroupWork:
        tensor = single(tensors)
        started = self._channels.send(carried(tensor), dst_rank, tag)
        return GroupWork([started], [tensor], self._callbacks)

    @spanned("ringreduce:recv")
    def recv(self, tensors: Any, src_rank: int, tag: int = 0) -> GroupWork:
        tensor = single(tensors)
        started = self._channels.receive(carried(tensor), src_rank, tag)
        return GroupWork([started], [tensor], self._callbacks)

    @spanned("ringreduce:recv_any_source")
    def recv_anysource(self, tensors: Any, tag: int = 0) -> GroupWork:
        tensor = single(tensors)
        started = self._channels.receive_any(carried(tensor), tag)
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
        return GroupWork([waitable(started, asynchronous)], value, self._callbacks, finish)

    def _finished_by(
        self, started: Work, value: Any, finish: Callable[[Gathered], None]
    ) -> GroupWork:
        return GroupWork([started], value, self._callbacks, lambda results: finish(results[0]))

    def _gather(self, x: Tensor, opts: Any, stamp: int = 0) -> Work:
        """Its result: what all ranks gave, flat, and the number of elements of each.

        stamp: calls with another one do not meet it.
        """
        flat = carried(x.detach()).reshape(-1)
        work = self._comm().gather_rows(flat, stamp, async_op=is_asynchronous(opts))

        def result() -> Gathered:
            whole, counts = work.wait()
            return whole.view(x.dtype), counts

        return Work((work,), finish=result)

    def _reduce_bits(
        self, op: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], opts: Any
    ) -> GroupWork:
        """outputs: as large as the inputs, or as this rank's part of them; or none on this rank."""
        if any(x.is_floating_point() or x.is_complex() for x in inputs):
            raise TypeError(f"op {op} combines integers and truth values, not {inputs[0].dtype}")
        stamp = -1 - list(BITWISE).index(op)
        started = [self._gather(x, opts, stamp) for x in inputs]

        def finish(results: list[Any]) -> None:
            for output, gathered in zip(outputs, results, strict=bool(outputs)):
                whole = combine_bits(op, gathered, self.size())
                begin = self.rank() * output.numel() if len(whole) > output.numel() else 0
                output.copy_(whole[begin : begin + output.numel()].view(output.shape))

        return GroupWork(started, list(inputs), self._callbacks, finish)

    def _allreduce_sparse(self, tensor: Tensor, opts: Any) -> GroupWork:
        """The sum of sparse tensors: everyone's entries, in rank order."""
        if factor_and_op(opts) != (None, "sum"):
            raise ValueError("sparse tensors can be summed, not reduced by another op")
        own = tensor.detach().coalesce()
        started = [self._gather(own.indices().t(), opts), self._gather(own.values(), opts)]

        def finish(results: list[Any]) -> None:
            indices = results[0][0].view(-1, own.sparse_dim()).t()
            values = results[1][0].view(-1, *own.values().shape[1:])
            tensor.copy_(torch.sparse_coo_tensor(indices, values, own.shape).coalesce())

        return GroupWork(started, [tensor], self._callbacks, finish)
