"""python -m ringreduce.info: every section is there, and under mpirun once."""

import json
import os
import subprocess
import sys

import pytest

from ringreduce import _core, info

pytestmark = pytest.mark.core

SECTIONS = ["build", "packages", "MPI", "job", "settings"]


def test_alone():
    done = subprocess.run(
        [sys.executable, "-m", "ringreduce.info"],
        env=os.environ | {"RINGREDUCE_TIMEOUT": "7", "RINGREDUCE_TIMEOUTS": "8"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SECTIONS
    values = dict(line.strip().split(maxsplit=1) for line in lines if line.startswith("  "))
    assert values["ranks"].split()[-1] == "1"
    assert values["RINGREDUCE_TIMEOUT"].startswith("7: seconds")
    assert values["RINGREDUCE_ALGORITHM"].startswith("auto (default)")
    assert values["RINGREDUCE_TIMEOUTS"].endswith("did you mean RINGREDUCE_TIMEOUT?")
    assert "unavailable" in values["cuda"] or "." in values["cuda"]


@pytest.mark.parametrize(
    ("built", "devices", "unavailable", "shown"),
    [
        ("", 0, "built without CUDA", "unavailable: built without CUDA"),
        ("13.0 for sm_90", 0, "no device", "13.0 for sm_90; unavailable: no device (runtime 13.0)"),
        ("13.0 for sm_90", 2, "", "13.0 for sm_90; runtime 13.0; devices: 2"),
    ],
)
def test_cuda_or_why_not(monkeypatch, built, devices, unavailable, shown):
    found = dict(built=built, runtime="runtime 13.0", devices=devices, unavailable=unavailable)
    monkeypatch.setattr(_core, "cuda_info", lambda: found)
    assert info._cuda() == shown


def test_cuda_is_available_or_says_why_not():
    found = _core.cuda_info()
    assert (found["devices"] > 0) == (found["unavailable"] == ""), found


def test_under_mpirun(mpirun, mpi_name):
    done = mpirun(3, ["-m", "ringreduce.info", "--json"])
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)  # one rank's, or this fails
    assert list(sections) == SECTIONS
    assert sections["job"]["ranks"] == sections["job"]["ranks on this node"] == "3"
    assert sections["job"]["allreduce"].endswith("two_shot above")
    assert mpi_name in sections["MPI"]["library"]
    assert mpi_name in sections["MPI"]["launched by"]
    assert os.path.exists(sections["MPI"]["library file"])
    assert sections["MPI"]["takes GPU memory"] in ("yes, it is CUDA-aware", "no", "does not say")
