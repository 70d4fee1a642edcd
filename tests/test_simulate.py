"""The planner of clusters: runs against formulas, the choice against all others, what is typed."""

import re
from pathlib import Path

import pytest

from ringreduce import simulate
from ringreduce.simulate import Cluster, make_plan, predict, run

NETWORKS = {
    "fast": {"link": (2e-6, 1 / 12e9), "inside": (0.5e-6, 1 / 100e9)},
    "slow": {"link": (60e-6, 8 / 1e9), "inside": (1e-6, 1 / 20e9)},
}
SIZES = (1 << 10, 100_000, 4 << 20, 64 << 20)
HIERARCHICAL = [name for name in simulate.NAMES if name.startswith("hierarchical-")]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("nodes", "local"), [(2, 1), (4, 2), (8, 8), (13, 4), (64, 1)])
def test_runs_equal_formulas(nodes: int, local: int, network: str) -> None:
    cluster = Cluster(nodes, local, **NETWORKS[network])
    for size_bytes in SIZES:
        for name in (*simulate.FLAT, *HIERARCHICAL):
            plan = make_plan(name, cluster, size_bytes)
            ran = run(plan, size_bytes)
            if ran is None:
                continue
            formula = predict(plan, size_bytes)
            ratio = formula.time_s / ran.time_s
            # The last chunk of a block or segment may be shorter than a run has it.
            exact = plan.across != "tree" and (nodes & (nodes - 1) == 0 or plan.across == "ring")
            low, high = (0.9, 1.1) if exact else (0.85, 1.4)
            assert low <= ratio <= high, f"{plan}: {formula.time_s} {ran.time_s}"
            if size_bytes >= SIZES[2]:
                assert formula.bytes_across == pytest.approx(ran.bytes_across, rel=0.02)
                assert formula.bytes_inside == pytest.approx(ran.bytes_inside, rel=0.02)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("nodes", [8, 24, 40])
def test_choice_is_the_best_of_all_runs(nodes: int, network: str) -> None:
    cluster = Cluster(nodes, 8, **NETWORKS[network])
    for size_bytes in SIZES[:3]:
        times_s = {
            name: simulate.simulate(name, cluster, size_bytes).time_s for name in simulate.NAMES
        }
        assert times_s["choice"] <= 1.1 * min(times_s.values()), (size_bytes, times_s)
        assert times_s["choice"] >= max(simulate.lower_bound_s(cluster, size_bytes))


def test_a_shared_port_is_the_limit() -> None:
    size_bytes = 25 << 20
    own = Cluster(4, 2, **NETWORKS["slow"])
    shared = Cluster(4, 2, **NETWORKS["slow"], shared=True)
    bound_s = 2 * 3 / 4 * size_bytes * 8 / 1e9
    assert bound_s < simulate.simulate("choice", shared, size_bytes).time_s < 1.06 * bound_s
    assert simulate.simulate("choice", own, size_bytes).time_s < 0.6 * bound_s


def test_what_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    words = "--nodes 16 --local 4 --bytes 1M --alpha 3us --beta 100Gbit/s --plot"
    simulate.main([*words.split(), str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "1 MB on 16 nodes x 4 ranks; no less than 13 us by latency, 39.32 us" in printed
    names = re.findall(r"^(\S+) +.*(?:simulation|formula)$", printed, re.MULTILINE)
    assert names == [*simulate.NAMES[:-1], "choice:"]
    simulate.main(["--nodes", "512", "--local", "8", "--algorithm", "hierarchical-ring"])
    printed = capsys.readouterr().out
    assert "hierarchical-ring " in printed and "formula" in printed and "choice" not in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--nodes 0", "at least 1"),
        ("--nodes 1", "at least 2 ranks"),
        ("--nodes 4 --alpha 2", "write it like 2us"),
        ("--nodes 4 --beta 12Gb/s", "write it like 12GB/s, 10Gbit/s"),
        ("--nodes 4 --bytes 0", "write it like 8, 16K"),
        ("--nodes 4 --beta 0GB/s", "write it like"),
        ("--nodes 4 --algorithm snail", "invalid choice"),
        ("--nodes 4000000", "more than a million"),
    ],
)
def test_what_makes_no_sense(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        simulate.main(words.split())
    assert complaint in capsys.readouterr().err


def test_units() -> None:
    assert simulate.parse_time("1.5 ms") == 1.5e-3
    assert simulate.parse_rate("10Gbit/s") == 1.25e9
    assert simulate.parse_rate("12GB/s") == 12e9
    assert simulate.parse_size("25M") == 25 << 20
    assert simulate.parse_size("1k") == 1024
