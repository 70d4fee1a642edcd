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


def assert_trained(done, ranks):
    output = done.stdout
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
    assert_trained(done, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.core
@pytest.mark.parametrize(
    "ranks, dtype", [(3, "float32"), pytest.param(8, "float64", marks=pytest.mark.slow)]
)
def test_equals_one_process(mpirun, ranks, dtype):
    done = mpirun(ranks, [str(TRAIN), "--check", "--dtype", dtype], timeout_s=280)
    assert_trained(done, ranks)
    parameters = number(r"difference of parameters (\S+)", done.stdout)
    losses = number(r"losses of 100 steps (\S+)", done.stdout)
    assert parameters <= (1e-12 if dtype == "float64" else 1e-2)
    assert losses <= (1e-12 if dtype == "float64" else 1e-5)


SABOTAGE = f"""
import runpy, sys
import ringreduce as rr
sys.argv = ["train.py", "--batch", "241"]
try:
    runpy.run_path({str(TRAIN)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 2
else:
    raise AssertionError("no exit")
right = rr.DistributedModel
rr.DistributedModel = lambda network: right(network, op="sum")
sys.argv = ["train.py", "--check", "--steps", "100"]
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


def test_a_batch_that_cannot_be_shared_and_a_check_that_fails(mpirun):
    done = mpirun(2, SABOTAGE, timeout_s=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("--batch must be a multiple of 2") == 2, done.stderr
    assert number(r"losses of 100 steps (\S+)", done.stdout) > 1e-5
