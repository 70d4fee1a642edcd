"""run_threads and run_forks themselves: results, errors, time limits, and that nothing is left."""

import gc
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from ringreduce import testing
from ringreduce.errors import PeerFailed


def test_results_come_in_rank_order(ranks):
    def fn(comm):
        comm.barrier()
        return comm.rank, comm.size

    assert ranks(4, fn) == [(rank, 4) for rank in range(4)]


def test_an_error_is_raised_with_its_rank_and_wakes_the_others(ranks):
    def fn(comm):
        if comm.rank == 2:
            raise ValueError("only here")
        comm.barrier()

    with pytest.raises(ValueError, match="only here") as caught:
        ranks(4, fn, timeout_s=20)
    assert str(caught.value.__cause__).startswith("in rank 2\nTraceback")
    assert "in fn" in str(caught.value.__cause__)


# Also a name of a file that is no UTF-8, and more than is told, cut within a character.
@pytest.mark.parametrize(
    "text", ["seen", "seen: \udcff.png", *("seen" + a + "你" * 999 for a in "xy")]
)
def test_an_error_is_seen_by_the_others_as_what_it_is(ranks, text):
    def fn(comm):
        if comm.rank == 0:
            raise ValueError(text)
        with pytest.raises(PeerFailed, match="rank 0 raised ValueError: seen"):
            comm.barrier()
        raise KeyError("later, so not the cause")

    with pytest.raises(ValueError, match="seen"):
        ranks(3, fn, timeout_s=20)


def test_the_time_limit_shows_where_each_rank_is(ranks):
    def stuck_in_here(comm):
        if comm.rank == 1:
            for _ in range(200):  # well past the limit, and no longer
                time.sleep(0.01)
        comm.barrier()

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"still ran after 1 s") as caught:
        ranks(3, stuck_in_here, timeout_s=1)
    assert str(caught.value).count("in stuck_in_here") == 3
    assert time.monotonic() - start < 8


def test_a_stopped_rank_is_killed(monkeypatch):
    monkeypatch.setattr(testing, "GRACE_S", 0.5)  # it shows no stacks, however long one waits

    def fn(comm):
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.barrier()

    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran"):
        testing.run_forks(2, fn, timeout_s=0.5)
    assert no_children()


def test_killed_ranks_must_be_announced_and_must_die():
    def fn(comm):
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerFailed, match="rank 1"):
            comm.barrier()
        return True

    assert testing.run_forks(3, fn, timeout_s=20, killed=[1]) == [True, None, True]
    with pytest.raises(AssertionError, match="rank 1 ended early, with exit code -9"):
        testing.run_forks(3, fn, timeout_s=20)
    with pytest.raises(AssertionError, match="rank 0 ended early, with exit code 0"):
        testing.run_forks(2, lambda comm: None, timeout_s=20, killed=[0])


@pytest.mark.parametrize("code", [0, 3])
def test_a_fork_that_leaves_without_a_result_is_an_error(code):
    with pytest.raises(AssertionError, match=f"rank 1 ended early, with exit code {code}"):
        testing.run_forks(2, lambda comm: os._exit(code) if comm.rank else None, timeout_s=20)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        testing.run_forks(1, lambda comm: lambda: None, timeout_s=20)


def test_forks_leave_nothing_behind():
    gc.collect()  # what other tests left, or it closes its files in between
    files, threads = os.listdir("/proc/self/fd"), threading.active_count()
    for _ in range(3):
        testing.run_forks(3, lambda comm: comm.barrier(), timeout_s=20)
    assert os.listdir("/proc/self/fd") == files
    assert threading.active_count() == threads
    assert no_children()


def test_threads_leave_nothing_behind():
    gc.collect()
    testing.run_threads(3, lambda comm: comm.barrier(), timeout_s=20)
    files, threads = os.listdir("/proc/self/fd"), threading.active_count()
    for _ in range(3):
        testing.run_threads(3, lambda comm: comm.barrier(), timeout_s=20)
    assert len(os.listdir("/proc/self/fd")) == len(files)
    assert threading.active_count() == threads


def test_exit_handlers_of_the_test_do_not_run_in_its_forks(tmp_path):
    import atexit

    def note():
        (tmp_path / str(os.getpid())).touch()

    atexit.register(note)
    try:
        testing.run_forks(2, lambda comm: None, timeout_s=20)
        assert list(tmp_path.iterdir()) == []
    finally:
        atexit.unregister(note)


def test_options_reach_the_communicator(ranks):
    def fn(comm):
        return comm.bootstrap.settings.timeout_s, comm.bootstrap.settings.algorithm

    assert ranks(2, fn, timeout=3, algorithm="tree") == [(3.0, "tree")] * 2
    with pytest.raises(ValueError, match="timeout"):
        ranks(2, fn, timeout=-3)


def test_mpirun_shows_the_stacks_of_a_job_that_hangs_and_kills_it(mpirun):
    script = """
import os, time
def stuck_in_here():
    time.sleep(60)
os.write(1, f"pid {os.getpid()}\\n".encode())
stuck_in_here()
"""
    with pytest.raises(pytest.fail.Exception, match="ran longer than 3 s") as caught:
        mpirun(2, script, timeout_s=3)
    assert str(caught.value).count("in stuck_in_here") == 2
    pids = re.findall(r"pid (\d+)", str(caught.value))
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


def is_running(pid):
    """Not so for a zombie: whoever adopted it may not have looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def no_children():
    try:
        return os.waitpid(-1, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return True
