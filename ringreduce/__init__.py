"""Collectives and data-parallel training for ranks started by mpirun.

Importing it starts nothing: no MPI, no CUDA, no torch. The first call that needs other ranks does.
"""

import importlib
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
from ringreduce.compiling import stay_out
from ringreduce.errors import (
    CollectiveTimeout,
    MismatchError,
    NotInitialized,
    PeerFailed,
    ResourceError,
    RingReduceError,
)
from ringreduce.timeline import timeline
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
    from ringreduce.attachment import attach
    from ringreduce.codecs import Codec
    from ringreduce.model import DistributedModel
    from ringreduce.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

__version__ = build_info()["version"]

stay_out()

__all__ = [
    "Codec",
    "CollectiveTimeout",
    "Communicator",
    "DistributedModel",
    "MismatchError",
    "NotInitialized",
    "PeerFailed",
    "ResourceError",
    "RingReduceError",
    "SyncBatchNorm",
    "Work",
    "allgather",
    "allreduce",
    "allreduce_",
    "attach",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "convert_sync_batchnorm",
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
    "timeline",
    "world",
]


# Names of torch modules, so only their use imports torch.
_LAZY = {
    "Codec": "codecs",
    "DistributedModel": "model",
    "SyncBatchNorm": "sync_batchnorm",
    "attach": "attachment",
    "convert_sync_batchnorm": "sync_batchnorm",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ringreduce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ringreduce.{_LAZY[name]}"), name)
