"""SyncBatchNorm of horovod.torch: our own, made directly. On CPUs, too, where Horovod's is not."""

from __future__ import annotations

from ringreduce import sync_batchnorm
from ringreduce.communicator import Communicator
from ringreduce.world import world

_shared: list[tuple[Communicator, sync_batchnorm._Group]] = []  # of all layers, for each world


class SyncBatchNorm(sync_batchnorm.SyncBatchNorm):
    """BatchNorm over the batches of all ranks, of any size. Arguments as of torch's."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        everyone = world()
        if not _shared or _shared[0][0] is not everyone:
            _shared[:] = [(everyone, sync_batchnorm._Group(None))]
        self._group = _shared[0][1]
