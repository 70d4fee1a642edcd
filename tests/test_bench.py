"""The benchmark: its arithmetic, its method on a made-up clock, its picture, runs under mpirun.

Nothing here fails because a machine is slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ringreduce import bench, bench_data, bench_peers, bench_table, bench_timing
from ringreduce.bench_data import BUS_FACTORS, PERIOD, Job
from ringreduce.bench_table import Row

INTEGERS = ["int64", "int32", "int16", "int8", "uint8"]
FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]
OPS = ["sum", "avg", "min", "max", "prod"]
PAIRS = list(itertools.product([*INTEGERS, *FLOATS, "bool"], OPS))


class AloneComm:
    """A world of one, of which `ranks` pretends to be the size; `slower` is a second rank's lag."""

    def __init__(self, ranks: int = 1, slower: float = 0.0) -> None:
        self.rank, self.size, self.local_size = 0, ranks, ranks
        self.slower = slower
        self.barriers = 0

    def barrier(self) -> None:
        self.barriers += 1

    def allgather(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, x + self.slower]) if self.slower else x

    def allreduce_(self, x: np.ndarray) -> np.ndarray:
        return x

    def broadcast_object(self, obj: object, root: int = 0) -> object:
        return obj


class Clock:
    """Time that passes only in loops: a loop of this clock takes cost_s an iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[float, int]] = []
        monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: self.now_s)

    def loop(self, cost_s: float) -> bench_peers.Loop:
        def run(iterations: int) -> None:
            self.calls.append((cost_s, iterations))
            self.now_s += cost_s * iterations

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def row(path: str, time_us: float | None, size_bytes: int = 1024) -> Row:
    return Row(
        size_bytes, size_bytes // 4, "float32", "sum", path, time_us, 1.0, 1.0, 0, 1, [1.0], 0.0
    )


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("8", 8), ("16K", 16384), ("25m", 26214400), ("1G", 1 << 30)]
)
def test_sizes_are_read_in_powers_of_1024(text: str, size_bytes: int) -> None:
    assert bench.parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "K", "-8", "0", "1.5M", "8B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        bench.parse_size(text)


def test_a_sweep_always_ends_at_the_largest_size() -> None:
    assert bench.sweep(8, 512, 4) == [8, 32, 128, 512]
    assert bench.sweep(8, 100, 4) == [8, 32, 100]
    assert bench.sweep(8, 8, 2) == [8]


def test_arguments_have_presets_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parse_arguments(["--sizes", "8,1K", "--peers", "mpi,gloo"])
    assert (options.sizes, options.peers, options.limit) == ([8, 1024], ["mpi", "gloo"], False)
    calls = bench.parse_arguments(["--calls"])
    assert (calls.sizes[0], calls.sizes[-1], calls.peers) == (8, 1024, ["mpi"])
    for wrong, reason in (
        (["--peers", "nccl"], "'nccl' is none of mpi, gloo"),
        (["--sizes", "8,x"], "'x' is no size"),
        (["--factor", "1"], "--factor must be at least 2"),
        (["--min", "1K", "--max", "8"], "--min is larger"),
    ):
        with pytest.raises(SystemExit):
            bench.parse_arguments(wrong)
        assert reason in capsys.readouterr().err


def test_bus_factors_are_those_of_nccl_tests() -> None:
    assert {name: factor(8) for name, factor in BUS_FACTORS.items()} == {
        "allreduce": 1.75,
        "reduce_scatter": 0.875,
        "allgather": 0.875,
        "broadcast": 1.0,
    }
    assert BUS_FACTORS["allreduce"](1) == 0


def test_a_size_is_the_larger_of_what_a_rank_gives_and_gets() -> None:
    assert Job("allreduce", "sum", "float32", 3).count(41) == 10
    assert Job("allreduce", "sum", "float64", 3).count(4) == 1
    scatter, gather = (Job(name, "sum", "bfloat16", 3) for name in ("reduce_scatter", "allgather"))
    assert (scatter.count(40), scatter.input_count(40), scatter.output_count(40)) == (18, 18, 6)
    assert (gather.count(40), gather.input_count(40), gather.output_count(40)) == (18, 6, 18)
    assert gather.count(2) == 3


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(dtype)


@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
@pytest.mark.parametrize(("dtype", "op"), [pair for pair in PAIRS if pair != ("bool", "avg")])
def test_expected_results_are_exact_and_those_of_the_inputs(
    dtype: str, op: str, ranks: int
) -> None:
    job = Job("allreduce", op, dtype, ranks)
    size_bytes = 2000 * job.item_bytes
    inputs = [
        decoded(bench_data.input_data(job, size_bytes, rank, 3), dtype) for rank in range(ranks)
    ]
    assert all(np.array_equal(x[PERIOD:], x[: 2000 - PERIOD]) for x in inputs)
    reduced = getattr(np, "mean" if op == "avg" else op)(np.stack(inputs).real * 1.0, axis=0)
    got = decoded(bench_data.expected_data(job, size_bytes, 0, 3), dtype)
    if dtype == "int8":  # whose sums may wrap
        reduced = reduced.astype(np.int64).astype(np.int8)
    assert np.array_equal(got, reduced != 0 if dtype == "bool" else reduced)


def test_ranks_iterations_and_places_have_different_data() -> None:
    job = Job("allreduce", "sum", "float32", 4)
    seen = {
        bench_data.input_data(job, 4096, rank, iteration).tobytes()
        for rank in range(4)
        for iteration in range(5)
    }
    assert len(seen) == 20
    result = bench_data.expected_data(job, 1 << 20, 0, 0)
    for chunk in (4096, 65536, 131072):
        moved = np.roll(result, chunk)
        assert bench_data.count_wrong(moved, result, 4) > (1 << 18) // 2


def test_scattered_and_gathered_results_belong_to_their_rank() -> None:
    scatter = Job("reduce_scatter", "sum", "int32", 3)
    everything = bench_data.expected_data(Job("allreduce", "sum", "int32", 3), 1200, 0, 1)
    parts = [bench_data.expected_data(scatter, 1200, rank, 1) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), everything)
    gather = Job("allgather", "sum", "int32", 3)
    given = [bench_data.input_data(gather, 1200, rank, 1) for rank in range(3)]
    assert np.array_equal(bench_data.expected_data(gather, 1200, 2, 1), np.concatenate(given))
    broadcast = Job("broadcast", "sum", "int32", 3)
    root = bench_data.input_data(broadcast, 1200, 0, 1)
    assert np.array_equal(bench_data.expected_data(broadcast, 1200, 2, 1), root)


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8, 16])
def test_every_wrong_bit_counts_its_element_once(item_bytes: int) -> None:
    expected = np.arange(160, dtype=np.uint8)
    got = expected.copy()
    assert bench_data.count_wrong(got, expected, item_bytes) == 0
    got[0] ^= 1
    got[item_bytes - 1] ^= 128
    got[-1] ^= 4
    assert bench_data.count_wrong(got, expected, item_bytes) == 2
    assert bench_data.count_wrong(expected[:-32], expected, item_bytes) == 32 // item_bytes


def test_wrong_results_are_counted_over_iterations() -> None:
    job = Job("allreduce", "sum", "float32", 1)
    buffers = bench_peers.Buffers(AloneComm(), ["private"], 4000, separate=False)
    prepared = bench_peers.ours(AloneComm(), buffers, job, "private", "numpy").prepare(4000)
    assert bench.wrong_elements(AloneComm(), job, buffers, prepared, 4000, 3) == 0
    assert prepared.output is not None

    def spoiled(iterations: int) -> None:
        prepared.loop(iterations)
        prepared.output[8:12] ^= 1

    broken = bench_peers.Prepared(spoiled, prepared.output)
    assert bench.wrong_elements(AloneComm(), job, buffers, broken, 4000, 3) == 3


def test_every_iteration_writes_its_input_before_the_call() -> None:
    comm, job = AloneComm(), Job("allreduce", "sum", "float32", 1)
    buffers = bench_peers.Buffers(comm, ["private"], 64, separate=False)
    buffers.source.view(np.float32)[:] = 3
    seen = []

    def double(x: np.ndarray) -> np.ndarray:
        seen.append(x.tolist())
        x *= 2
        return x

    comm.allreduce_ = double  # type: ignore[method-assign]
    bench_peers.ours(comm, buffers, job, "private", "numpy").prepare(8).loop(4)
    assert seen == [[3.0, 3.0]] * 4
    assert not buffers.memory["private"][8:].any()
    bench_peers.limit(comm, buffers, job).prepare(8).loop(5)
    assert comm.barriers == 5
    assert buffers.memory["private"][:8].view(np.float32).tolist() == [6.0, 6.0]


def test_buffers_begin_at_a_cache_line() -> None:
    for size_bytes in (1, 100, 1 << 22):
        memory = bench_peers.aligned_bytes(size_bytes)
        assert (memory.ctypes.data % 64, len(memory)) == (0, size_bytes)


def test_what_numpy_lacks_is_unavailable() -> None:
    job = Job("allreduce", "sum", "bfloat16", 1)
    buffers = bench_peers.Buffers(AloneComm(), ["private"], 64, separate=False)
    with pytest.raises(bench_peers.Unavailable, match="no bfloat16"):
        bench_peers.ours(AloneComm(), buffers, job, "private", "numpy")


def test_a_peer_that_raises_is_unavailable_with_its_reason() -> None:
    def refuses(iterations: int) -> None:
        raise KeyError("no such op")

    contestant = bench_peers.Contestant(
        "peer", "private", lambda size: bench_peers.Prepared(refuses, None)
    )
    with pytest.raises(bench_peers.Unavailable, match="KeyError: 'no such op'"):
        bench_peers.tried(contestant)


def test_blocks_of_all_loops_alternate_and_fill_their_time(clock: Clock) -> None:
    comm = AloneComm()
    loops = [clock.loop(1e-6), clock.loop(1e-3)]
    iterations, seconds = bench_timing.measure(comm, loops, most_blocks=5, share_s=10.0)
    assert iterations == [30_000, 30]  # 30 ms each
    assert np.allclose(seconds, [[1e-6, 1e-3]] * 5)
    # Behind the calibration: an iteration ahead of every block, and the loops in turn.
    assert clock.calls[-20:] == [(1e-6, 1), (1e-6, 30_000), (1e-3, 1), (1e-3, 30)] * 5


def test_a_long_operation_gets_few_short_blocks(clock: Clock) -> None:
    loops = [clock.loop(2.0)]
    iterations, seconds = bench_timing.measure(AloneComm(), loops, most_blocks=11, share_s=20.0)
    assert (iterations, len(seconds)) == ([1], 4)  # 4 s to calibrate, then blocks of 1 + 1
    iterations, seconds = bench_timing.measure(AloneComm(), loops, most_blocks=11, share_s=1.0)
    assert (iterations, len(seconds)) == ([1], bench_timing.FEWEST_BLOCKS)


def test_the_slowest_rank_counts(clock: Clock) -> None:
    _, seconds = bench_timing.measure(
        AloneComm(slower=0.5), [clock.loop(1.0)], most_blocks=2, share_s=1.0, fixed=5
    )
    assert np.allclose(seconds, [[5.5 / 5]] * 2)


def test_a_row_is_the_median_without_the_writes() -> None:
    job = Job("allreduce", "sum", "float32", 4)
    made = bench_table.make_row(job, 4000, "private torch", [9e-6, 3e-6, 4e-6], 2e-6, 0, 7)
    assert made.time_us == pytest.approx(2.0)
    assert made.algbw_gbs == pytest.approx(2.0)
    assert made.busbw_gbs == pytest.approx(3.0)
    assert made.blocks_us == pytest.approx([9.0, 3.0, 4.0])
    below = bench_table.make_row(job, 4000, "limit", [2e-6], 2.5e-6, None, 7)
    assert (below.time_us, below.algbw_gbs, below.busbw_gbs) == (None, None, None)


def test_ratios_are_over_the_limit_and_of_the_peers() -> None:
    rows = [row("private torch", 4.0), row("mpi", 10.0), row("gloo", None), row("limit", 2.0)]
    found = bench_table.ratios(rows, ["limit", "mpi", "gloo"])
    assert found["private torch"] == {"limit": 2.0, "mpi": 2.5, "gloo": None}
    assert found["mpi"] == {"limit": 5.0, "mpi": 1.0, "gloo": None}


def test_the_summary_has_geometric_means_and_the_worst_size() -> None:
    rows = [
        row("private torch", 1.0, 8), row("mpi", 2.0, 8), row("limit", 1.0, 8),
        row("private torch", 4.0, 64), row("mpi", 32.0, 64), row("limit", 1.0, 64),
        row("private torch", None, 128), row("mpi", 1.0, 128), row("limit", 1.0, 128),
    ]  # fmt: skip
    summary = bench_table.summarize(rows, ["limit", "mpi"])
    assert list(summary) == ["private torch"]
    assert summary["private torch"]["mpi"] == pytest.approx(
        {"mean": 4.0, "worst": 2.0, "worst_at": 8}
    )
    assert summary["private torch"]["limit"] == pytest.approx(
        {"mean": 2.0, "worst": 4.0, "worst_at": 64}
    )
    assert bench_table.summary_lines(summary)[1].split() == [
        "#", "private", "torch", "mpi", "/", "time", "4.00", "worst", "2.00", "at", "8",
    ]  # fmt: skip


def test_the_table_is_aligned() -> None:
    names, units = bench_table.heading(["limit", "mpi"]).split("\n")
    shown = bench_table.line(row("symmetric torch", 1234.5), {"limit": 1.25, "mpi": None})
    assert len(names) == len(shown)
    assert names.split()[-3:] == ["#wrong", "/limit", "mpi/"]
    expected = "1024 256 float32 sum symmetric torch 1234 1.00 1.00 0 1.25 -"
    assert shown.split() == expected.split()
    for title in ("time", "algbw", "#wrong", "/limit"):  # right-aligned above its numbers
        end = names.index(title) + len(title)
        assert shown[end - 1] != " " and (end == len(shown) or shown[end] == " ")
    assert units.index("(us)") + len("(us)") == names.index("time") + len("time")


def test_sizes_are_printed_as_they_are_read() -> None:
    for text in ("8", "16K", "25M", "1G", "1000"):
        assert bench_table.size_text(bench.parse_size(text)) == text


def test_labels_keep_their_order_and_a_gap() -> None:
    places = bench_table.spread([1.0, 3.0, 1.05, 1.02], 0.2)
    order = sorted(places)
    assert [places.index(place) for place in order] == [0, 3, 2, 1]
    assert min(b - a for a, b in zip(order, order[1:], strict=False)) >= 0.2 - 1e-12
    assert places[1] == 3.0  # far from the others, which move by themselves
    assert math.isclose(sum(places), 1.0 + 3.0 + 1.05 + 1.02)


def test_scatter_is_that_of_the_middle_half() -> None:
    calm, busy = (dataclasses.replace(row("mpi", 1.0), blocks_us=x) for x in ([2.0] * 5, [1, 2, 4]))
    assert bench_table.scatter([calm]) == 0
    assert bench_table.scatter([busy]) == pytest.approx((3 - 1.5) / 2)
    assert bench_table.scatter([calm, calm, busy]) == 0


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    rows = [
        row(path, time_us * size / 8, size)
        for size in (8, 1024, 1 << 20)
        for path, time_us in (("private torch", 2.0), ("mpi", 2.1), ("limit", 1.0))
    ]
    bench_table.draw([*rows, row("gloo", None)], {"mpi": "Open MPI 5"}, "a title", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


@pytest.mark.core
def test_the_program_measures_exact_results_beside_its_peers(mpirun, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report = tmp_path / "bench.json"
    arguments = (
        "-m ringreduce.bench --sizes 8,4000,1M --peers mpi,gloo --limit --check 3 --blocks 3"
    )
    done = mpirun(3, [*arguments.split(), "--json", str(report)], timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["unavailable"] == {}
    paths = ["symmetric torch", "private torch", "mpi", "gloo", "limit"]
    assert [each["path"] for each in found["rows"]] == paths * 3
    assert [each["wrong"] for each in found["rows"]] == [0, 0, 0, 0, None] * 3
    # Rank 0 alone prints: one heading, one line a row.
    assert done.stdout.count("algbw") == 1
    assert sum(line.startswith(" ") for line in done.stdout.splitlines()) == 15


COLLECTIVES = ("reduce_scatter", "allgather", "broadcast")
EVERY_COLLECTIVE = f"""
from ringreduce import bench
for collective in {COLLECTIVES}:
    arguments = f"--collective {{collective}} --sizes 40,9000 --blocks 3"
    status = bench.main([*arguments.split(), "--peers", "mpi", "--frameworks", "numpy"])
    assert status == 0, status
"""


def test_the_program_measures_every_collective(mpirun) -> None:
    done = mpirun(3, EVERY_COLLECTIVE, timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [part.split("\n") for part in done.stdout.split(", algorithm auto; ")]
    for before, table, collective in zip(tables, tables[1:], COLLECTIVES, strict=False):
        assert before[-1] == f"# {collective}"
        rows = [line.split() for line in table if line.startswith(" ")]
        assert [line[4] for line in rows] == ["symmetric", "private", "mpi"] * 2
        assert {line[-2] for line in rows} == {"0"}
    assert len(tables) == 1 + len(COLLECTIVES)
