"""How ranks find each other: rank, size and an exchange of small messages.

Used to open the world, never for data. Sources: mpi4py, a torch.distributed store, a world of one;
`ringreduce.testing` has one for threads and forks. mpi4py and torch are imported by the source that
needs them, when it is used.
"""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from ringreduce import _core
from ringreduce.errors import CollectiveTimeout
from ringreduce.recording import Recorder
from ringreduce.settings import read

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import Store

POLL_S = 1e-3  # longest nap between two looks at MPI: an exchange is on no hot path


class Bootstrap(ABC):
    """Ranks 0 to size - 1 that can exchange small messages, and what they have opened together."""

    in_process = False  # the ranks are threads of this process

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        # Defaults, until all ranks have agreed on theirs.
        self.settings = read({})
        # The core of the world and of every communicator split from it: they end together.
        self.opened: list[_core.Communicator] = []
        self.recorder = Recorder()

    @abstractmethod
    def exchange(self, message: bytes) -> list[bytes]:
        """Collective: every rank's message, in rank order."""

    def abort(self, exit_code: int) -> None:  # noqa: B027 (to do nothing is right by default)
        """Ends all ranks of the job if the launcher offers that. May return."""

    def close(self) -> None:  # noqa: B027
        """Releases what `exchange` needs. Local; nothing is exchanged any more."""

    def open_core(self, name: str) -> _core.Communicator:
        """Collective: a communicator of the core over all these ranks, kept in `opened`."""
        core = self.make_core(self.rank, self.size, self.exchange, name)
        self.opened.append(core)
        return core

    def make_core(
        self,
        rank: int,
        size: int,
        exchange: Callable[[bytes], list[bytes]],
        name: str,
        algorithm: str | None = None,
    ) -> _core.Communicator:
        """Collective over the ranks that exchange joins, all or some of these."""
        return _core.Communicator(
            rank,
            size,
            exchange,
            in_process=self.in_process,
            timeout_s=self.settings.timeout_s,
            warn_after_s=self.settings.warn_after_s,
            algorithm=algorithm or self.settings.algorithm,
            name=name,
            trace=self.recorder.core,
        )


class SelfBootstrap(Bootstrap):
    """A world of one: no launcher, no MPI."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def exchange(self, message: bytes) -> list[bytes]:
        return [message]


class MpiBootstrap(Bootstrap):
    """The ranks of an mpi4py communicator: of a duplicate, apart from the user's messages."""

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        """Collective over comm. Every wait, this one included, ends after timeout_s."""
        if "mpi4py.MPI" not in sys.modules or not isinstance(comm, sys.modules["mpi4py.MPI"].Comm):
            raise TypeError(f"comm must be an mpi4py communicator, not {type(comm).__name__}")
        from mpi4py import MPI

        if comm == MPI.COMM_NULL:
            raise ValueError("comm is MPI.COMM_NULL: this rank is not a member of it")
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError("comm must be an intracommunicator: merge it first (comm.Merge())")
        super().__init__(comm.rank, comm.size)
        self.source = comm  # the user's; only ever compared with
        self._timeout_s = timeout_s
        self._comm, request = comm.Idup()
        self._wait(request)

    def exchange(self, message: bytes) -> list[bytes]:
        from mpi4py import MPI

        lengths = array("i", bytes(4 * self.size))
        self._wait(self._comm.Iallgather([array("i", [len(message)]), MPI.INT], [lengths, MPI.INT]))
        starts = array("i", itertools.accumulate(lengths[:-1], initial=0))
        received = bytearray(sum(lengths))
        everyone = [received, (lengths, starts), MPI.BYTE]
        self._wait(self._comm.Iallgatherv([message, MPI.BYTE], everyone))
        return [
            bytes(received[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]

    def abort(self, exit_code: int) -> None:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            # The whole job, not the communicator: a job that lost a rank is of no use to anyone.
            MPI.COMM_WORLD.Abort(exit_code)

    def close(self) -> None:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            self._comm.Free()

    def _wait(self, request: MPI.Request) -> None:
        """Polls: under MPI's own wait neither Ctrl-C, other threads nor a time limit work."""
        self._pending = request  # keeps its buffers, to which MPI may write even after an error
        limit = time.monotonic() + self._timeout_s
        nap_s = 1e-5
        while not request.Test():
            if time.monotonic() > limit:
                raise CollectiveTimeout(
                    f"rank {self.rank} waited {self._timeout_s:g} s in init for the other ranks: "
                    "every rank must call it, or use ringreduce at all. Raise "
                    "RINGREDUCE_TIMEOUT if some are late"
                )
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, POLL_S)


class StoreBootstrap(Bootstrap):
    """Ranks that share a torch.distributed store, as under torchrun: no MPI."""

    def __init__(
        self, store: Store, rank: int, size: int, prefix: str = "ringreduce", *, timeout_s: float
    ) -> None:
        """prefix: of all our keys; new to the store and the same on all ranks."""
        super().__init__(rank, size)
        self._store = store
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._round = 0

    def exchange(self, message: bytes) -> list[bytes]:
        # A leading byte, since not every store keeps an empty value.
        key = self._key(self._round, self.rank)
        self._store.set(key, b"=" + message)  # type: ignore[arg-type]  # torch's stubs say str
        limit = time.monotonic() + self._timeout_s
        messages = [self._get(rank, limit) for rank in range(self.size)]
        if self._round > 0:
            # All ranks are in this round, so all have read the one before.
            self._store.delete_key(self._key(self._round - 1, self.rank))
        self._round += 1
        return messages

    def _key(self, round_number: int, rank: int) -> str:
        return f"{self._prefix}/{round_number}/{rank}"

    def _get(self, rank: int, limit: float) -> bytes:
        key = self._key(self._round, rank)
        try:
            self._store.wait([key], timedelta(seconds=max(limit - time.monotonic(), 1e-3)))
        except RuntimeError as error:
            raise CollectiveTimeout(
                f"rank {self.rank} waited up to {self._timeout_s:g} s in init for rank {rank}: "
                f"{error}. Every rank must call it, or use ringreduce at all. Raise "
                "RINGREDUCE_TIMEOUT if it is late"
            ) from error
        return self._store.get(key)[1:]
