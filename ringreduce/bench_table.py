"""What a benchmark found: rows, ratios between them, and how both are printed and drawn.

Pure functions of numbers already measured; only `draw` writes a file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ringreduce.bench_data import BUS_FACTORS, PEERS, Job


@dataclass(frozen=True)
class Row:
    size_bytes: int
    count: int
    dtype: str
    op: str
    path: str
    time_us: float | None  # median over blocks, writes taken off; None: below what they scatter
    algbw_gbs: float | None
    busbw_gbs: float | None
    wrong: int | None  # None: not checked
    iterations: int
    blocks_us: list[float]  # per iteration, with the writes
    writes_us: float  # median


def make_row(
    job: Job,
    size_bytes: int,
    path: str,
    seconds: Sequence[float],
    writes_s: float,
    wrong: int | None,
    iterations: int,
) -> Row:
    count = job.count(size_bytes)
    time_s = statistics.median(seconds) - writes_s
    algbw = count * job.item_bytes / time_s / 1e9 if time_s > 0 else None
    return Row(
        size_bytes=count * job.item_bytes,
        count=count,
        dtype=job.dtype,
        op=job.op if job.reduces else "none",
        path=path,
        time_us=time_s * 1e6 if time_s > 0 else None,
        algbw_gbs=algbw,
        busbw_gbs=None if algbw is None else algbw * BUS_FACTORS[job.collective](job.ranks),
        wrong=wrong,
        iterations=iterations,
        blocks_us=[each * 1e6 for each in seconds],
        writes_us=writes_s * 1e6,
    )


def ratio(upper: float | None, lower: float | None) -> float | None:
    return upper / lower if upper is not None and lower is not None else None


def ratios(rows: Sequence[Row], rivals: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """By path and rival, of the rows of one size: time / limit, but peer / time."""
    times = {row.path: row.time_us for row in rows}
    result: dict[str, dict[str, float | None]] = {}
    for path, own in times.items():
        result[path] = {
            rival: ratio(own, times.get(rival)) if rival == "limit" else ratio(times[rival], own)
            for rival in rivals
        }
    return result


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def summarize(rows: Sequence[Row], rivals: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By path of ours and rival: geometric mean over the sizes, the worst ratio and its size."""
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for size in sorted({row.size_bytes for row in rows}):
        of_size = [row for row in rows if row.size_bytes == size]
        for path, by_rival in ratios(of_size, rivals).items():
            if path in ("limit", *PEERS):
                continue
            for rival, value in by_rival.items():
                if value is not None:
                    found.setdefault(path, {}).setdefault(rival, []).append((value, size))
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for path, by_rival_found in found.items():
        for rival, values in by_rival_found.items():
            worst, size = max(values) if rival == "limit" else min(values)
            mean = geometric_mean(value for value, _ in values)
            summary.setdefault(path, {})[rival] = {"mean": mean, "worst": worst, "worst_at": size}
    return summary


def number(value: float | None) -> str:
    """Three or four significant digits, no exponent."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def size_text(size_bytes: int) -> str:
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def rival_heading(rival: str) -> str:
    return "/limit" if rival == "limit" else f"{rival}/"


def heading(rivals: Sequence[str]) -> str:
    names = f"#{'size':>10} {'count':>10} {'type':>10} {'op':>5}  {'path':<16}"
    names += f"{'time':>9} {'algbw':>8} {'busbw':>8} {'#wrong':>7}"
    units = f"#{'(B)':>10} {'(elements)':>10} {'':>10} {'':>5}  {'':<16}"
    units += f"{'(us)':>9} {'(GB/s)':>8} {'(GB/s)':>8} {'':>7}"
    for rival in rivals:
        names += f" {rival_heading(rival):>7}"
    return f"{names}\n{units}"


def line(row: Row, by_rival: Mapping[str, float | None]) -> str:
    text = f" {row.size_bytes:>10} {row.count:>10} {row.dtype:>10} {row.op:>5}  {row.path:<16}"
    text += f"{number(row.time_us):>9} {number(row.algbw_gbs):>8} {number(row.busbw_gbs):>8}"
    text += f" {'-' if row.wrong is None else row.wrong:>7}"
    for value in by_rival.values():
        text += f" {number(value):>7}"
    return text


def summary_lines(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = []
    for path, by_rival in summary.items():
        for rival, found in by_rival.items():
            against = "time / limit" if rival == "limit" else f"{rival} / time"
            worst = f"worst {number(found['worst'])} at {size_text(int(found['worst_at']))}"
            lines.append(f"# {path:<16} {against:<12} {number(found['mean']):>7}   {worst}")
    return lines


def scatter(rows: Sequence[Row]) -> float:
    """How much blocks differ: width of a row's middle half over its median; the median row."""
    widths = []
    for row in rows:
        lower, middle, upper = np.quantile(row.blocks_us, [0.25, 0.5, 0.75])
        widths.append(float((upper - lower) / middle))
    return statistics.median(widths)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Places for labels, ordered as their positions: at least `gap` apart, else unmoved.

    Labels too close to each other form a group around the mean of its positions.
    """
    groups: list[list[int]] = []

    def edge(group: list[int], side: int) -> float:
        center = statistics.fmean(positions[index] for index in group)
        return center + side * gap * (len(group) - 1) / 2

    for index in sorted(range(len(positions)), key=lambda index: positions[index]):
        groups.append([index])
        while len(groups) > 1 and edge(groups[-1], -1) < edge(groups[-2], 1) + gap:
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(positions)
    for group in groups:
        for above, index in enumerate(group):
            places[index] = edge(group, -1) + above * gap
    return places


def draw(rows: Sequence[Row], names: Mapping[str, str], title: str, file_name: str) -> None:
    """Time against size, both logarithmic; each line is named where it ends.

    names: what a path is called in the picture, where that is not its own name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    ends = []
    paths = list(dict.fromkeys(row.path for row in rows))
    for path in paths:
        points = [(r.size_bytes, r.time_us) for r in rows if r.path == path and r.time_us]
        if not points:
            continue
        style = {"limit": "k:", "mpi": "s--", "gloo": "^--"}.get(path, "o-")
        drawn = axes.plot(
            *zip(*points, strict=True), style, markersize=4, label=names.get(path, path)
        )[0]
        ends.append((path, *points[-1], drawn.get_color()))
    axes.set(xscale="log", yscale="log", title=title, xlabel="size (bytes)", ylabel="time (us)")
    largest = max(row.size_bytes for row in rows)
    ticks = [4**power for power in range(1, 32) if 4**power <= largest]
    axes.set_xticks(ticks, [size_text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="upper left")
    bottom, top = (math.log10(edge) for edge in axes.get_ylim())
    gap = (top - bottom) / 28
    places = spread([math.log10(time_us) for _, _, time_us, _ in ends], gap)
    axes.set_ylim(top=10 ** max(top, *(place + gap for place in places)))
    for (path, size, time_us, color), place in zip(ends, places, strict=True):
        label = f"{path}  {number(time_us)} us"
        axes.annotate(label, (size * 1.3, 10**place), color=color, va="center", fontsize=9)
    smallest = min(row.size_bytes for row in rows)
    axes.set_xlim(smallest / 1.5, largest * 2 * (largest / smallest) ** 0.3)  # room for the names
    figure.savefig(file_name, dpi=130)
    pyplot.close(figure)
