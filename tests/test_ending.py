"""How a job ends: one rank's exception ends all of them, each says why, and the status is not 0."""

import re
import signal
import time

import pytest

pytestmark = pytest.mark.core

HEAD = """
import os, signal, sys, threading, time
import ringreduce as rr
rr.init(timeout=20)
rank = rr.rank()
os.write(1, f"rank {rank} started\\n".encode())
rr.barrier()
"""


def run_ending(mpirun, size, script):
    done = mpirun(size, HEAD + script, timeout_s=40)
    assert done.stdout.count("started") == size, done.stderr
    return done


def check_survivors(done, mpi_name, number, pattern):
    """So many ranks have said PeerFailed and why. Only Open MPI's launcher loses nothing of it."""
    lines = [line for line in done.stderr.splitlines() if "PeerFailed: " in line]
    assert len(lines) == number or (mpi_name != "Open MPI" and 0 < len(lines) < number), done.stderr
    for line in lines:
        assert re.search(pattern, line), line


def check_status(done, mpi_name):
    """That of a rank which has seen the error.

    Unless Open MPI's launcher has crashed itself: when a job fails while one of its ranks waits in
    MPI_Finalize, prterun of Open MPI 5.0 dies of SIGSEGV in PMIx_server_finalize now and then, at
    its very end; so it does with mpi4py alone, with MPI_Abort or without. A crash of a rank is
    another status, 128 + the signal.
    """
    launcher_crashed = mpi_name == "Open MPI" and done.returncode == -signal.SIGSEGV
    assert done.returncode == 70 or launcher_crashed, (done.returncode, done.stderr)


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_exception_ends_all_ranks_with_its_reason(mpirun, mpi_name, culprit):
    done = run_ending(
        mpirun,
        4,
        f"""
if rank == {culprit}:
    raise ValueError("bad batch")
rr.barrier()
""",
    )
    assert done.returncode == 70
    assert "bad batch" in done.stderr  # in pieces, where the launcher mixes the ranks' lines
    check_survivors(done, mpi_name, 3, f"rank {culprit} raised ValueError: bad batch")


def test_an_exception_outside_of_collectives_ends_all_ranks_at_once(mpirun):
    start = time.monotonic()
    done = run_ending(
        mpirun,
        3,
        """
if rank == 1:
    raise KeyError("label")
time.sleep(30)
""",
    )
    assert done.returncode == 70
    assert "KeyError: 'label'" in done.stderr
    assert time.monotonic() - start < 15


def test_an_exception_in_a_thread_ends_all_ranks(mpirun):
    done = run_ending(
        mpirun,
        3,
        """
def work():
    raise ValueError("in a thread")

if rank == 1:
    threading.Thread(target=work).start()
rr.barrier()
rr.barrier()
if rank == 1:
    time.sleep(30)
rr.barrier()
""",
    )
    assert done.returncode == 70
    assert "rank 1 raised ValueError: in a thread" in done.stderr


def test_ctrl_c_ends_all_ranks(mpirun):
    done = run_ending(
        mpirun,
        3,
        """
if rank == 1:
    signal.raise_signal(signal.SIGINT)
rr.barrier()
""",
    )
    assert done.returncode == 70
    assert "rank 1 raised KeyboardInterrupt" in done.stderr


def test_ctrl_c_in_init_ends_all_ranks(mpirun, mpi_name):
    """The others are in an exchange of the bootstrap, where nothing of the core can wake them."""
    done = mpirun(
        3,
        """
import ringreduce as rr
from ringreduce import bootstrap
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    def interrupted(self, request):
        raise KeyboardInterrupt
    bootstrap.MpiBootstrap._wait = interrupted
rr.init(timeout=30)
""",
        timeout_s=20,
    )
    assert done.returncode == 70
    if mpi_name == "Open MPI":  # others' launchers drop what comes just before MPI_Abort
        assert "KeyboardInterrupt" in done.stderr


def test_an_early_exit_is_no_error_of_its_own_but_named_by_who_waits(mpirun, mpi_name):
    done = run_ending(
        mpirun,
        3,
        """
if rank == 1:
    sys.exit(0)
rr.barrier()
""",
    )
    check_status(done, mpi_name)
    check_survivors(done, mpi_name, 2, "rank 1 .*exited")


def test_exits_at_different_times_are_clean(mpirun):
    done = run_ending(mpirun, 4, "time.sleep(0.1 * rank)\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shutdown_before_the_end_is_clean(mpirun):
    done = run_ending(mpirun, 3, "rr.shutdown()\nassert not rr.is_initialized()\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_exception_after_shutdown_is_the_programs_own(mpirun):
    done = run_ending(
        mpirun,
        2,
        """
rr.shutdown()
if rank == 1:
    raise ValueError("late")
""",
    )
    assert done.returncode == 1
    assert "PeerFailed" not in done.stderr


def test_who_catches_the_error_still_does_not_end_well(mpirun, mpi_name, tmp_path):
    """The survivor may save what it needs; MPI_Finalize would wait for the lost rank for ever."""
    saved = tmp_path / "saved"  # a file, since the launcher of MPICH may lose what is printed last
    done = run_ending(
        mpirun,
        2,
        f"""
if rank == 1:
    sys.exit(0)
try:
    rr.barrier()
except rr.PeerFailed:
    open({str(saved)!r}, "w").close()
rr.shutdown()
""",
    )
    # Intel's launcher kills the other rank, which has ended, and may report that one's status.
    if mpi_name == "Intel":
        assert done.returncode != 0
    else:
        check_status(done, mpi_name)
    assert saved.exists()


def test_a_forked_child_ends_without_a_trace(mpirun):
    done = run_ending(
        mpirun,
        2,
        """
pid = os.fork()
if pid == 0:
    try:
        rr.barrier()
    except rr.RingReduceError as error:
        assert "forked" in str(error), error
        os.write(1, b"refused\\n")
    sys.stdout.flush()
    import atexit
    atexit._run_exitfuncs()  # what a normal exit would do, but for MPI's own
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
rr.barrier()
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("refused") == 2


def test_a_killed_rank_is_named_by_all_others(mpirun, mpi_name):
    done = run_ending(
        mpirun,
        4,
        """
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
rr.barrier()
""",
    )
    assert done.returncode != 0
    if mpi_name == "Open MPI":  # other launchers kill the others faster than they can speak
        check_survivors(done, mpi_name, 3, "rank 2")
