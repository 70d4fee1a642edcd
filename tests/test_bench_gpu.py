"""The benchmark for GPUs, where there is none: its arguments, its bounds, and a run on CPU tensors.

What stands in for a device here counts and waits for nothing; times mean nothing.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from ringreduce import _core, bench, bench_gpu
from ringreduce.bench_data import Job
from ringreduce.testing import run_threads

torch = pytest.importorskip("torch")

MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--graph"], "need --device cuda"),
        (["--threads", "2"], "need --device cuda"),
        (["--device", "cuda", "--peers", "mpi"], "are for CPUs"),
        (["--device", "cuda", "--limit"], "are for CPUs"),
        (["--device", "cuda", "--frameworks", "numpy"], "takes torch tensors"),
        (["--device", "cuda", "--threads", "0"], "--threads must be at least 1"),
        (["--device", "cuda", "--graph", "--collective", "allgather"], "--graph takes allreduce"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)
    assert reason in capsys.readouterr().err


def test_without_a_gpu_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_core, "cuda_info", lambda: {"unavailable": "no driver"})
    assert bench.main(["--device", "cuda", "--threads", "2"]) == 1
    assert "CUDA is unavailable: no driver" in capsys.readouterr().err


def test_traffic_is_what_the_algorithm_reads_and_writes() -> None:
    job = Job("allreduce", "sum", "float32", 4)
    assert bench_gpu.traffic_bytes(job, "two_shot", MIB) == 4 * 2 * MIB
    # For each of 4 parts: 4 inputs, 4 outputs, 3 sums and 3 results written and read once.
    assert bench_gpu.traffic_bytes(job, "ring", MIB) == 20 * MIB
    half = Job("allreduce", "sum", "bfloat16", 2)
    assert bench_gpu.traffic_bytes(half, "ring", MIB) == (2 * 2 + 2 * 2 + 2) * MIB
    assert bench_gpu.traffic_bytes(job, "one_shot", MIB) is None
    assert bench_gpu.traffic_bytes(Job("broadcast", "sum", "float32", 4), "ring", MIB) is None


class Graph:
    """Counts as torch.cuda.CUDAGraph would run."""

    replayed = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        Graph.replayed += 1


class OnCpu(bench_gpu.GpuBench):
    def allocate(self, memory: str, size_bytes: int) -> Any:
        if memory == "symmetric":
            return self.comm.empty((size_bytes,), torch.uint8)
        return torch.zeros(size_bytes, dtype=torch.uint8)


def run(arguments: list[str], ranks: int) -> tuple[list[Any], list[str]]:
    options: argparse.Namespace = bench.parse_arguments(
        ["--device", "cuda", "--seconds", "5", "--blocks", "3", "--iterations", "2", *arguments]
    )
    lines: list[str] = []

    def rank(comm: Any) -> list[Any]:
        return OnCpu(comm, options).run(lines.append if comm.rank == 0 else lambda text: None)

    return run_threads(ranks, rank)[0], lines


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(synchronize=lambda: None, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(device))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(bench_gpu, "copy_bandwidth", lambda: 1e12)


@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "allgather", "broadcast"])
def test_rows_are_checked_bit_for_bit(no_device: None, collective: str) -> None:
    rows, lines = run(["--collective", collective, "--sizes", "8,10K", "--check", "2"], 3)
    assert [(row.path, row.wrong) for row, _ in rows] == [("symmetric", 0), ("private", 0)] * 2
    assert len(lines) == 4


def test_a_wrong_result_is_counted(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnCpu, "collective", lambda self, x: x)
    rows, _ = run(["--sizes", "1K", "--memory", "private"], 2)
    assert rows[0][0].wrong > 100


def test_the_bound_is_the_traffic_of_all_ranks_on_a_device(no_device: None) -> None:
    rows, lines = run(["--sizes", "1M", "--memory", "symmetric", "--algorithm", "two_shot"], 2)
    [(row, part)] = rows
    assert part == pytest.approx(2 * 2 * MIB / 1e12 * 1e6 / row.time_us)
    assert float(lines[0].split()[-1]) == pytest.approx(part, abs=0.01)


def test_a_graph_is_timed_by_the_call(no_device: None) -> None:
    Graph.replayed = 0
    rows, _ = run(["--sizes", "8K", "--memory", "symmetric", "--graph"], 2)
    assert rows[0][0].path == "symmetric graph"
    assert rows[0][0].iterations == 2 * bench_gpu.GRAPH_CALLS
    assert Graph.replayed == 2 * 3 * (1 + 2)  # ranks, blocks, and in each one ahead and two timed
