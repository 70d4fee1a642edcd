"""python -m ringreduce.bench: how fast a collective is, beside its peers and beside the limit.

Prints nccl-tests' columns, a row for each size and path. Only ratios within one run mean anything.
Run as `mpirun -np 2 python -m ringreduce.bench --peers mpi,gloo --limit`; where each rank can have
a core, let mpirun bind it: an MPI that is told to share cores yields in every wait. On GPUs:
`--device cuda`, a rank for each, or `--threads 4`: 4 ranks as threads of one process.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

import ringreduce as rr
from ringreduce import _core, bench_gpu, bench_peers
from ringreduce.bench_data import BUS_FACTORS, PEERS, Job, count_wrong, expected_data, input_data
from ringreduce.bench_peers import Buffers, Contestant, Prepared, Unavailable, as_bytes
from ringreduce.bench_table import (
    Row,
    draw,
    heading,
    line,
    make_row,
    ratios,
    rival_heading,
    scatter,
    size_text,
    summarize,
    summary_lines,
)
from ringreduce.bench_timing import gather, measure, seconds_left

if TYPE_CHECKING:
    from ringreduce.communicator import Communicator

CALL_SIZES = "8,16,32,64,128,256,512,1K"


def parse_size(text: str) -> int:
    """Bytes: "8", "25M"; K, M and G are powers of 1024, as in nccl-tests."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    try:
        size_bytes = int(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        size_bytes = 0
    if size_bytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 8, 16K or 25M")
    return size_bytes


def parse_list(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated words out of `known`."""
    words = tuple(known)

    def parse(text: str) -> list[str]:
        chosen = [word for word in text.split(",") if word]
        for word in chosen:
            if word not in words:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(words)}")
        return chosen

    return parse


def sweep(smallest: int, largest: int, factor: int) -> list[int]:
    """Sizes from smallest, by factor; the largest always is the last."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return [*sizes, largest]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ringreduce.bench", description=__doc__)
    add = parser.add_argument
    add("--min", type=parse_size, default="8", help="smallest size in bytes (%(default)s)")
    add("--max", type=parse_size, default="100M", help="largest size (%(default)s)")
    add("--factor", type=int, default=4, help="from one size to the next (%(default)s)")
    add("--sizes", help="these sizes instead, such as 8,16K,25M")
    add("--calls", action="store_true", help="the overhead of a call: 8 B to 1 KB, against mpi")
    add("--collective", choices=tuple(BUS_FACTORS), default="allreduce")
    add("--dtype", choices=tuple(_core.DTYPES), default="float32")
    add("--op", choices=tuple(_core.OPS), default="sum")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="so many ranks in this process, instead of mpirun's (cuda)")
    add("--graph", action="store_true", help="time the replay of a CUDA graph")
    add("--memory", choices=("symmetric", "private", "both"), default="both")
    add("--algorithm", choices=_core.ALGORITHMS, help="instead of the tuner's choice")
    add("--frameworks", type=parse_list(("torch", "numpy")), help="torch,numpy (torch if there)")
    add("--peers", type=parse_list(PEERS), help="mpi,gloo in the same run")
    add("--limit", action="store_true", help="a barrier, then x *= a on every rank")
    add("--iterations", type=int, help="per block (chosen for blocks of 30 ms)")
    add("--blocks", type=int, default=11, help="per contestant and size, at most (%(default)s)")
    add("--seconds", type=float, default=60.0, help="for the whole run (%(default)s)")
    add("-c", "--check", type=int, default=1, help="iterations compared bit for bit (%(default)s)")
    add("--json", metavar="FILE", help="write everything measured")
    add("--plot", metavar="FILE.png", help="draw time against size")
    options = parser.parse_args(arguments)
    if options.factor < 2 or options.blocks < 1 or (options.iterations or 1) < 1:
        parser.error("--factor must be at least 2, --blocks and --iterations at least 1")
    if options.min > options.max:
        parser.error("--min is larger than --max")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: python -m pip install matplotlib")
    if options.sizes is None:
        swept = sweep(options.min, options.max, options.factor)
        options.sizes = swept if not options.calls else CALL_SIZES
    if isinstance(options.sizes, str):
        try:
            options.sizes = [parse_size(text) for text in options.sizes.split(",")]
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    against = bench_gpu.reason_against(options)
    if against:
        parser.error(against)
    has_torch = importlib.util.find_spec("torch") is not None
    if options.frameworks is None:
        every = ["torch", "numpy"] if options.calls else ["torch"]
        options.frameworks = every if has_torch else ["numpy"]
    if options.peers is None:
        options.peers = ["mpi"] if options.calls else []
    return options


def wrong_elements(
    comm: Communicator,
    job: Job,
    buffers: Buffers,
    prepared: Prepared,
    size_bytes: int,
    iterations: int,
) -> int:
    """Wrong elements of all ranks in so many iterations, each with data of its own."""
    wrong = 0
    for iteration in range(iterations):
        data = input_data(job, size_bytes, comm.rank, iteration)
        buffers.source[: len(data)] = data
        returned = prepared.loop(1)
        got = as_bytes(returned) if prepared.output is None else prepared.output
        wrong += count_wrong(
            got, expected_data(job, size_bytes, comm.rank, iteration), job.item_bytes
        )
    return int(gather(comm, [wrong]).sum())


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [text.split(":", 1)[1].strip() for text in lines if "model name" in text]
    except OSError:
        models = []
    return models[0] if models else platform.machine()


def describe(comm: Communicator) -> dict[str, str]:
    """The machine and the versions, for the header and the JSON file."""
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    threads = ""
    if "torch" in sys.modules:
        import torch

        versions += f", torch {torch.__version__}"
        threads = f"; torch threads of a rank: {torch.get_num_threads()}"
    usable = len(os.sched_getaffinity(0))
    return {
        "versions": f"ringreduce {rr.__version__}, {versions}",
        "mpi": bench_peers.mpi_version(),
        "ranks": f"ranks: {comm.size}, {comm.local_size} of them on this node",
        "cores": f"cores: {os.cpu_count()}, rank 0 may use {usable}{threads}",
        "cpu": cpu_model(),
    }


class Bench:
    """One run: who takes part, on which memory, and what was found. All methods are collective."""

    def __init__(self, comm: Communicator, options: argparse.Namespace) -> None:
        self.comm, self.options = comm, options
        self.job = Job(options.collective, options.op, options.dtype, comm.size)
        memories = ["symmetric", "private"] if options.memory == "both" else [options.memory]
        capacity = max(self.job.count(size) * self.job.item_bytes for size in options.sizes)
        self.buffers = Buffers(comm, memories, max(capacity, 4), not self.job.in_place)
        self.unavailable: dict[str, str] = {}
        self.contestants: list[Contestant] = []
        self.gloo: bench_peers.Gloo | None = None
        for framework in options.frameworks:
            for memory in memories:
                self.admit(f"{memory} {framework}", self.build_ours, memory, framework)
        for name, wanted, build in (
            ("mpi", "mpi" in options.peers, self.build_mpi),
            ("gloo", "gloo" in options.peers, self.build_gloo),
            ("limit", options.limit, self.build_limit),
        ):
            if wanted:
                self.admit(name, build)
        names = [contestant.name for contestant in self.contestants]
        self.rivals = [name for name in ("limit", *PEERS) if name in names]

    def build_ours(self, memory: str, framework: str) -> Contestant:
        return bench_peers.ours(self.comm, self.buffers, self.job, memory, framework)

    def build_mpi(self) -> Contestant:
        return bench_peers.mpi(self.comm, self.buffers, self.job)

    def build_gloo(self) -> Contestant:
        self.gloo = bench_peers.Gloo(self.comm)
        return self.gloo.contestant(self.buffers, self.job)

    def build_limit(self) -> Contestant:
        return bench_peers.limit(self.comm, self.buffers, self.job)

    def admit(self, name: str, build: Callable[..., Contestant], *arguments: str) -> None:
        """Takes a contestant in if all ranks can have it."""
        reason, contestant = "", None
        try:
            contestant = build(*arguments)
        except Unavailable as missing:
            reason = str(missing)
        failed = gather(self.comm, [contestant is None])[:, 0] > 0
        if failed.any():
            first = int(failed.argmax())
            self.unavailable[name] = self.comm.broadcast_object(reason, root=first)
        elif contestant is not None:
            self.contestants.append(contestant)

    def run_size(self, size_bytes: int, share_s: float) -> list[Row]:
        """A row for every contestant."""
        memories = sorted({contestant.memory for contestant in self.contestants})
        everyone = [
            *(bench_peers.writes(self.buffers, self.job, memory) for memory in memories),
            *self.contestants,
        ]
        data = input_data(self.job, size_bytes, self.comm.rank, 0)
        self.buffers.source[: len(data)] = data
        prepared = [contestant.prepare(size_bytes) for contestant in everyone]
        wrong = [
            wrong_elements(self.comm, self.job, self.buffers, each, size_bytes, self.options.check)
            if contestant.checked and self.options.check
            else None
            for contestant, each in zip(everyone, prepared, strict=True)
        ]
        loops = [each.loop for each in prepared]
        iterations, seconds = measure(
            self.comm, loops, self.options.blocks, share_s, self.options.iterations
        )
        writes_s = dict(zip(memories, np.median(seconds, axis=0).tolist(), strict=False))
        return [
            make_row(
                self.job,
                size_bytes,
                everyone[i].name,
                seconds[:, i].tolist(),
                writes_s[everyone[i].memory],
                wrong[i],
                iterations[i],
            )
            for i in range(len(memories), len(everyone))
        ]

    def run(self, say: Callable[[str], None]) -> list[Row]:
        deadline_s = time.perf_counter() + self.options.seconds
        rows: list[Row] = []
        gc.disable()  # a collection inside a block would be counted
        for index, size_bytes in enumerate(self.options.sizes):
            left_s = seconds_left(self.comm, deadline_s)
            if left_s <= 0:
                skipped = ", ".join(map(size_text, self.options.sizes[index:]))
                say(f"# out of time (--seconds {self.options.seconds:g}): no {skipped}")
                break
            of_size = self.run_size(size_bytes, left_s / (len(self.options.sizes) - index))
            for row in of_size:
                say(line(row, ratios(of_size, self.rivals)[row.path]))
            rows += of_size
        gc.enable()
        return rows

    def close(self) -> None:
        if self.gloo is not None and "gloo" not in self.unavailable:
            self.gloo.close()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.device == "cuda":
        return bench_gpu.main(options)
    rr.init(algorithm=options.algorithm)
    comm = rr.world()

    def say(text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)

    bench = Bench(comm, options)
    machine = describe(comm)
    for text in machine.values():
        say(f"# {text}")
    say(f"# {options.collective}, algorithm {options.algorithm or 'auto'}; time: slowest rank,")
    say(
        "# median over alternating blocks; each iteration writes its input first, that is taken off"
    )
    if bench.rivals:
        meaning = ", ".join(f"{rival_heading(rival)}" for rival in bench.rivals)
        say(f"# ratios of times: {meaning}; a peer's column tells how many times slower it is")
    for name, reason in bench.unavailable.items():
        say(f"# {name}: unavailable: {reason}")
    if not bench.contestants:
        say("# nothing to measure")
        return 1
    say(heading(bench.rivals))
    rows = bench.run(say)
    bench.close()
    summary = summarize(rows, bench.rivals)
    if rows:
        say(
            f"# half of a row's blocks lie within {scatter(rows):.0%}: above 10 % ask who else runs"
        )
    if summary:
        say("# geometric means over the sizes")
    for text in summary_lines(summary):
        say(text)
    if comm.rank == 0 and options.json:
        report = {
            "machine": machine,
            "arguments": vars(options),
            "unavailable": bench.unavailable,
            "rows": [asdict(row) for row in rows],
            "summary": summary,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    if comm.rank == 0 and options.plot:
        title = f"{options.collective} {options.dtype}, {comm.size} ranks, {machine['cpu']}"
        names = {"mpi": machine["mpi"], "limit": "limit: a barrier, then x *= a"}
        draw(rows, names, title, options.plot)
    return 1 if any(row.wrong for row in rows if row.path not in PEERS) else 0


if __name__ == "__main__":
    sys.exit(main())
