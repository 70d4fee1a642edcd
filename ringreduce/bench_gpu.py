"""Collectives on memory of GPUs, timed: what `python -m ringreduce.bench --device cuda` runs.

As nccl-tests do it: many calls, or replays of a CUDA graph of many calls, then one wait for the
device; in place, and nothing is written in between. The bound is what the algorithm must read and
write of the devices' memory, at the speed of a copy on one of them in the same run. Links between
GPUs have no part in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

import ringreduce as rr
from ringreduce import _core
from ringreduce.bench_data import Job, count_wrong, expected_data, input_data
from ringreduce.bench_peers import Call, Loop
from ringreduce.bench_table import Row, heading, line, make_row, ratio
from ringreduce.bench_timing import gather, measure, seconds_left
from ringreduce.testing import run_threads

if TYPE_CHECKING:
    from ringreduce.communicator import Communicator

GRAPH_CALLS = 100  # in a graph: what its launch costs is spread over them
COPY_BYTES = 1 << 30  # far above any cache
COPIES, COPY_BLOCKS = 10, 5
GRACE_S = 60.0  # to begin and to end, beside --seconds
BOUND = "bound"

Found = tuple[Row, float | None]  # with the bound over its time


def reason_against(options: argparse.Namespace) -> str:
    """Why these arguments of the benchmark are not for GPUs, or need them; empty: they fit."""
    if options.device == "cpu":
        return (
            "--threads and --graph need --device cuda" if options.threads or options.graph else ""
        )
    if options.peers or options.limit or options.calls or options.plot:
        return "--peers, --limit, --calls and --plot are for CPUs"
    if options.frameworks not in (None, ["torch"]) or importlib.util.find_spec("torch") is None:
        return "--device cuda takes torch tensors, and needs torch"
    if options.threads is not None and options.threads < 1:
        return "--threads must be at least 1"
    if options.graph and not job_of(options, 1).in_place:
        return "--graph takes allreduce and broadcast"
    return ""


def job_of(options: argparse.Namespace, ranks: int) -> Job:
    return Job(options.collective, options.op, options.dtype, ranks)


def traffic_bytes(job: Job, algorithm: str, size_bytes: int) -> int | None:
    """Bytes of device memory that an allreduce reads and writes, on all ranks together.

    two_shot reads every input and writes every output once. On the ring and the trees, that is so
    too, and each of the 2 (p - 1) times that a part goes from rank to rank, it is written to a slot
    and read from there (cost.h); unfinished sums of 16-bit floats as float32. None: not known.
    """
    if job.collective != "allreduce" or algorithm == "one_shot":
        return None
    p, message_bytes = job.ranks, job.count(size_bytes) * job.item_bytes
    tensors_bytes = 2 * p * message_bytes
    if algorithm not in ("ring", "tree"):
        return tensors_bytes
    partial = 2 if job.dtype in ("float16", "bfloat16") else 1
    return tensors_bytes + 2 * (p - 1) * message_bytes * (partial + 1)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy on the current device."""
    import torch

    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(COPY_BLOCKS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(COPIES):
            target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES * COPIES / min(seconds)


class GpuBench:
    """One rank's side of a run, on the current device and stream. All methods are collective."""

    def __init__(self, comm: Communicator, options: argparse.Namespace) -> None:
        import torch

        self.comm, self.options = comm, options
        self.job = job_of(options, comm.size)
        self.algorithm = options.algorithm or "auto"
        self.stream = torch.cuda.current_stream()
        # Before ranks share memory: kernels that wait for each other leave no time for a copy.
        own = copy_bandwidth() if comm.rank == 0 else 0.0
        uuid = torch.cuda.get_device_properties(self.stream.device).uuid
        found = gather(comm, [own, zlib.crc32(str(uuid).encode())])
        self.bandwidth = float(found[0, 0])
        self.devices = len(np.unique(found[:, 1]))
        self.call: Call = getattr(comm, self.job.collective + ("_" if self.job.in_place else ""))
        memories = ["symmetric", "private"] if options.memory == "both" else [options.memory]
        most = max(self.job.input_count(size) for size in options.sizes)
        largest = max(most * self.job.item_bytes, 16)
        self.memory = {memory: self.allocate(memory, largest) for memory in memories}
        self.calls(self.operand(memories[0], 1))(1)  # this opens the GPU

    def allocate(self, memory: str, size_bytes: int) -> Any:
        import torch

        if memory == "symmetric":
            return self.comm.empty((size_bytes,), torch.uint8, device="cuda").zero_()
        return torch.zeros(size_bytes, dtype=torch.uint8, device="cuda")

    def operand(self, memory: str, size_bytes: int) -> Any:
        import torch

        input_bytes = self.job.input_count(size_bytes) * self.job.item_bytes
        return self.memory[memory][:input_bytes].view(getattr(torch, self.job.dtype))

    def collective(self, x: Any) -> Any:
        return self.call(x, op=self.job.op) if self.job.reduces else self.call(x)

    def calls(self, x: Any) -> Loop:
        def loop(iterations: int) -> None:
            for _ in repeat(None, iterations):
                self.collective(x)
            self.stream.synchronize()
            self.comm.check()

        return loop

    def replays(self, x: Any) -> Loop:
        """Replays of a graph of GRAPH_CALLS calls.

        Nobody may still compute, or wait for the device, while another rank's thread captures.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        self.calls(x)(1)
        self.comm.barrier()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(GRAPH_CALLS):
            self.collective(x)
        self.comm.barrier()
        graph.capture_end()
        self.comm.barrier()

        def loop(iterations: int) -> None:
            for _ in repeat(None, iterations):
                graph.replay()
            self.stream.synchronize()
            self.comm.check()

        return loop

    def wrong_elements(self, x: Any, size_bytes: int) -> int:
        """Of all ranks, in --check calls, each with data of its own."""
        import torch

        wrong = 0
        for iteration in range(self.options.check):
            data = input_data(self.job, size_bytes, self.comm.rank, iteration)
            x.view(torch.uint8).copy_(torch.from_numpy(data))
            got = self.collective(x).contiguous().view(torch.uint8).cpu().numpy()
            expected = expected_data(self.job, size_bytes, self.comm.rank, iteration)
            wrong += count_wrong(got, expected, self.job.item_bytes)
        return int(gather(self.comm, [wrong]).sum())

    def bound_s(self, size_bytes: int) -> float | None:
        traffic = traffic_bytes(self.job, self.algorithm, size_bytes)
        return None if traffic is None else traffic / self.devices / self.bandwidth

    def row(self, memory: str, size_bytes: int, share_s: float) -> Row:
        x = self.operand(memory, size_bytes)
        wrong = self.wrong_elements(x, size_bytes) if self.options.check else None
        loop = self.replays(x) if self.options.graph else self.calls(x)
        per_iteration = GRAPH_CALLS if self.options.graph else 1
        iterations, seconds = measure(
            self.comm, [loop], self.options.blocks, share_s, self.options.iterations
        )
        path = f"{memory}{' graph' if self.options.graph else ''}"
        each_s = (seconds[:, 0] / per_iteration).tolist()
        calls = iterations[0] * per_iteration
        return make_row(self.job, size_bytes, path, each_s, 0.0, wrong, calls)

    def run(self, say: Callable[[str], None]) -> list[Found]:
        deadline_s = time.perf_counter() + self.options.seconds
        shares = len(self.options.sizes) * len(self.memory)
        found: list[Found] = []
        for size_bytes in self.options.sizes:
            for memory in self.memory:
                left_s = seconds_left(self.comm, deadline_s)
                if left_s <= 0:
                    say(f"# out of time (--seconds {self.options.seconds:g})")
                    return found
                row = self.row(memory, size_bytes, left_s / (shares - len(found)))
                bound_s = self.bound_s(size_bytes)
                part = ratio(None if bound_s is None else bound_s * 1e6, row.time_us)
                say(line(row, {BOUND: part}))
                found.append((row, part))
        return found

    def describe(self) -> dict[str, str]:
        import torch

        info = self.comm.core.gpu_info() or {}
        path = (
            f"{info.get('path', 'unknown')}{': ' if info.get('why') else ''}{info.get('why', '')}"
        )
        return {
            "versions": f"ringreduce {rr.__version__}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, CUDA {_core.cuda_info()['built']}",
            "ranks": f"ranks: {self.comm.size}, on GPUs: {self.devices}; path: {path}",
            "gpu": f"{torch.cuda.get_device_name()}: a copy reads and writes "
            f"{self.bandwidth / 1e9:.0f} GB/s",
        }


def run_rank(comm: Communicator, options: argparse.Namespace) -> list[Found]:
    """A rank's whole run, on a GPU and a stream of its own. Rank 0 prints, and writes --json."""
    import torch

    def say(text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)

    device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        bench = GpuBench(comm, options)
        machine = bench.describe()
        for text in machine.values():
            say(f"# {text}")
        say(f"# {options.collective}, algorithm {bench.algorithm}; time: slowest rank, median over")
        say(f"# blocks; {BOUND}/: the time of its traffic at the copy's speed, over its time")
        say(heading([BOUND]))
        found = bench.run(say)
        torch.cuda.current_stream().synchronize()
    if comm.rank == 0 and options.json:
        rows = [asdict(row) | {BOUND: part} for row, part in found]
        report = {"machine": machine, "arguments": vars(options), "rows": rows}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return found


def run(options: argparse.Namespace) -> list[Found]:
    """A run on the ranks that the options ask for: threads of this process, or the world."""
    # Before CUDA starts: fewer queues than ranks, and one rank's kernel waits behind another's.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if not options.threads:
        rr.init(algorithm=options.algorithm)
        return run_rank(rr.world(), options)
    return run_threads(
        options.threads,
        lambda comm: run_rank(comm, options),
        timeout_s=options.seconds + GRACE_S,
        algorithm=options.algorithm,
    )[0]


def main(options: argparse.Namespace) -> int:
    """The exit status: 1 if an element was wrong, or there is no GPU."""
    unavailable = _core.cuda_info()["unavailable"]
    if unavailable:
        print(f"CUDA is unavailable: {unavailable}", file=sys.stderr)
        return 1
    return 1 if any(row.wrong for row, _ in run(options)) else 0
