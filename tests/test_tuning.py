"""The constants of a cluster: what is measured, the file, and how they reach every rank's tuner."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ringreduce import _core, settings, testing, tune, tuning
from ringreduce.errors import MismatchError, RingReduceError

ALLREDUCE = _core.KINDS["allreduce"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "links.json"
    tuning.write(str(path), {"one_shot_bytes": 32768, "network_us": 7.5}, {"hosts": 2})
    return str(path)


# --- the file


def test_what_is_written_is_read(file):
    assert tuning.read(file) == {"one_shot_bytes": 32768.0, "network_us": 7.5}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, tmp_path):
    with pytest.raises(TypeError):
        tuning.write(file, {"one_shot_bytes": 1.0}, {"hosts": object()})
    assert tuning.read(file)["network_us"] == 7.5
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ('{"version": 1, "const', "not JSON"),
        ("[]", "not written by"),
        ({"version": 1}, "not written by"),
        ({"version": 2, "constants": {}}, "version 2, not 1"),
        ({"constants": {}}, "version None, not 1"),
        ({"version": 1, "constants": {"network_ns": 1}}, "unknown constant 'network_ns'"),
        ({"version": 1, "constants": {"network_us": 0}}, "network_us must be a positive number"),
        ({"version": 1, "constants": {"network_us": "1"}}, "network_us must be a positive number"),
        ({"version": 1, "constants": {"network_us": True}}, "network_us must be a positive number"),
        ('{"version": 1, "constants": {"network_us": NaN}}', "must be a positive number, not nan"),
    ],
)
def test_a_bad_file_is_named_on_every_rank(content, complaint, tmp_path):
    path = tmp_path / "links.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    wanted = settings.read({}, tuning=path)

    def fn(comm):
        with pytest.raises((ValueError, RingReduceError)) as caught:
            settings.agree(comm.bootstrap.exchange, comm.rank, wanted)
        return type(caught.value), str(caught.value)

    (first, said), (second, heard) = testing.run_threads(2, fn, timeout_s=20)
    assert first is ValueError and str(path) in said and complaint in said
    assert second is RingReduceError and heard == f"rank 0 could not start: ValueError: {said}"
    assert said.startswith("RINGREDUCE_TUNING / init(tuning=...): ")


def test_rank_0_reads_the_file_for_all(file, monkeypatch):
    reads = []
    monkeypatch.setattr(
        settings.tuning, "read", lambda path: reads.append(path) or {"meeting_us": 3.0}
    )
    wanted = settings.read({"RINGREDUCE_TUNING": file})
    agreed = testing.run_threads(
        3, lambda comm: settings.agree(comm.bootstrap.exchange, comm.rank, wanted), timeout_s=20
    )
    assert reads == [file]
    assert [each.constants for each in agreed] == 3 * [{"meeting_us": 3.0}]


def test_ranks_must_name_the_same_file(file):
    wanted = [settings.read({}, tuning=file), settings.read({})]

    def fn(comm):
        with pytest.raises(MismatchError, match=rf"RINGREDUCE_TUNING / .* is {file} on rank 0 but"):
            settings.agree(comm.bootstrap.exchange, comm.rank, wanted[comm.rank])

    testing.run_threads(2, fn, timeout_s=20)


# --- what follows from it


def test_constants_reach_the_tuner_and_those_of_parts(file):
    x = [np.float32([1e8, 1, -1e8] * 1500), np.float32([3, 1e8, 5] * 1500)]

    def fn(comm):
        part = comm.split(0)
        choices = [each.core.choice(ALLREDUCE, x[0].nbytes) for each in (comm, part)]
        sums = [each.allreduce(x[comm.rank]) for each in (comm, part)]
        return choices, comm.core.constants()["network_us"], np.stack(sums).tobytes()

    by_source = testing.run_threads(2, fn, timeout_s=20)
    by_file = testing.run_threads(2, fn, timeout_s=20, tuning=file)
    assert [each[:2] for each in by_source] == 2 * [(2 * ["two_shot"], 20.0)]
    assert [each[:2] for each in by_file] == 2 * [(2 * ["one_shot"], 7.5)]
    assert {each[2] for each in by_source} == {each[2] for each in by_file}  # and no bit differs


def test_no_file_asks_more_of_one_shot_than_its_memory_takes():
    def fn(comm):
        constants = {"one_shot_bytes": 1e9}
        comm.bootstrap.settings = settings.replace(comm.bootstrap.settings, constants=constants)
        core = comm.split(0).core
        return [core.choice(ALLREDUCE, size) for size in (65536, 65537)]

    assert testing.run_threads(2, fn, timeout_s=20) == 2 * [["one_shot", "two_shot"]]


def test_the_core_refuses_what_it_does_not_know():
    def fn(comm):
        comm.bootstrap.settings = settings.replace(
            comm.bootstrap.settings, constants={"network_ns": 1.0}
        )
        comm.split(0)

    with pytest.raises(ValueError, match="no constant network_ns"):
        testing.run_threads(1, fn, timeout_s=20)


# --- what is measured


def test_the_limit_with_the_least_loss():
    one_shot = np.array([1.0, 1.1, 1.3, 2.0, 3.0, 5.0])  # by size, from 1 KB
    two_shot = np.array([1.4, 1.4, 1.4, 1.5, 1.6, 1.8])
    times_s = np.stack([np.stack([one_shot, two_shot], axis=1)] * 2)
    assert tune.best_limit(times_s) == 4096
    times_s[0, 4, 1] *= 3  # a disturbance
    assert tune.best_limit(times_s) == 4096
    times_s[:, :, 0] = 9
    assert tune.best_limit(times_s) == 512
    times_s[:, :, 1] = 99
    assert tune.best_limit(times_s) == 32768


def test_the_rate_of_a_link():
    sizes_bytes, alpha_s, beta_s = (1 << 20, 3 << 20), 1e-4, 1e-9
    times_s = [alpha_s + 2 * size * beta_s for size in sizes_bytes]
    assert tune.rate_gb_per_s(times_s, sizes_bytes, 2) == pytest.approx(1.0)
    assert tune.rate_gb_per_s([2.0, 1.9], sizes_bytes, 1) == pytest.approx(3 * (1 << 20) / 1.9e9)


MEASURE = """
import os, sys
from mpi4py import MPI
os.environ["RINGREDUCE_HOST"] = "aab"[MPI.COMM_WORLD.rank]
from ringreduce import tune
sys.argv = ["tune", os.environ["FILE"], "--seconds", "0.3"]
tune.main()
"""


def test_hosts_are_measured(mpirun, tmp_path):
    path = tmp_path / "links.json"
    done = mpirun(3, MEASURE, env={"FILE": str(path)})
    assert done.returncode == 0, done.stderr
    constants = tuning.read(str(path))
    assert constants.keys() == _core.CONSTANTS.keys()
    assert 0.1 < constants["network_us"] < 1e5 and 0.001 < constants["network_rank_gb_per_s"] < 1000
    assert json.loads(path.read_text())["measured"]["hosts"] == 2
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines[lines.index("allreduce") + 1 : -1]]
    assert rows[0] == ["bytes", "algorithm", "segments", "chunk", "predicted", "measured"]
    assert rows[1][:3] == ["8", "B", "doubling"] and len(rows) == 11
    # The same table, by the file, on one rank.
    done = subprocess.run(
        [sys.executable, "-m", "ringreduce.info", "--tuning", "--json"],
        env=os.environ | {"RINGREDUCE_TUNING": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {row["from"] for row in shown["constants"]} == {str(path)}
    assert {row["constant"]: float(row["value"]) for row in shown["constants"]} == constants
    assert len(shown["allreduce"]) == 10


def test_nothing_is_measured_that_cannot_be_written(mpirun, tmp_path):
    done = mpirun(3, MEASURE, env={"FILE": str(tmp_path / "nowhere" / "links.json")})
    assert done.returncode != 0
    assert "nowhere/links.json: No such file or directory" in done.stderr
