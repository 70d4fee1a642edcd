"""How a job ends: on an error all ranks at once, each after it has said why; else without an error.

Without this an exception on one rank leaves the others waiting in a collective, and itself in
MPI_Finalize. It knows communicators only as cores of the extension, and nothing of what they carry.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from ringreduce import _core
from ringreduce.bootstrap import Bootstrap
from ringreduce.errors import RingReduceError

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
REPORT_S = 0.15  # Open MPI sends SIGTERM 0.25 s after the first rank died
REPORT_TO_HOSTS_S = 0.5  # whether ranks of other hosts have reported, nobody here knows
LEAVE_S = 1.0
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "hydra_pmi_proxy")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
DRAIN_AT_EXIT_S = 5.0  # for asynchronous operations that nobody waited for

_log = logging.getLogger("ringreduce")


class _State:
    """Of this process. Cleared in a forked child, which must not speak for its parent."""

    bootstrap: Bootstrap | None = None  # of the world, while it is open or being opened
    # A communicator of more than one rank was aborted: MPI_Finalize may never return.
    poisoned = False
    exit_handled = False
    exceptions_handled = False
    leaving = threading.Lock()  # taken by the first thread that ends the process, never released


def guard(bootstrap: Bootstrap) -> None:
    """From now on the end of this process is the end of all communicators opened through bootstrap.

    Called before the first exchange, so that a rank that fails during start-up ends the job too,
    and after mpi4py was imported: our exit handler must run before MPI_Finalize.
    """
    _State.bootstrap = bootstrap
    if not _State.exit_handled:
        _State.exit_handled = True
        atexit.register(_at_exit)
    if bootstrap.size > 1 and not _State.exceptions_handled:
        _State.exceptions_handled = True
        _hook_exceptions()
        _die_with_launcher()


def _die_with_launcher() -> None:
    """Open MPI tells ranks that mpirun was killed only within MPI calls, and we make few."""
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        return
    if parent in LAUNCHERS:
        die_with_parent()


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends; nothing happens if that has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def release() -> None:
    """The world is closed, or all ranks agreed not to open it: its end is the program's own."""
    _State.bootstrap = None


def close_all(bootstrap: Bootstrap, drain_s: float) -> None:
    """Finishes the asynchronous operations of all communicators of this bootstrap, and closes them.

    Peers that wait for this rank later are told that it has left. Raises the first error of an
    operation that nobody waited for, after everything is closed.
    """
    limit = time.monotonic() + drain_s
    problem: RingReduceError | TimeoutError | None = None
    for core in list(bootstrap.opened):
        if not core.closed:
            try:
                core.drain(max(limit - time.monotonic(), 0.0))
            except (RingReduceError, TimeoutError) as error:
                problem = problem or error
            core.close()
        if core.aborted and core.size > 1 and bootstrap is _State.bootstrap:
            _State.poisoned = True
    bootstrap.opened.clear()
    if problem is not None:
        raise problem


def abort_all(bootstrap: Bootstrap, reason: str) -> None:
    """Every rank that shares a communicator with this one gets PeerFailed with this reason."""
    reason = reason.encode(errors="backslashreplace").decode()  # names of files may be no UTF-8
    for core in list(bootstrap.opened):
        if not core.closed:
            core.abort(reason)


def _hook_exceptions() -> None:
    """Chains to the hooks that are there, which print the traceback as before."""
    print_uncaught, print_uncaught_in_thread = sys.excepthook, threading.excepthook

    def uncaught(
        kind: type[BaseException], value: BaseException, trace: TracebackType | None
    ) -> None:
        _end_on_error(kind, value, lambda: print_uncaught(kind, value, trace))

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if issubclass(arguments.exc_type, SystemExit):  # ends that thread alone, by Python's rules
            print_uncaught_in_thread(arguments)
            return
        value = arguments.exc_value or arguments.exc_type()
        _end_on_error(arguments.exc_type, value, lambda: print_uncaught_in_thread(arguments))

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread


def _end_on_error(
    kind: type[BaseException], value: BaseException, print_traceback: Callable[[], object]
) -> None:
    """An exception nobody caught: ends all ranks, except where there is a prompt to return to."""
    bootstrap = _State.bootstrap
    if bootstrap is None or bootstrap.size == 1 or sys.flags.interactive or hasattr(sys, "ps1"):
        print_traceback()
        return
    _State.leaving.acquire()
    text = "".join(traceback.format_exception_only(kind, value)).strip()
    abort_all(bootstrap, f"rank {bootstrap.rank} raised {text}")
    print_traceback()
    _report(bootstrap)
    _leave_by_alarm(LEAVE_S)
    bootstrap.abort(EXIT_CODE)
    _leave()


def _at_exit() -> None:
    """Leaves the communicators, before MPI_Finalize; never reaches that with an aborted one."""
    bootstrap = _State.bootstrap
    cores = [] if bootstrap is None else list(bootstrap.opened)
    if bootstrap is not None:
        if any(core.aborted and core.size > 1 for core in cores):
            _report(bootstrap)
            _leave()
        try:
            close_all(bootstrap, DRAIN_AT_EXIT_S)
        except (RingReduceError, TimeoutError) as error:
            _log.warning(
                "at exit, in an asynchronous operation that nobody waited for: %s; call wait() on "
                "what async_op=True returns",
                error,
            )
    if _State.poisoned:
        _await_reports([core for core in cores if core.aborted])
        _leave()


def _report(bootstrap: Bootstrap) -> None:
    """Tells the other ranks that our message is out, and waits briefly for theirs."""
    _flush()
    cores = [core for core in bootstrap.opened if not core.closed]
    for core in cores:
        core.mark_reported()
    _await_reports(cores)


def _await_reports(cores: list[_core.Communicator]) -> None:
    """Briefly: launchers end all ranks when one ends without MPI_Finalize, MPICH's at once."""
    several_hosts = any(core.window_info()["nodes"] > 1 for core in cores)
    limit = time.monotonic() + (REPORT_TO_HOSTS_S if several_hosts else REPORT_S)
    while not all(core.all_reported() for core in cores) and time.monotonic() < limit:
        time.sleep(1e-3)


def _leave_by_alarm(after_s: float) -> None:
    """The kernel ends us then: a hanging MPI_Abort holds the GIL, so no thread could."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, after_s)


def _leave() -> NoReturn:
    _flush()
    os._exit(EXIT_CODE)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Absent, a closed pipe, a closed file: nothing that can be helped now.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


def _after_fork() -> None:
    """In a forked child: the communicators are its parent's, not to be closed or aborted here."""
    _State.bootstrap = None
    _State.poisoned = False
    _State.leaving = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
