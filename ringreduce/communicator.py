"""A group of ranks and the collectives among them.

Checks the operands, makes the results and submits to the core; moves no data and knows no tensor
library. What each collective does is written in collectives.py.
"""

from __future__ import annotations

import itertools
import math
import operator
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ringreduce import _core, profiling, tensors
from ringreduce.arrays import CPU, Array, check_apart, check_together
from ringreduce.errors import MismatchError, PeerFailed, ResourceError
from ringreduce.operands import (
    DEFAULT_STREAMS,
    DeviceOperands,
    check_group_op,
    check_op,
    describe_list,
    operand,
    stream_of,
)
from ringreduce.tensors import describe
from ringreduce.work import DeviceWork, Part, Work

if TYPE_CHECKING:
    from ringreduce.bootstrap import Bootstrap

BARRIER = _core.KINDS["barrier"]
ALLREDUCE = _core.KINDS["allreduce"]
REDUCE_SCATTER = _core.KINDS["reduce_scatter"]
ALLGATHER = _core.KINDS["allgather"]
BROADCAST = _core.KINDS["broadcast"]
REDUCE = _core.KINDS["reduce"]
KIND_NAMES = {kind: name for name, kind in _core.KINDS.items()}


class Communicator:
    """Ranks 0 to size - 1, and everything they need to talk.

    Each collective must be called by all ranks of the communicator, in the same order; calls from
    several threads are serialised. `world()` and `split` make communicators.

    rank, size: of this communicator. local_rank, local_size: among its ranks on this node.
    name: for messages. core, bootstrap: for the other modules of this package.
    """

    def __init__(self, core: _core.Communicator, bootstrap: Bootstrap, name: str = "world") -> None:
        """The bootstrap is the job's: its `opened` holds the cores that must end together."""
        self.core = core
        self.bootstrap = bootstrap
        self.name = name
        self.rank: int = core.rank
        self.size: int = core.size
        self.local_rank: int = core.local_rank
        self.local_size: int = core.local_size
        self._num_splits = 0

    def __repr__(self) -> str:
        return f"<ringreduce.Communicator {self.name}: rank {self.rank} of {self.size}>"

    # ---- Collectives: see the functions of the same names in collectives.py.

    def allreduce(self, x: Any, op: str = "sum", *, out: Any = None, async_op: bool = False) -> Any:
        source = describe(x)
        op_index = check_op(op, source.dtype)
        if out is None:
            target = describe(tensors.empty_like(source))
        else:
            target = tensors.describe_out(out, source)
            tensors.mark_written(target)
        return self._run(ALLREDUCE, op_index, 0, source, target, async_op)

    def allreduce_(self, x: Any, op: str = "sum", *, async_op: bool = False) -> Any:
        # The hot path: every name looked up counts beside a collective of a microsecond.
        if not async_op and self.core.allreduce_plain(x, op):
            return x
        array = describe(x, True)
        address, shape, strides, dtype = array[:4]
        op_index = check_op(op, dtype)
        array.framework.mark_written(x)
        if array.device != CPU:
            return self._run(ALLREDUCE, op_index, 0, array, array, async_op)
        tensor = (address, address, shape, strides, strides)
        work = self._submit(ALLREDUCE, op_index, dtype, 0, [tensor], x, async_op)
        return Work((work,), x) if async_op else x

    def grouped_allreduce(
        self, xs: Iterable[Any], op: str = "sum", *, async_op: bool = False
    ) -> Any:
        sources = describe_list(xs)
        op_index = check_group_op(op, sources)
        targets = [describe(tensors.empty_like(source)) for source in sources]
        return self._run_group(ALLREDUCE, op_index, 0, sources, targets, async_op)

    def grouped_allreduce_(
        self, xs: Iterable[Any], op: str = "sum", *, async_op: bool = False
    ) -> Any:
        arrays = describe_list(xs, writable=True)
        op_index = check_group_op(op, arrays)
        check_apart(arrays)
        return self._run_group(ALLREDUCE, op_index, 0, arrays, arrays, async_op)

    def reduce_scatter(self, x: Any, op: str = "sum", *, async_op: bool = False) -> Any:
        source = describe(x)
        if not source.shape:
            raise ValueError("reduce_scatter splits dimension 0, and a 0-d tensor has none")
        op_index = check_op(op, source.dtype)
        rows, extra = divmod(source.shape[0], self.size)
        target = describe(tensors.empty_rows(source, rows + (self.rank < extra)))
        return self._run(REDUCE_SCATTER, op_index, 0, source, target, async_op)

    def allgather(self, x: Any, *, async_op: bool = False) -> Any:
        part, result = self._gather(describe(x), async_op)
        return Work((part,), finish=lambda: result()[0]) if async_op else result()[0]

    def gather_rows(self, x: Any, root: int = 0, *, async_op: bool = False) -> Work:
        """allgather, for the other modules: its result, and the number of rows of each rank.

        The ranks must agree on root; what it means is the caller's.
        """
        part, result = self._gather(describe(x), async_op, root)
        return Work((part,), finish=result)

    def broadcast(self, x: Any, root: int = 0, *, async_op: bool = False) -> Any:
        root = self.check_root(root)
        source = describe(x)
        result = (tensors.copy_of if self.rank == root else tensors.empty_like)(source)
        return self.broadcast_(result, root, async_op=async_op)

    def broadcast_(self, x: Any, root: int = 0, *, async_op: bool = False) -> Any:
        root = self.check_root(root)
        array = describe(x, True)
        if self.rank != root:  # there autograd may still need what it is
            tensors.mark_written(array)
        return self._run(BROADCAST, 0, root, array, array, async_op)

    def grouped_broadcast_(
        self, xs: Iterable[Any], root: int = 0, *, async_op: bool = False
    ) -> Any:
        root = self.check_root(root)
        arrays = describe_list(xs, writable=True)
        return self._run_group(BROADCAST, 0, root, arrays, arrays, async_op)

    def reduce(self, x: Any, op: str = "sum", root: int = 0, *, async_op: bool = False) -> Any:
        root = self.check_root(root)
        source = describe(x)
        op_index = check_op(op, source.dtype)
        target = describe(tensors.empty_like(source)) if self.rank == root else None
        return self._run(REDUCE, op_index, root, source, target, async_op)

    def barrier(self, *, async_op: bool = False) -> Any:
        work = self._submit(BARRIER, 0, 0, 0, [], None, async_op)
        return Work((work,)) if async_op else None

    def empty(self, shape: int | Sequence[int], dtype: Any, device: Any = None) -> Any:
        blank = tensors.blank(shape, dtype, device)
        if blank.device == CPU:
            return blank.on(self.core.allocate(blank.size_bytes))
        return blank.on(self.core.allocate(blank.size_bytes, blank.device))

    def check(self) -> None:
        """Local: raises what this rank's GPU has found wrong in collectives that were launched.

        A call on a GPU is over, for the host, when it is launched. What goes wrong later (a rank
        that does not come, or in a graph's replay comes with something else) is raised by the next
        call on the communicator, by Work.wait, or here. Does not wait for the device: synchronize
        first, to hear of all that was launched.
        """
        self.core.check()

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        from ringreduce import broadcasting

        return broadcasting.broadcast_object(obj, root, comm=self)

    def broadcast_parameters(self, model_or_state_dict: Any, root: int = 0) -> None:
        from ringreduce import broadcasting

        broadcasting.broadcast_parameters(model_or_state_dict, root, comm=self)

    def broadcast_optimizer_state(self, optimizer: Any, root: int = 0) -> None:
        from ringreduce import broadcasting

        broadcasting.broadcast_optimizer_state(optimizer, root, comm=self)

    # ---- Small messages and groups.

    def gather_bytes(self, message: bytes, root: int = 0) -> tuple[Any, list[int]]:
        """Collective: all messages one after the other (a uint8 array), and the length of each.

        The ranks must agree on root; what it means is the caller's.
        """
        root = self.check_root(root)
        array = tensors.from_bytes(message)
        tensor = (array.address, 0, array.shape, None, None)
        work = self._submit(ALLGATHER, 0, array.dtype, root, [tensor], array.owner, False)
        return work.output(), work.counts

    def exchange(self, message: bytes) -> list[bytes]:
        """Collective: every rank's message, in rank order."""
        data, lengths = self.gather_bytes(message)
        ends = itertools.accumulate(lengths)
        return [data[end - n : end].tobytes() for end, n in zip(ends, lengths, strict=True)]

    def split(
        self, color: int | None, key: int | None = None, *, algorithm: str | None = None
    ) -> Communicator | None:
        """Collective: makes one communicator of all ranks that give the same color.

        color: any 64-bit integer; None takes part and gets None. key: orders the ranks of the new
        communicator; equal keys, and all by default, in the order of this one. algorithm: of the
        new communicator, in place of the setting. close() it when it is no longer needed: until
        then it has memory, and a file descriptor for each rank of the node. Raises ResourceError
        on all ranks of a group if one of them could not be set up, MismatchError if they give
        different algorithms.
        """
        if algorithm is not None and algorithm not in _core.ALGORITHMS:
            raise ValueError(
                f"algorithm must be one of {', '.join(_core.ALGORITHMS)}, not {algorithm!r}"
            )
        mine = b""
        if color is not None:
            mine = _pack_color(color, self.rank if key is None else key)
            mine += (algorithm or "").encode()
        self._num_splits += 1
        members = []
        algorithms = {}
        for rank, message in enumerate(self.exchange(mine)):
            if mine and message[:8] == mine[:8]:
                members.append((*struct.unpack("<q", message[8:16]), rank))
                algorithms[rank] = message[16:].decode()
        exchange = _GroupExchange(self, [rank for _, rank in sorted(members)])
        if not mine:
            exchange.finish(b"")
            return None
        if len(set(algorithms.values())) > 1:
            exchange.finish(b"")
            given = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in algorithms.items())
            raise MismatchError(f"split({color}): ranks give different algorithms ({given})")
        name = f"{self.name}/{self._num_splits}.{color}"
        return Communicator(exchange.open_core(name, algorithm), self.bootstrap, name)

    def close(self) -> None:
        """Local: leaves the communicator without waiting. Later calls on it raise NotInitialized.

        Other ranks that still wait for this one get PeerFailed.
        """
        self.core.close()
        # An aborted one is still looked at when the job ends; any other gives back its memory now.
        if self.core in self.bootstrap.opened and not self.core.aborted:
            self.bootstrap.opened.remove(self.core)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.core.drain(self.bootstrap.settings.timeout_s)
        finally:
            self.close()

    # ---- The way into the core.

    def _submit(
        self,
        kind: int,
        op_index: int,
        dtype: int,
        root: int,
        operands: list[tuple],
        keepalive: object,
        async_op: bool,
        *place: Any,
    ) -> _core.Work:
        """place: GPU, stream, and for an allgather all ranks' rows; nothing for the CPU."""
        submit = self.core.submit
        if not profiling.switch._is_profiler_enabled:
            return submit(kind, op_index, dtype, root, operands, keepalive, async_op, *place)
        size_bytes = sum(math.prod(operand[2]) for operand in operands) * _core.ITEM_BYTES[dtype]
        with profiling.span(f"ringreduce::{KIND_NAMES[kind]}", bytes=size_bytes):
            return submit(kind, op_index, dtype, root, operands, keepalive, async_op, *place)

    def _run(
        self,
        kind: int,
        op_index: int,
        root: int,
        source: Array,
        target: Array | None,
        async_op: bool,
    ) -> Any:
        """One message. Its result is the target's owner: None without a target."""
        result = None if target is None else target.owner
        if source.device != CPU:
            part = self._run_on_gpu(kind, op_index, root, [source], [target], [], async_op)
            return Work((part,), result) if async_op else result
        operands = [operand(source, target)]
        keepalive = (source.owner, result)
        work = self._submit(kind, op_index, source.dtype, root, operands, keepalive, async_op)
        return Work((work,), result) if async_op else result

    def _run_group(
        self,
        kind: int,
        op_index: int,
        root: int,
        sources: list[Array],
        targets: list[Array],
        async_op: bool,
    ) -> Any:
        """One message for each dtype and device, in order of first appearance."""
        messages: dict[tuple[int, int], list[int]] = {}  # of sources
        for i, source in enumerate(sources):
            messages.setdefault((source.dtype, source.device), []).append(i)
        stamps: list[tuple] = []
        if len(messages) != 1:
            # Message by message, the core would not see that lists differ in how their dtypes
            # interleave, or that one is empty. So the first message ends in an operand without
            # elements whose shape stands for the whole list.
            whole = repr([(x.dtype, x.device != CPU, *x.shape) for x in sources])
            stamps = [(0, 0, (0, zlib.crc32(whole.encode())), None, None)]
            messages = messages or {(0, CPU): []}
        for members in messages.values():
            for i in members[1:]:
                check_together(sources[members[0]], sources[i])
        if targets is sources and (kind != BROADCAST or self.rank != root):
            for array in targets:
                tensors.mark_written(array)
        results = [target.owner for target in targets]
        works: list[Part] = []
        for (dtype, device), members in messages.items():
            mine, theirs = [sources[i] for i in members], [targets[i] for i in members]
            if device != CPU:
                work = self._run_on_gpu(kind, op_index, root, mine, theirs, stamps, async_op)
                works.append(work)
            else:
                operands = [*map(operand, mine, theirs), *stamps]
                keepalive = (sources, results)
                works.append(
                    self._submit(kind, op_index, dtype, root, operands, keepalive, async_op)
                )
            stamps = []
        return Work(works, results, give_up=self.core.abort) if async_op else results

    def _run_on_gpu(
        self,
        kind: int,
        op_index: int,
        root: int,
        sources: Sequence[Array],
        targets: Sequence[Array | None],
        stamps: list[tuple],
        async_op: bool,
        rows: Sequence[int] = (),
    ) -> DeviceWork:
        """One message of tensors on one GPU. In a blocking call the caller's stream has it then.

        rows: of all ranks, for an allgather.
        """
        stream = self._stream(sources[0])
        packed = DeviceOperands(sources, targets, stream)
        shapes = [source.shape for source in sources]
        operands = [
            (*addresses, shape, None, None)
            for addresses, shape in zip(packed.addresses, shapes, strict=True)
        ]
        operands += stamps
        dtype, place = sources[0].dtype, (sources[0].device, stream, list(rows))
        part = self._submit(
            kind, op_index, dtype, root, operands, packed.keepalive, async_op, *place
        )
        if not async_op:
            packed.unpack()
        return DeviceWork(part, packed)

    def _stream(self, x: Array) -> int:
        """The caller's current one, on x's GPU."""
        stream = stream_of(x)
        if stream in DEFAULT_STREAMS and self.bootstrap.in_process and self.size > 1:
            raise ValueError(
                "ranks that are threads of one process must not use the default stream of a GPU, "
                "on which each would wait for the others: enter torch.cuda.stream("
                "torch.cuda.Stream()), as ringreduce.testing.run_threads does for its threads"
            )
        return stream

    def _gather(
        self, source: Array, async_op: bool, root: int = 0
    ) -> tuple[Part, Callable[[], tuple[Any, list[int]]]]:
        """What waits for an allgather, and what makes of it then the result, and all ranks' rows.

        On a GPU the result must be there before: the host meets the others, also with async_op.
        """
        if source.device == CPU:
            tensor = (source.address, 0, source.shape, source.strides, None)
            part = self._submit(ALLGATHER, 0, source.dtype, root, [tensor], source.owner, async_op)
            return part, lambda: (
                tensors.gathered(source, part.output(), sum(part.counts)),
                part.counts,
            )
        self._stream(source)  # raises now, or not at all
        # Rows without elements: nothing moves but their number.
        rows = (0, 0, (*(source.shape or (1,)), 0), None, None)
        counts = self._submit(ALLGATHER, 0, source.dtype, root, [rows], None, False).counts
        result = tensors.empty_rows(source, sum(counts))
        targets = [describe(result)]
        work = self._run_on_gpu(ALLGATHER, 0, root, [source], targets, [], async_op, counts)
        return work, lambda: (result, counts)

    def check_root(self, root: int) -> int:
        """Local, before anything is sent: raises TypeError or ValueError unless it is a rank."""
        root = operator.index(root)
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank, 0 to {self.size - 1}, not {root}")
        return root


class _GroupExchange:
    """Small messages within a group that split makes, carried by the communicator it splits.

    Every rank of the parent stays in rounds of its exchange until all have said that they are done,
    since groups may need different numbers of rounds. A message starts with b"+"; "done" is b"-"
    and why it failed.
    """

    def __init__(self, parent: Communicator, members: list[int]) -> None:
        self._parent = parent
        self._members = members

    def __call__(self, message: bytes) -> list[bytes]:
        return self._own(self._parent.exchange(b"+" + message))

    def open_core(self, name: str, algorithm: str | None) -> _core.Communicator:
        """Collective over the parent; ranks without a group call finish instead."""
        bootstrap = self._parent.bootstrap
        rank = self._members.index(self._parent.rank)
        try:
            core = bootstrap.make_core(rank, len(self._members), self, name, algorithm)
        except PeerFailed:
            self._own(self.finish(b""))  # the rank that gave up says why
            raise
        except Exception as error:
            text = str(error) or type(error).__name__
            self.finish(text.encode(errors="backslashreplace"))
            raise
        try:
            self._own(self.finish(b""))
        except BaseException:
            core.close()
            raise
        bootstrap.opened[:] = [other for other in bootstrap.opened if not other.closed]
        bootstrap.opened.append(core)
        return core

    def finish(self, failure: bytes) -> list[bytes]:
        """Keeps the other ranks company until all are done; returns how each fared."""
        while True:
            messages = self._parent.exchange(b"-" + failure)
            if all(message.startswith(b"-") for message in messages):
                return messages

    def _own(self, messages: list[bytes]) -> list[bytes]:
        """The group's messages without their mark, unless one of its ranks has failed."""
        for rank in self._members:
            if messages[rank].startswith(b"-") and len(messages[rank]) > 1:
                raise ResourceError(
                    f"split: rank {rank} of {self._parent.name} could not set up its part: "
                    + messages[rank][1:].decode()
                )
        return [messages[rank][1:] for rank in self._members]


def _pack_color(color: int, key: int) -> bytes:
    try:
        return struct.pack("<qq", operator.index(color), operator.index(key))
    except struct.error:
        raise ValueError(f"color and key must be 64-bit integers, not {color} and {key}") from None
