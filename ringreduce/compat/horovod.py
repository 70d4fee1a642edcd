"""The names of horovod.torch that training scripts use: `import ringreduce.compat.horovod as hvd`.

It exists for scripts that are to run under mpirun as they are; new ones read better with
`ringreduce` itself. There is no Adasum, no elastic mode, no timeline: they raise
NotImplementedError.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ringreduce import broadcasting
from ringreduce.compat.horovod_batchnorm import SyncBatchNorm
from ringreduce.compat.horovod_ops import (
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    poll,
    reducescatter,
    reducescatter_async,
    sparse_allreduce_async,
    synchronize,
)
from ringreduce.compat.horovod_optimizer import DistributedOptimizer
from ringreduce.compat.horovod_types import (
    Adasum,
    Average,
    Compression,
    Max,
    Min,
    ProcessSet,
    Product,
    Sum,
    global_process_set,
)
from ringreduce.errors import RingReduceError as HorovodInternalError
from ringreduce.world import init as open_world
from ringreduce.world import is_initialized, local_rank, local_size, rank, shutdown, size, world

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]

_process_sets: list[ProcessSet] = []
_nodes: list[tuple[int, int]] = []  # local rank and local size of every rank, since init


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | None = None) -> None:
    """Opens the world. Collective.

    comm: an mpi4py communicator whose ranks are the world. process_sets: what else is to be opened.
    """
    if isinstance(comm, (list, tuple)):
        raise TypeError("init takes an mpi4py communicator, not a list of ranks: comm.Split() one")
    open_world(comm)
    everyone = world()
    mine = (everyone.local_rank, everyone.local_size)
    _nodes[:] = [pickle.loads(message) for message in everyone.exchange(pickle.dumps(mine))]
    _process_sets.clear()
    for process_set in process_sets or ():
        add_process_set(process_set)


def cross_rank() -> int:
    """Number of this rank's node among those that have ranks of its local rank."""
    own = world().local_rank
    return sum(local == own for local, _ in _known_nodes()[: rank()])


def cross_size() -> int:
    """Number of nodes that have ranks of this one's local rank."""
    own = world().local_rank
    return sum(local == own for local, _ in _known_nodes())


def is_homogeneous() -> bool:
    """Whether all nodes have equally many ranks."""
    return len({local_size for _, local_size in _known_nodes()}) == 1


def _known_nodes() -> list[tuple[int, int]]:
    if not _nodes:
        raise ValueError("call init() first")
    return _nodes


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Collective over all ranks, members or not."""
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    number = len(_process_sets) + 1
    if any(x.process_set_id and x.ranks == process_set.ranks for x in _process_sets):
        raise ValueError(f"there is a process set of these ranks: {process_set}")
    process_set.open(number)
    _process_sets.append(process_set)
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Local: closes the set. False for one that is not open."""
    if process_set is global_process_set or process_set.process_set_id is None:
        return False
    process_set.close()
    return True


def join(device: int = -1) -> int:
    """For a rank without more data: waits until all have called it, and returns the last of them.

    Meanwhile it takes part in the allreduces of the others, those of their optimizers too, with
    zeros; averages are still over all ranks. Other collectives are then a MismatchError for them.
    """
    return global_process_set.meeting.join()


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Gives root_rank's values to all. params: a state_dict, or (name, tensor) pairs."""
    broadcasting.broadcast_parameters(params, root_rank, comm=global_process_set.named(None))


def broadcast_optimizer_state(optimizer: Any, root_rank: int, model: Any = None) -> None:
    """Gives root_rank's state to all. As there, where it has none, gradients begin as zeros."""
    comm = global_process_set.named(None)
    broadcasting.broadcast_optimizer_state(optimizer, root_rank, comm=comm)
    if not optimizer.state:
        for x in (x for group in optimizer.param_groups for x in group["params"]):
            if x.requires_grad and x.grad is None:
                x.grad = torch.zeros_like(x)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    return process_set.named(name).broadcast_object(obj, process_set.rank_of(root_rank))


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Every rank's obj, in rank order. Unpickles what the other ranks of the job have sent."""
    return [pickle.loads(x) for x in process_set.named(name).exchange(pickle.dumps(obj))]


def mpi_built() -> bool:
    return True


mpi_enabled = mpi_threads_supported = mpi_built


def gloo_built() -> bool:
    return False


gloo_enabled = nccl_built = ddl_built = ccl_built = cuda_built = rocm_built = gloo_built


class _Absent:
    """A part of horovod.torch that is not here: says so when it is used."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"ringreduce has no {self._what}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"ringreduce has no {self._what}")


elastic = _Absent("elastic mode: a job whose rank dies ends, start it again from its checkpoint")
start_timeline = stop_timeline = _Absent("timeline in Horovod's format")
