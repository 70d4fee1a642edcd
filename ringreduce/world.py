"""The world communicator: opened by `init` or by the first use, closed by `shutdown` or at exit.

It decides nothing about how ranks find each other (launch) or how a job ends (ending).
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from ringreduce import _core, ending, settings
from ringreduce.bootstrap import Bootstrap, MpiBootstrap
from ringreduce.communicator import Communicator
from ringreduce.errors import CollectiveTimeout, NotInitialized, RingReduceError
from ringreduce.launch import RANK_PROCESS, from_environment, limit_threads, no_rank
from ringreduce.settings import Settings

if TYPE_CHECKING:
    from mpi4py import MPI

_log = logging.getLogger("ringreduce")


class _World:
    """Of this process. `communicator` is read without the lock: set last and cleared first."""

    communicator: Communicator | None = None
    bootstrap: Bootstrap | None = None
    closed = False  # by shutdown: only an explicit init opens it again
    forked_from: int | None = None  # the process that had the world, if this one is its child
    lock = threading.RLock()


def init(
    comm: MPI.Intracomm | Bootstrap | None = None,
    *,
    timeout: float | None = None,
    algorithm: str | None = None,
    warn_after: float | None = None,
    tuning: str | os.PathLike[str] | None = None,
) -> None:
    """Opens the world communicator. Collective over the ranks of the job, or of comm.

    Optional: the first use of anything that needs it does the same as `init()`. When the world is
    open already nothing happens, provided that the arguments given are those in force.

    comm: an mpi4py communicator whose ranks are the world; default: all ranks that were launched.
    timeout: seconds after which a collective raises CollectiveTimeout. Default 1800.
    warn_after: seconds after which a waiting rank says whom it waits for. Default 30.
    algorithm: one of auto, one_shot, two_shot, ring, tree. Default auto.
    tuning: file of `python -m ringreduce.tune`, by which auto chooses. Read by rank 0. Default: by
        what links are taken to cost.

    Every argument but comm has a variable, RINGREDUCE_TIMEOUT and so on; the argument wins. Raises
    MismatchError, on every rank, if the ranks were given different values; ValueError for a bad
    one; RingReduceError if launched by an mpirun that is not of mpi4py's MPI, or if open with other
    arguments.
    """
    given = {
        "timeout": timeout,
        "algorithm": algorithm,
        "warn_after": warn_after,
        "tuning": tuning,
    }
    with _World.lock:
        _refuse_in_child()
        if _World.communicator is not None and _World.communicator.core.closed:
            shutdown()  # somebody closed the world itself
        if _World.communicator is None:
            _open(comm, given)
        else:
            _require_same(comm, given)


def shutdown() -> None:
    """Finishes what is under way and closes all communicators. Waits for nothing else.

    Other ranks that still wait for this one get PeerFailed. Raises the error of an asynchronous
    operation that nobody waited for. Does nothing when there is no world.
    """
    with _World.lock:
        bootstrap = _World.bootstrap
        if bootstrap is None:
            return
        _publish(None)
        _World.bootstrap = None
        _World.closed = True
        aborted = any(core.aborted for core in bootstrap.opened)
        try:
            ending.close_all(bootstrap, bootstrap.settings.timeout_s)
        finally:
            ending.release()
            if not aborted:  # else a thread of ours may still be in MPI
                bootstrap.close()


def is_initialized() -> bool:
    """Whether the world is open. Never opens it."""
    return _World.communicator is not None


def world() -> Communicator:
    """The communicator of all ranks. Opens it on first use (collective then).

    Raises NotInitialized after `shutdown()`.
    """
    communicator = _World.communicator
    if communicator is not None:
        return communicator
    with _World.lock:
        _refuse_in_child()
        if _World.closed:
            raise NotInitialized("shutdown() has closed the world; call init() to open it again")
        init()
        assert _World.communicator is not None
        return _World.communicator


def rank() -> int:
    """Number of this rank: 0 to size() - 1."""
    return world().rank


def size() -> int:
    """Number of ranks of the job."""
    return world().size


def local_rank() -> int:
    """Number of this rank among those that share memory with it: 0 to local_size() - 1."""
    return world().local_rank


def local_size() -> int:
    """Number of ranks that share memory with this one, itself included."""
    return world().local_size


def _open(comm: MPI.Intracomm | Bootstrap | None, given: dict[str, Any]) -> None:
    wanted: Settings | Exception
    try:
        wanted = settings.read(os.environ, **given)
        timeout_s = wanted.timeout_s
    except (TypeError, ValueError) as error:
        wanted, timeout_s = error, settings.read({}).timeout_s
    bootstrap = from_environment(comm, timeout_s)
    ending.guard(bootstrap)
    try:
        bootstrap.settings = settings.agree(bootstrap.exchange, bootstrap.rank, wanted)
    except CollectiveTimeout:
        raise
    except Exception:
        ending.release()  # all ranks raise here, so each can say why and end by itself
        bootstrap.close()
        raise
    if bootstrap.size > 1:
        os.environ[RANK_PROCESS] = str(os.getpid())
    _set_up_log(bootstrap)
    core = bootstrap.open_core("world")
    _share_cores(core.window_info()["cores"], core.local_rank, core.local_size)
    _World.bootstrap = bootstrap
    _World.closed = False
    _publish(Communicator(core, bootstrap))


def _publish(communicator: Communicator | None) -> None:
    """The world, or that there is none: to Python, and to the core's short way into it."""
    _World.communicator = communicator
    _core.learn_world(None if communicator is None else communicator.core)


def _require_same(comm: MPI.Intracomm | Bootstrap | None, given: dict[str, Any]) -> None:
    """A second init must not change anything: half of the program would run under other rules."""
    bootstrap = _World.bootstrap
    assert bootstrap is not None
    source = bootstrap.source if isinstance(bootstrap, MpiBootstrap) else None
    if comm is not None and comm not in (bootstrap, source):
        raise RingReduceError(
            "init() was called before, or the first use did it, over another communicator; call "
            "init(comm) before anything else of ringreduce, or shutdown() first"
        )
    wanted = settings.read({}, **given)
    for setting in settings.SETTINGS:
        if setting.argument is None or given[setting.argument] is None:
            continue
        now, new = getattr(bootstrap.settings, setting.field), getattr(wanted, setting.field)
        if now != new:
            raise RingReduceError(
                f"init({setting.argument}={new!r}) comes too late: the world is open with {now!r}; "
                "call it before anything else of ringreduce, or shutdown() first"
            )


def _refuse_in_child() -> None:
    if _World.forked_from is not None:
        raise NotInitialized(no_rank("forked", _World.forked_from))


def _after_fork() -> None:
    if _World.bootstrap is not None or _World.closed:
        _World.forked_from = os.getppid()
    _publish(None)
    _World.bootstrap = None
    _World.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _set_up_log(bootstrap: Bootstrap) -> None:
    """Says on stderr what RINGREDUCE_LOG asks for, unless the program has a log of its own."""
    if bootstrap.rank == 0:
        settings.warn_about_unknown(os.environ)
    if _log.level == logging.NOTSET:
        _log.setLevel(bootstrap.settings.log.upper())
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"ringreduce rank {bootstrap.rank}: %(message)s"))
        _log.addHandler(handler)


def _share_cores(cores: int, local_rank: int, local_size: int) -> None:
    """Gives each rank its part of the node: mpirun sets no number of threads, so each takes all."""
    if local_size == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, cores // local_size)
    limit_threads(threads)
    if local_rank == 0:
        _log.info("%d threads a rank for torch: OMP_NUM_THREADS is not set", threads)
