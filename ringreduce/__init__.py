"""ringreduce: collectives and data-parallel training for ranks started by mpirun.

Importing it starts nothing: no MPI, no CUDA, no torch. The first call that needs other ranks does.
"""

from typing import TYPE_CHECKING, Any

from ringreduce._core import build_info
from ringreduce.broadcasting import (
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from ringreduce.collectives import (
    allgather,
    allreduce,
    allreduce_,
    barrier,
    broadcast,
    broadcast_,
    empty,
    grouped_allreduce,
    grouped_allreduce_,
    reduce,
    reduce_scatter,
)
from ringreduce.communicator import Communicator
from ringreduce.errors import (
    CollectiveTimeout,
    MismatchError,
    NotInitialized,
    PeerFailed,
    ResourceError,
    RingReduceError,
)
from ringreduce.work import Work
from ringreduce.world import (
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
    world,
)

if TYPE_CHECKING:
    from ringreduce.model import DistributedModel

__version__ = build_info()["version"]

__all__ = [
    "CollectiveTimeout",
    "Communicator",
    "DistributedModel",
    "MismatchError",
    "NotInitialized",
    "PeerFailed",
    "ResourceError",
    "RingReduceError",
    "Work",
    "allgather",
    "allreduce",
    "allreduce_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "empty",
    "grouped_allreduce",
    "grouped_allreduce_",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "reduce",
    "reduce_scatter",
    "shutdown",
    "size",
    "world",
]


def __getattr__(name: str) -> Any:
    if name == "DistributedModel":  # a torch module, so only its use imports torch
        from ringreduce.model import DistributedModel

        return DistributedModel
    raise AttributeError(f"module 'ringreduce' has no attribute {name!r}")
