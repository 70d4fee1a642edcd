"""The program that everyone runs first: it learns, and checks itself, and its check can fail."""

import os
import re
import sys
from pathlib import Path

import pytest
from jobs import run_to_end

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"


def number(pattern, output):
    found = re.search(pattern, output)
    assert found, output
    return float(found[1])


def assert_trained(output, done, ranks):
    """output: the part of what `done` printed that is of this training."""
    assert done.returncode == 0, done.stderr
    assert output.count("test accuracy") == 1, "rank 0 alone reports"
    assert f"{ranks} ranks" in output
    assert number(r"test accuracy (\S+)", output) > 0.96
    assert number(r"samples/s +(\S+)", output) > 0
    assert 0 <= number(r"communication +(\S+)%", output) <= 100


def test_plain_python(tmp_path):
    picture = tmp_path / "digits.png"
    command = [sys.executable, str(TRAIN), "--plot", str(picture)]
    done = run_to_end(command, dict(os.environ), 120.0)
    assert_trained(done.stdout, done, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")


def differences(output):
    """Of the parameters, and of the losses."""
    patterns = (r"difference of parameters (\S+)", r"losses of 100 steps (\S+)")
    return [number(pattern, output) for pattern in patterns]


@pytest.mark.core
def test_equals_one_process(mpirun):
    done = mpirun(3, [str(TRAIN), "--check"], timeout_s=120)
    assert_trained(done.stdout, done, 3)
    parameters, losses = differences(done.stdout)
    assert parameters <= 1e-2 and losses <= 1e-5


# First two of the ranks by themselves: a job of their own would be imports for the most part.
TWO_THEN_ALL = f"""
import runpy, sys
from mpi4py import MPI
import ringreduce as rr

def run(*arguments):
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path({str(TRAIN)!r}, run_name="__main__")
    except SystemExit as end:
        return end.code

two = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank < 2 else MPI.UNDEFINED)
if two != MPI.COMM_NULL:
    rr.init(two)
    assert run("--batch", "241") == 2
    right = rr.DistributedModel
    rr.DistributedModel = lambda network: right(network, op="sum")
    assert run("--check", "--steps", "100") == 1
    rr.DistributedModel = right
    if rr.rank() == 0:
        print("all", flush=True)
    rr.shutdown()
rr.init()
sys.exit(run("--check", "--dtype", "float64"))
"""


@pytest.mark.core
@pytest.mark.slow
def test_eight_equal_one_process_and_of_two_the_check_fails(mpirun):
    done = mpirun(8, TWO_THEN_ALL, timeout_s=280)
    two, of_all = done.stdout.split("all\n")
    assert done.stderr.count("--batch must be a multiple of 2") == 2, done.stderr
    assert differences(two)[1] > 1e-5
    assert_trained(of_all, done, 8)
    assert max(differences(of_all)) <= 1e-12
