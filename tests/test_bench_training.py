"""The training benchmark: its arithmetic, a short run under mpirun, and that its check can fail.

Nothing here fails because a machine is slow.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Mpirun

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_training.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def make_row(script: dict[str, Any]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "model": "tiny",
            "elements": 250,
            "gradient_bytes": 1000,
            "seconds": {
                "local": [0.010, 0.030, 0.011],
                "ddp": [0.018, 0.034, 0.020],
                "ringreduce": [0.012, 0.033, 0.012],
            },
            "grown_bytes": {"local": 2000.0, "ddp": 4500.0, "ringreduce": 3000.0},
            "difference": 0.0,
        }
        return script["make_row"](**arguments | changes)

    return make


def test_what_is_added_is_taken_within_each_round(make_row: Callable[..., Any]) -> None:
    row = make_row()
    assert row.local_ms == pytest.approx(11)
    assert row.added_ms == pytest.approx({"ddp": 8, "ringreduce": 2})  # of 8, 4, 9 and 2, 3, 1
    assert row.ratio == pytest.approx(0.25)
    assert row.extra_memory == {"ddp": 2.5, "ringreduce": 1.0}


def test_what_was_not_measured_is_not_made_up(
    script: dict[str, Any], make_row: Callable[..., Any]
) -> None:
    times = {"local": [0.02], "ddp": [0.01], "ringreduce": [0.03]}  # noise: DDP below local
    row = make_row(seconds=times, grown_bytes=dict.fromkeys(script["WAYS"]))
    assert row.ratio is None
    assert row.extra_memory == {"ddp": None, "ringreduce": None}
    assert script["line"](row).split()[-3:] == ["-", "-", "-"]


def test_gradients_are_compared_one_by_one(script: dict[str, Any]) -> None:
    difference = script["largest_difference"]
    large, small = torch.tensor([1e6, -2e6]), torch.tensor([1e-6, 0.0])
    assert difference([large, small], [large, small]) == 0
    assert difference([large, 2 * small], [large, small]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("mlp", 24e6, 26e6), ("gpt", 2e6, 5e6), ("tiny", 400 * 1024, 400 * 1100)],
)
def test_models_are_as_large_as_they_are_said_to_be(
    script: dict[str, Any], name: str, low: float, high: float
) -> None:
    with torch.device("meta"):
        model = script["TASKS"][name].build()
    assert low <= sum(p.numel() for p in model.parameters()) <= high


# One job for both runs, since most of its time goes into imports.
SHORT_AND_SABOTAGED = f"""
import runpy, sys
import ringreduce as rr

def run(*arguments):
    sys.argv = ["bench_training.py", "--models", "tiny", *arguments]
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")

try:
    run("--rounds", "2", "--json", "report.json")
except SystemExit as end:
    assert end.code == 0
else:
    raise AssertionError("no exit")
if rr.rank() == 0:
    print("sabotage", flush=True)
right = rr.DistributedModel
rr.DistributedModel = lambda module, comm: right(module, op="sum", comm=comm)
run("--rounds", "1")
"""


@pytest.mark.slow
def test_a_short_run_and_one_whose_gradients_are_wrong(
    mpirun: Mpirun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mpirun(2, SHORT_AND_SABOTAGED, timeout_s=90)
    assert done.returncode == 1, done.stderr
    short, sabotaged = done.stdout.split("sabotage\n")
    assert short.count("ringreduce memory") == 1, "rank 0 alone reports"
    assert "torch threads of a rank" in short
    wrong = "tiny: the gradients are not DDP's"
    assert wrong not in short and wrong in sabotaged, done.stdout
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]
    assert row["parameters"] == 400 * (32 * 32 + 32)
    assert row["gradient_bytes"] == 4 * row["parameters"]
    assert [len(row["rounds_ms"][way]) for way in ("local", "ddp", "ringreduce")] == [2, 2, 2]
    assert row["difference"] == 0, "of two ranks, in float32, there is one order"
