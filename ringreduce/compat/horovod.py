"""The names of horovod.torch that training scripts use: `import ringreduce.compat.horovod as hvd`.

It exists for scripts that are to run under mpirun as they are; new ones read better with
`ringreduce` itself. Calls meet by their order, which must be the same on all ranks, not by their
name. There is no Adasum, no elastic mode, no timeline.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ringreduce import broadcasting
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
    _process_sets.append(process_set)
    process_set.open(len(_process_sets))
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Local: closes the set. False for one that is not open."""
    if process_set is global_process_set or process_set.process_set_id is None:
        return False
    process_set.close()
    return True


def join(device: int = -1) -> int:
    """Waits until all ranks have called it. Returns the rank that was the last to come.

    Collectives that another rank calls meanwhile are a MismatchError on all ranks: for ranks with
    unequal numbers of batches use `join()` of `ringreduce.DistributedModel`.
    """
    arrivals = [pickle.loads(x) for x in world().exchange(pickle.dumps(time.time()))]
    return arrivals.index(max(arrivals))


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Gives root_rank's values to all. params: a state_dict, or (name, tensor) pairs."""
    broadcasting.broadcast_parameters(params, root_rank)


def broadcast_optimizer_state(optimizer: Any, root_rank: int, model: Any = None) -> None:
    broadcasting.broadcast_optimizer_state(optimizer, root_rank)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    return process_set.comm.broadcast_object(obj, process_set.rank_of(root_rank))


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Every rank's obj, in rank order. Unpickles what the other ranks of the job have sent."""
    return [pickle.loads(x) for x in process_set.comm.exchange(pickle.dumps(obj))]


def mpi_built() -> bool:
    return True


mpi_enabled = mpi_threads_supported = mpi_built


def gloo_built() -> bool:
    return False


gloo_enabled = nccl_built = ddl_built = ccl_built = cuda_built = rocm_built = gloo_built
