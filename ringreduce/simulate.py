"""`python -m ringreduce.simulate`: how long an allreduce takes on a cluster that is not there.

Runs the algorithms themselves on virtual ranks, in virtual time; where that is too much, and for
--plot, it computes the same by formulas. Knows latency and bandwidth of links, and no arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringreduce import _core

MOST_RANKS = 1024  # that are run; above, and above so many messages, formulas answer
MOST_MESSAGES = 4_000_000
FLAT = tuple(_core.ACROSS_ALGORITHMS)
NAMES = (*FLAT, *(f"hierarchical-{name}" for name in FLAT), "choice")
TIME_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
RATE_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Link = tuple[float, float]  # alpha in s, beta in s per byte


@dataclass(frozen=True)
class Cluster:
    nodes: int
    local_size: int
    link: Link  # of a rank, or of all ranks of a node if shared
    inside: Link
    shared: bool = False
    most_chunk_bytes: int = 1 << 20

    @property
    def rail(self) -> Link:
        """The link as each of a node's ranks sees it while all are sending."""
        return (self.link[0], self.link[1] * (self.local_size if self.shared else 1))

    def flat(self) -> Cluster:
        """As an algorithm sees it that knows no nodes."""
        return replace(self, nodes=self.nodes * self.local_size, local_size=1, shared=False)


@dataclass(frozen=True)
class Plan:
    """How a message is moved: by `across`, in segments and chunks of so many bytes."""

    name: str
    cluster: Cluster
    across: str
    segment_bytes: int
    chunk_bytes: int


@dataclass(frozen=True)
class Row:
    plan: Plan
    time_s: float
    steps: int  # messages across, one after the other, in all segments
    bytes_across: int  # sent by the busiest rank
    bytes_inside: int  # fetched by it
    is_run: bool  # on virtual ranks


def lower_bound_s(cluster: Cluster, size_bytes: int) -> tuple[float, float]:
    """(latency, bandwidth): no allreduce takes less than the larger one. The latency is that of
    reaching all nodes, each step at best doubling their number, and of two meetings inside."""
    meetings = 2 if cluster.local_size > 1 else 0
    latency_s = (cluster.nodes - 1).bit_length() * cluster.link[0] + meetings * cluster.inside[0]

    def factor(ranks: int) -> float:
        return 2 * (ranks - 1) / ranks

    share_bytes = size_bytes / cluster.local_size
    across_s = factor(cluster.nodes) * share_bytes * cluster.rail[1]
    inside_s = factor(cluster.local_size) * size_bytes * cluster.inside[1]
    return latency_s, max(across_s, inside_s)


def predict(plan: Plan, size_bytes: int) -> Row:
    """By the formulas."""
    cluster = plan.cluster
    found = _core.predict_cluster(
        size_bytes,
        cluster.nodes,
        cluster.local_size,
        plan.segment_bytes,
        plan.across,
        plan.chunk_bytes,
        inside=cluster.inside,
        link=cluster.rail,
    )
    return Row(
        plan,
        found["time_s"],
        found["steps"],
        found["bytes_across"],
        found["bytes_inside"],
        is_run=False,
    )


def make_plan(name: str, cluster: Cluster, size_bytes: int) -> Plan:
    """The tuner's choice, or the segments and chunks with which the formulas like `name` best."""
    if name == "choice":
        across, segment, chunk, _ = _core.choose_cluster(
            size_bytes,
            cluster.nodes,
            cluster.local_size,
            inside=cluster.inside,
            link=cluster.rail,
            most_chunk=cluster.most_chunk_bytes,
        )
        return Plan(name, cluster, across, segment, chunk)
    seen = cluster if name.startswith("hierarchical-") else cluster.flat()
    across = name.removeprefix("hierarchical-")
    plans = []
    for segments in (1, 2, 4, 8, 16, 32, 64) if seen.local_size > 1 else (1,):
        segment = -(-size_bytes // segments)
        shard = -(-segment // seen.local_size)
        largest = {"ring": -(-shard // seen.nodes), "tree": -(-shard // 2), "doubling": shard}
        chunk = min(largest[across], seen.most_chunk_bytes)
        while chunk > 0:
            plans.append(Plan(name, seen, across, segment, chunk))
            chunk = chunk // 2 if across == "tree" else 0
    return min(plans, key=lambda plan: predict(plan, size_bytes).time_s)


def run(plan: Plan, size_bytes: int) -> Row | None:
    """On virtual ranks. One byte stands for a chunk, so that nothing but messages costs time.
    None: these are too many."""
    cluster = plan.cluster
    segments = -(-size_bytes // plan.segment_bytes)
    shard = -(-plan.segment_bytes // cluster.local_size)
    pieces = {"ring": cluster.nodes, "tree": 2, "doubling": 1}[plan.across]
    rounds = -(-shard // pieces // plan.chunk_bytes) if shard else 1
    per_round = {"ring": 2 * cluster.nodes, "tree": 4}.get(plan.across, cluster.nodes.bit_length())
    ranks = cluster.nodes * cluster.local_size
    if ranks > MOST_RANKS or segments * rounds * per_round * ranks > MOST_MESSAGES:
        return None
    elements = max(1, rounds) * pieces  # of a shard
    unit_bytes = size_bytes / (segments * elements * cluster.local_size)
    inputs = np.zeros((ranks, segments * elements * cluster.local_size), np.uint8)
    found = _core.simulate_cluster(
        [cluster.local_size] * cluster.nodes,
        inputs,
        elements * cluster.local_size,
        plan.across,
        1,
        inside=(cluster.inside[0], cluster.inside[1] * unit_bytes),
        link=(cluster.link[0], cluster.link[1] * unit_bytes),
        shared_port=cluster.shared,
    )
    return Row(
        plan,
        found["finish_s"],
        predict(plan, size_bytes).steps,
        round(max(found["bytes_across"]) * unit_bytes),
        round(max(found["bytes_inside"]) * unit_bytes),
        is_run=True,
    )


def simulate(name: str, cluster: Cluster, size_bytes: int) -> Row:
    plan = make_plan(name, cluster, size_bytes)
    return run(plan, size_bytes) or predict(plan, size_bytes)


# --- what is typed


def quantity(pattern: str, units: dict[str, float], example: str) -> Callable[[str], float]:
    """A parser of positive numbers with a unit."""

    def parse(text: str) -> float:
        match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)\s*{pattern}", text.strip())
        if match is None or float(match[1]) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: write it like {example}")
        return float(match[1]) * units[match[2]]

    return parse


parse_time = quantity("(ns|us|ms|s)", TIME_UNITS, "2us, 0.5ms")


def parse_size(text: str) -> int:
    """Bytes; K, M and G are powers of 1024, as in ringreduce.bench."""
    units = {unit: float(size) for unit, size in SIZE_UNITS.items()}
    size_bytes = int(quantity("([KMG]?)B?", units, "8, 16K, 25M")(text.upper()))
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a message has at least one byte")
    return size_bytes


def parse_rate(text: str) -> float:
    """Bytes per second; k, M and G are powers of 1000."""
    if text.strip().endswith("bit/s"):
        return quantity("([kMG]?)bit/s", RATE_UNITS, "10Gbit/s")(text) / 8
    return quantity("([kMG]?)B/s", RATE_UNITS, "12GB/s, 10Gbit/s")(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ringreduce.simulate", description=__doc__)
    add = parser.add_argument
    add("--nodes", type=int, required=True)
    add("--local", type=int, default=1, help="ranks per node (%(default)s)")
    add("--bytes", type=parse_size, default="25M", help="of the message (%(default)s)")
    add("--alpha", type=parse_time, default="2us", help="latency across (%(default)s)")
    add("--beta", type=parse_rate, default="12GB/s", help="bandwidth across (%(default)s)")
    add("--alpha-inside", type=parse_time, default="0.5us", help="a meeting in a node")
    add("--beta-inside", type=parse_rate, default="100GB/s", help="of each rank in a node")
    add("--nic", choices=("rank", "node"), default="rank", help="whose bandwidth --beta is")
    add("--chunk", type=parse_size, default="1M", help="largest message across (%(default)s)")
    add("--algorithm", choices=NAMES, action="append", help="only this one; may be repeated")
    add("--plot", metavar="FILE.png", help="time against size, 1 KB to 1 GB, by the formulas")
    options = parser.parse_args(arguments)
    if options.nodes < 1 or options.local < 1 or options.nodes * options.local < 2:
        parser.error("--nodes and --local are at least 1, and there are at least 2 ranks")
    if options.nodes * options.local > 1 << 20:
        parser.error("more than a million ranks are beyond these formulas")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: python -m pip install matplotlib")
    options.algorithm = options.algorithm or default_names(options)
    return options


def default_names(options: argparse.Namespace) -> list[str]:
    """Without what would be the same twice; a shared port is simulated between rails only."""
    if options.local == 1:
        return [*FLAT, "choice"]
    flat = ["ring"] if options.nic == "node" else list(FLAT)
    return [*flat, *(name for name in NAMES if name not in FLAT)]


# --- what is shown


def time_text(time_s: float) -> str:
    for unit in ("s", "ms"):
        if time_s >= TIME_UNITS[unit]:
            return f"{time_s / TIME_UNITS[unit]:.4g} {unit}"
    return f"{time_s / TIME_UNITS['us']:.4g} us"


def size_text(size_bytes: float) -> str:
    for unit, size in reversed(SIZE_UNITS.items()):
        if size_bytes >= size:
            return f"{size_bytes / size:.4g} {unit}B"
    return "0 B"


def print_table(rows: Sequence[Row], cluster: Cluster, size_bytes: int) -> None:
    latency_s, bandwidth_s = lower_bound_s(cluster, size_bytes)
    print(
        f"{size_text(size_bytes)} on {cluster.nodes} nodes x {cluster.local_size} ranks; no less"
        f" than {time_text(latency_s)} by latency, {time_text(bandwidth_s)} by bandwidth\n"
    )
    print(f"{'':41} {'':8} {'sent':>10} {'fetched':>10}")
    print(
        f"{'algorithm':22} {'segments':>9} {'chunk':>8} {'steps':>8} {'across':>10} {'inside':>10}"
        f" {'time':>10} {'x bound':>8}  by"
    )
    for row in rows:
        plan = row.plan
        name = plan.name if plan.name != "choice" else f"choice: {plan.across}"
        print(
            f"{name:22} {-(-size_bytes // plan.segment_bytes):>9} {size_text(plan.chunk_bytes):>8}"
            f" {row.steps:>8} {size_text(row.bytes_across):>10} {size_text(row.bytes_inside):>10}"
            f" {time_text(row.time_s):>10} {row.time_s / max(latency_s, bandwidth_s):>8.2f}"
            f"  {'simulation' if row.is_run else 'formula'}"
        )


def draw(names: Sequence[str], cluster: Cluster, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [1 << power for power in range(10, 31)]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in names:
        plans = [make_plan(name, cluster, size) for size in sizes]
        times_s = [predict(plan, size).time_s for plan, size in zip(plans, sizes, strict=True)]
        is_choice = name == "choice"
        axes.loglog(sizes, times_s, "k--" if is_choice else "-", label=name, linewidth=1.5)
    bounds_s = [max(lower_bound_s(cluster, size)) for size in sizes]
    axes.fill_between(sizes, bounds_s, min(bounds_s) / 2, alpha=0.15, label="out of reach")
    axes.set(xlabel="bytes", ylabel="s", title=f"{cluster.nodes} nodes x {cluster.local_size}")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    cluster = Cluster(
        options.nodes,
        options.local,
        link=(options.alpha, 1 / options.beta),
        inside=(options.alpha_inside, 1 / options.beta_inside),
        shared=options.nic == "node" and options.local > 1,
        most_chunk_bytes=options.chunk,
    )
    rows = [simulate(name, cluster, options.bytes) for name in options.algorithm]
    print_table(rows, cluster, options.bytes)
    if options.plot:
        draw(options.algorithm, cluster, options.plot)
        print(f"\n{options.plot}: time against size")


if __name__ == "__main__":
    main()
