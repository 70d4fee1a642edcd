"""What arguments of horovod.torch calls are made of: ops, sets of ranks, compression."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ringreduce.communicator import Communicator
from ringreduce.compat.horovod_meeting import Meeting
from ringreduce.world import world

Average, Sum, Min, Max, Product, Adasum = "avg", "sum", "min", "max", "prod", "adasum"


class ProcessSet:
    """Some of the ranks. Becomes usable by `init(process_sets=...)` or `add_process_set`."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.ranks: list[int] | None = sorted(ranks)
        self.process_set_id: int | None = None
        self._comm: Communicator | None = None
        self._meeting: Meeting | None = None
        self._num_optimizers = 0

    @property
    def comm(self) -> Communicator:
        if self._comm is None:
            raise ValueError(
                f"this rank cannot use the process set {self.ranks}: it is no member, or "
                "add_process_set was not called"
            )
        return self._comm

    @property
    def meeting(self) -> Meeting:
        comm = self.comm
        if self._meeting is None or self._meeting.comm is not comm:
            self._meeting = Meeting(comm)
        return self._meeting

    def named(self, name: str | None) -> Communicator:
        """For one call: it meets the call of that name, or the next one without, of its kind."""
        return self.meeting.named(name)

    def count_optimizer(self) -> int:
        """The number of another optimizer: its gradients meet by it."""
        self._num_optimizers += 1
        return self._num_optimizers

    def open(self, number: int) -> None:
        """Collective over all ranks of the job."""
        everyone = world()
        ranks = self.ranks or []
        if len(set(ranks) & set(range(everyone.size))) < len(ranks):
            raise ValueError(f"{ranks} are not ranks of a world of {everyone.size}")
        self._comm = everyone.split(number if everyone.rank in ranks else None)
        self.process_set_id = number

    def close(self) -> None:
        if self._comm is not None:
            self._comm.close()
        self._comm = self._meeting = self.process_set_id = None

    def included(self) -> bool:
        return self._comm is not None

    def rank(self) -> int:
        """Within the set."""
        return self.comm.rank

    def size(self) -> int:
        return len(self.ranks or [])

    def rank_of(self, world_rank: int) -> int:
        """The number within the set of a rank of the world."""
        return world_rank if self.ranks is None else self.ranks.index(world_rank)

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


class _GlobalProcessSet(ProcessSet):
    def __init__(self) -> None:
        super().__init__([])
        self.ranks, self.process_set_id = None, 0

    @property
    def comm(self) -> Communicator:
        return world()

    def included(self) -> bool:
        return True

    def size(self) -> int:
        return world().size


global_process_set = _GlobalProcessSet()


class NoCompression:
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, context: Any) -> Tensor:
        return tensor


class Fp16Compression:
    """Sends floating-point tensors as float16; they are summed in float32 and rounded once."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        return (tensor.half() if tensor.is_floating_point() else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, context: Any) -> Tensor:
        return tensor.to(context)


class Compression:
    """What `compression` arguments take."""

    none = NoCompression
    fp16 = Fp16Compression
