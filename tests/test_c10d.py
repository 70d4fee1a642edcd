"""The torch.distributed backend: its collectives, DDP on it, and how it is started and fails."""

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from c10d_programs import (
    ABOVE,
    COLLECTIVES,
    COMPILED,
    DDP_SCRIPT,
    DDP_VARIANTS,
    ERRORS,
    STORE,
)
from jobs import run_to_end
from wrapped import assert_trained_as_one_process

import ringreduce as rr
from ringreduce.c10d_channels import Channels, Pending


@pytest.mark.core
def test_collectives(mpirun):
    done = mpirun(3, COLLECTIVES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("well") == 3


@pytest.mark.core
def test_a_ddp_script_trains_as_one_process(mpirun, tmp_path):
    result = tmp_path / "model"
    done = mpirun(2, DDP_SCRIPT, env={"RESULT": str(result)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained_as_one_process(result)


def test_what_torch_builds_on_it_and_errors(mpirun):
    """One job for all scripts, since most of its time goes into imports."""
    close = "dist.destroy_process_group()\n"
    done = mpirun(2, COMPILED + DDP_VARIANTS + close + ABOVE + close + ERRORS)
    assert done.stdout.count("well") == 6, done.stdout + done.stderr
    assert done.returncode != 0
    assert done.stdout.count("mismatch") == 6, done.stdout + done.stderr
    assert "nobody catches this" in done.stderr and "PeerFailed" in done.stderr, done.stderr


@pytest.mark.core
def test_under_torchrun_without_mpi_and_in_a_world_of_one(tmp_path):
    """At once: while torchrun imports torch, its ranks do not."""
    (tmp_path / "of_two.py").write_text(STORE + DDP_SCRIPT)
    (tmp_path / "of_one.py").write_text(DDP_SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(name, *launcher):
        environment = os.environ | {"RESULT": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, str(tmp_path / f"{name}.py")]
        return run_to_end(command, environment, 60.0)

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, "of_two", *torchrun), pool.submit(run, "of_one")]
        of_two, of_one = (job.result() for job in jobs)
    assert of_two.returncode == 0, of_two.stdout + of_two.stderr
    assert sorted(of_two.stdout.splitlines()) == ["StoreBootstrap 0 2", "StoreBootstrap 1 2"]
    assert_trained_as_one_process(tmp_path / "of_two")
    assert of_one.returncode == 0, of_one.stdout + of_one.stderr


def test_recv_from_any_source_ends_at_its_deadline():
    class Nothing:
        def read(self, name):
            return 0

    channels = Channels(0, 3, None, Nothing(), 0.05)
    with pytest.raises(rr.CollectiveTimeout, match=r"any source.*0\.05 s"):
        channels.receive_any(torch.empty(1), 0).wait()
    channels.close()


def test_a_message_may_be_waited_for_again():
    """A wait's own timeout is Python's TimeoutError; the error of the message stays what it is."""
    future = Future()
    pending = Pending(future, torch.device("cpu"))
    with pytest.raises(TimeoutError, match="the wait's timeout"):
        pending.wait(0.001)
    future.set_exception(rr.CollectiveTimeout("nobody has sent"))
    with pytest.raises(rr.CollectiveTimeout, match="nobody has sent"):
        pending.wait(0.001)
