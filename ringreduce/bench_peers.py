"""Who is measured: every way to run one collective, as a loop that can be timed.

All contestants share the same memory and data, and every iteration writes the rank's own input
first: a gradient is always fresh. What this machine lacks raises `Unavailable` with the reason.
This file takes no time and prints nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

import ringreduce as rr
from ringreduce.bench_data import ROOT, Bytes, Job

if TYPE_CHECKING:
    from ringreduce.communicator import Communicator

Loop = Callable[[int], Any]  # runs so many iterations, returns what the last call returned
Call = Callable[..., Any]
Order = Callable[[Any, Any], tuple[Any, ...]]  # the operands, from the input and the output

ALIGNMENT_BYTES = 64  # a cache line: NumPy's own large arrays start 16 bytes into a page
GLOO_TIMEOUT_S = 60


class Unavailable(Exception):
    """A contestant that cannot take part here; the message says why."""


class Buffers:
    """One rank's memory, taken once for the largest size and touched: no loop sees a page fault.

    Collective where symmetric memory is wanted. separate: peers need an output of its own.
    """

    def __init__(
        self, comm: Communicator, memories: Sequence[str], capacity_bytes: int, separate: bool
    ) -> None:
        self.source = aligned_bytes(capacity_bytes)
        self.received = aligned_bytes(capacity_bytes if separate else 0)
        self.memory = {"private": aligned_bytes(capacity_bytes)}
        if "symmetric" in memories:
            self.memory["symmetric"] = comm.empty((capacity_bytes,), np.uint8)
        for memory in self.memory.values():
            memory.fill(0)

    def operands(self, memory: str, size_bytes: int) -> tuple[Bytes, Bytes]:
        """(target, source): the rank's input in that memory, and what is written to it."""
        return self.memory[memory][:size_bytes], self.source[:size_bytes]


@dataclass(frozen=True)
class Prepared:
    """A loop of one size, and where its result lies; None: in what the loop returned."""

    loop: Loop
    output: Bytes | None


@dataclass(frozen=True)
class Contestant:
    name: str  # as in the table
    memory: str  # whose writes are taken off its time
    prepare: Callable[[int], Prepared]  # by size in bytes
    checked: bool = True  # the limit and the writes compute no collective


def aligned_bytes(size_bytes: int) -> Bytes:
    memory = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size_bytes]


def require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"torch: {error}") from error


def typed(memory: Bytes, count: int, dtype: str, framework: str) -> Any:
    """The first `count` elements of `memory` as an array of the framework."""
    if framework == "torch":
        import torch

        item_bytes = getattr(torch, dtype).itemsize
        return torch.from_numpy(memory[: count * item_bytes]).view(getattr(torch, dtype))
    item = np.dtype(dtype)
    return memory[: count * item.itemsize].view(item)


def as_bytes(array: Any) -> Bytes:
    if not isinstance(array, np.ndarray):
        import torch

        array = array.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).view(np.uint8)


def loop_of(call: Call, operands: tuple[Any, ...], target: Bytes, source: Bytes) -> Loop:
    """Writes the input, then calls, with one operand or two; 0.1 us of Python more would show."""
    write = np.copyto

    def one_operand(iterations: int) -> Any:
        returned = None
        for _ in repeat(None, iterations):
            write(target, source)
            returned = call(x)
        return returned

    def two_operands(iterations: int) -> Any:
        returned = None
        for _ in repeat(None, iterations):
            write(target, source)
            returned = call(x, y)
        return returned

    x, y = operands[0], operands[-1]
    return one_operand if len(operands) == 1 else two_operands


def writes(buffers: Buffers, job: Job, memory: str) -> Contestant:
    """The writes alone."""

    def prepare(size_bytes: int) -> Prepared:
        input_bytes = job.input_count(size_bytes) * job.item_bytes
        target, source = buffers.operands(memory, input_bytes)
        write = np.copyto

        def loop(iterations: int) -> None:
            for _ in repeat(None, iterations):
                write(target, source)

        return Prepared(loop, None)

    return Contestant(f"writes {memory}", memory, prepare, checked=False)


def limit(comm: Communicator, buffers: Buffers, job: Job) -> Contestant:
    """What no in-place allreduce can beat: one meeting of all ranks, each line scaled in place.

    It scales float32 whatever the dtype: memory is its limit, not arithmetic. The input is fresh
    in every iteration, so nothing grows.
    """
    if job.collective != "allreduce":
        raise Unavailable("defined for allreduce only")

    def prepare(size_bytes: int) -> Prepared:
        count = max(1, size_bytes // 4)
        target, source = buffers.operands("private", 4 * count)
        if job.dtype != "float32":  # other bits could be subnormal numbers, which are slow
            source = np.ones(count, np.float32).view(np.uint8)
        x = target.view(np.float32)
        factor = np.full((), 2.0, np.float32)
        write, barrier, multiply = np.copyto, comm.barrier, np.multiply

        def loop(iterations: int) -> None:
            for _ in repeat(None, iterations):
                write(target, source)
                barrier()
                multiply(x, factor, x)

        return Prepared(loop, None)

    return Contestant("limit", "private", prepare, checked=False)


def ours(comm: Communicator, buffers: Buffers, job: Job, memory: str, framework: str) -> Contestant:
    """This library, as users call it, on a tensor in the given memory."""
    if framework == "numpy" and job.dtype == "bfloat16":
        raise Unavailable("NumPy has no bfloat16")
    if framework == "torch":
        require_torch()
    name = job.collective + ("_" if job.in_place else "")
    in_world = rr.is_initialized() and comm is rr.world()
    call = getattr(rr if in_world else comm, name)
    if job.reduces and job.op != "sum":
        call = partial(call, op=job.op)

    def prepare(size_bytes: int) -> Prepared:
        count = job.input_count(size_bytes)
        target, source = buffers.operands(memory, count * job.item_bytes)
        x = typed(target, count, job.dtype, framework)
        return Prepared(loop_of(call, (x,), target, source), target if job.in_place else None)

    return Contestant(f"{memory} {framework}", memory, prepare)


def peer(
    name: str, buffers: Buffers, job: Job, framework: str, call: Call, order: Order
) -> Contestant:
    """A peer's call, on private memory."""

    def prepare(size_bytes: int) -> Prepared:
        sent_count, received_count = job.input_count(size_bytes), job.output_count(size_bytes)
        target, source = buffers.operands("private", sent_count * job.item_bytes)
        received = buffers.received[: received_count * job.item_bytes]
        x = typed(target, sent_count, job.dtype, framework)
        y = typed(target if job.in_place else received, received_count, job.dtype, framework)
        loop = loop_of(call, order(x, y), target, source)
        return Prepared(loop, target if job.in_place else received)

    return Contestant(name, "private", prepare)


def tried(contestant: Contestant) -> Contestant:
    """The contestant, after one small call: not every peer knows every op and dtype."""
    try:
        contestant.prepare(0).loop(1)
    except Exception as error:  # whatever a peer raises, it is out
        raise Unavailable(first_line(error)) from error
    return contestant


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def mpi(comm: Communicator, buffers: Buffers, job: Job) -> Contestant:
    """mpi4py's upper-case calls on NumPy arrays, on the MPI that is loaded."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"mpi4py: {error}") from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (comm.rank, comm.size):
        raise Unavailable(f"MPI counts {world.Get_size()} ranks, this job {comm.size}")
    if job.dtype == "bfloat16":
        raise Unavailable("MPI has no bfloat16")
    calls: dict[str, tuple[Call, Order]] = {
        "allreduce": (world.Allreduce, lambda x, y: (MPI.IN_PLACE, x)),
        "reduce_scatter": (world.Reduce_scatter_block, lambda x, y: (x, y)),
        "allgather": (world.Allgather, lambda x, y: (x, y)),
        "broadcast": (world.Bcast, lambda x, y: (x,)),
    }
    call, order = calls[job.collective]
    if job.reduces and job.op != "sum":
        ops = {"min": MPI.MIN, "max": MPI.MAX, "prod": MPI.PROD}
        if job.op not in ops:
            raise Unavailable(f"MPI has no {job.op}")
        call = partial(call, op=ops[job.op])
    return tried(peer("mpi", buffers, job, "numpy", call, order))


def mpi_version() -> str:
    """Name and version of the loaded MPI, such as "Open MPI 5.0.11"; loads none."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None:
        return "no MPI loaded"
    name, version = module.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


class Gloo:
    """torch.distributed with gloo, as DDP uses it on CPUs; owns the process group until `close`.

    Collective. Ranks find each other through a file in a directory of rank 0, so one node only.
    """

    def __init__(self, comm: Communicator) -> None:
        require_torch()
        import torch.distributed

        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            raise Unavailable("this torch was built without gloo")
        if comm.local_size != comm.size:
            raise Unavailable("several nodes: its ranks meet through a file")
        self.comm = comm
        self.folder = tempfile.TemporaryDirectory(prefix="ringreduce-") if comm.rank == 0 else None
        meeting = os.path.join(self.folder.name, "store") if self.folder else ""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve
        try:
            torch.distributed.init_process_group(
                "gloo",
                store=torch.distributed.FileStore(comm.broadcast_object(meeting), comm.size),
                rank=comm.rank,
                world_size=comm.size,
                timeout=timedelta(seconds=GLOO_TIMEOUT_S),
            )
        except RuntimeError as error:
            raise Unavailable(first_line(error)) from error

    def contestant(self, buffers: Buffers, job: Job) -> Contestant:
        from torch import distributed

        # The first names are torch's newer ones for the same calls.
        scatter: Call = getattr(
            distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor
        )
        collect: Call = getattr(
            distributed, "all_gather_single", distributed.all_gather_into_tensor
        )
        calls: dict[str, tuple[Call, Order]] = {
            "allreduce": (distributed.all_reduce, lambda x, y: (x,)),
            "reduce_scatter": (scatter, lambda x, y: (y, x)),
            "allgather": (collect, lambda x, y: (y, x)),
            "broadcast": (partial(distributed.broadcast, src=ROOT), lambda x, y: (x,)),
        }
        call, order = calls[job.collective]
        if job.reduces and job.op != "sum":
            name = {"prod": "PRODUCT"}.get(job.op, job.op.upper())
            call = partial(call, op=getattr(distributed.ReduceOp, name))
        return tried(peer("gloo", buffers, job, "torch", call, order))

    def close(self) -> None:
        """Collective: the file stays until the last rank has left."""
        import torch.distributed

        torch.distributed.destroy_process_group()
        self.comm.barrier()
        if self.folder:
            self.folder.cleanup()
