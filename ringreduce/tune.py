"""What the links of this cluster cost: `mpirun ... python -m ringreduce.tune FILE.json`.

Measures between the hosts and inside of them, with the job's own ranks and wires, and writes the
constants by which RINGREDUCE_TUNING=FILE.json makes ringreduce choose. Changes no setting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import ringreduce as rr
from ringreduce import _core, bench_timing, tuning
from ringreduce.bench_peers import Loop
from ringreduce.info import SIZES, print_tuning, tuning_report

BLOCKS = 9  # of a loop; the median counts
SMALL_BYTES = tuple(1 << power for power in range(10, 16))  # where one_shot may end
INSIDE_BYTES = (1 << 20, 16 << 20)
LARGEST_CHECKED_BYTES = 16 << 20


def allreduce_loop(comm: rr.Communicator, size_bytes: int) -> Loop:
    """In private memory, whose contents stay as they are: nothing else is timed."""
    x = np.ones(size_bytes // 4, np.float32)

    def loop(iterations: int) -> None:
        for _ in range(iterations):
            comm.allreduce_(x, "max")

    return loop


def fresh_loop(comm: rr.Communicator, size_bytes: int, symmetric: bool) -> Loop:
    """Each iteration writes its input first: what is symmetric was last written by all ranks."""
    source = np.ones(size_bytes // 4, np.float32)
    x = rr.empty(source.shape, np.float32, comm=comm) if symmetric else np.empty_like(source)

    def loop(iterations: int) -> None:
        for _ in range(iterations):
            np.copyto(x, source)
            comm.allreduce_(x)

    return loop


def idle_loop(iterations: int) -> None:
    """Of a rank that only keeps time with the others."""


def barrier_loop(comm: rr.Communicator) -> Loop:
    def loop(iterations: int) -> None:
        for _ in range(iterations):
            comm.barrier()

    return loop


def medians_s(comm: rr.Communicator, loops: Sequence[Loop], share_s: float) -> list[float]:
    _, seconds = bench_timing.measure(comm, loops, BLOCKS, share_s)
    return [float(median) for median in np.median(seconds, axis=0)]


def rate_gb_per_s(times_s: Sequence[float], sizes_bytes: Sequence[int], factor: float) -> float:
    """Of what is moved, factor times the message, by what the larger one takes longer. A link so
    fast that noise is as long: by the larger one alone."""
    extra_s, extra_bytes = times_s[1] - times_s[0], sizes_bytes[1] - sizes_bytes[0]
    if extra_s < times_s[1] / 4:
        extra_s, extra_bytes = times_s[1], sizes_bytes[1]
    return factor * extra_bytes / extra_s / 1e9


# --- inside a node


def measure_inside(world: rr.Communicator, share_s: float) -> dict[str, float]:
    """Collective. On the first node that has several ranks, while the others rest."""
    mine = world.core.node if world.local_size > 1 else world.size
    first = int(world.allgather(np.array([mine])).min())
    if first == world.size:
        return {}
    color = 0 if world.core.node == first else None
    one_shot = world.split(color, algorithm="one_shot")
    two_shot = world.split(color, algorithm="two_shot")
    found: dict[str, float] = {}
    if one_shot is not None and two_shot is not None:
        loops = [allreduce_loop(two_shot, size) for size in INSIDE_BYTES]
        loops.append(allreduce_loop(one_shot, 8))
        *times_s, meeting_s = medians_s(one_shot, loops, share_s / 2)
        factor = 2 * (one_shot.size - 1) / one_shot.size
        found["meeting_us"] = meeting_s * 1e6
        found["inside_gb_per_s"] = rate_gb_per_s(times_s, INSIDE_BYTES, factor)
        found["one_shot_bytes"] = find_crossover(one_shot, two_shot, share_s / 2)
    return next(each for each in world_objects(world, found) if each)


def world_objects(world: rr.Communicator, mine: dict[str, float]) -> list[dict[str, float]]:
    return [json.loads(text) for text in world.exchange(json.dumps(mine).encode())]


def find_crossover(one_shot: rr.Communicator, two_shot: rr.Communicator, share_s: float) -> int:
    loops = [
        fresh_loop(comm, size, symmetric)
        for symmetric in (False, True)
        for size in SMALL_BYTES
        for comm in (one_shot, two_shot)
    ]
    times_s = np.array(medians_s(one_shot, loops, share_s)).reshape(2, len(SMALL_BYTES), 2)
    return best_limit(times_s)


def best_limit(times_s: np.ndarray) -> int:
    """Up to which size one_shot is taken so that least is lost; times_s[memory, size, way].

    What is lost counts relative to the better way, at all sizes and in both kinds of memory alike:
    so one size that a disturbance has met decides nothing.
    """
    lost = np.log(times_s / times_s.min(axis=2, keepdims=True)).sum(axis=0)  # [size, way]
    limits = (SMALL_BYTES[0] // 2, *SMALL_BYTES)
    losses = [lost[:number, 0].sum() + lost[number:, 1].sum() for number in range(len(limits))]
    return limits[int(np.argmin(losses))]


# --- between nodes


def measure_network(world: rr.Communicator, share_s: float) -> dict[str, float]:
    """Collective. By rings of one rank per node: one alone, then all rails at once."""
    rails = int(world.allgather(np.array([world.local_size])).min())
    nodes = world.core.window_info()["nodes"]
    rail = world.split(world.local_rank if world.local_rank < rails else None, algorithm="ring")
    # Of a ring between nodes in which all lanes are busy.
    least_bytes = nodes * _core.NETWORK_LANES * _core.NETWORK_CHUNK_BYTES
    sizes_bytes = [least_bytes, 3 * least_bytes]
    factor = 2 * (nodes - 1) / nodes
    found = {}
    if rail is not None and world.local_rank == 0:
        # 256 bytes for each node: a message is no longer than its latency. The ring begins with
        # the meeting that the barrier is.
        loops = [barrier_loop(rail), allreduce_loop(rail, nodes * 256)]
        loops += [allreduce_loop(rail, size) for size in sizes_bytes]
        meeting_s, short_s, *times_s = medians_s(rail, loops, share_s / 2)
        found["network_us"] = max(short_s - meeting_s, 1e-7) / (2 * (nodes - 1)) * 1e6
        found["network_rank_gb_per_s"] = rate_gb_per_s(times_s, sizes_bytes, factor)
        found["network_node_gb_per_s"] = found["network_rank_gb_per_s"]
    found = world_objects(world, found)[0]
    if rails > 1:
        loops = [allreduce_loop(rail, size) if rail else idle_loop for size in sizes_bytes]
        times_s = medians_s(world, loops, share_s / 2)
        found["network_node_gb_per_s"] = rate_gb_per_s(times_s, sizes_bytes, rails * factor)
    return found


# --- all of it


def measure(world: rr.Communicator, seconds: float) -> dict[str, float]:
    """Collective: the constants, equal on all ranks. Without those of links that are not there."""
    constants: dict[str, float] = {}
    if world.core.window_info()["nodes"] > 1:
        constants |= measure_network(world, seconds / 2)
    constants |= measure_inside(world, seconds / 3)
    rounded = {name: float(f"{value:.6g}") for name, value in constants.items()}
    agreed: dict[str, float] = world.broadcast_object(rounded)
    return agreed


def check(comm: rr.Communicator, seconds: float) -> dict[int, float]:
    """Collective: by bytes, seconds that an allreduce takes by what is chosen now."""
    sizes = [size for size in SIZES if size <= LARGEST_CHECKED_BYTES]
    loops = [allreduce_loop(comm, size) for size in sizes]
    return dict(zip(sizes, medians_s(comm, loops, seconds), strict=True))


def require_writable(path: str) -> None:
    """Before anything is measured. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(path))):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringreduce.tune", description=__doc__)
    parser.add_argument("file", metavar="FILE.json", help="written by rank 0")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="to measure for, about (%(default)s)"
    )
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error("--seconds is a positive number")
    world = rr.world()
    if world.size == 1:
        parser.error("one rank has no links: start it like a training, by mpirun on all hosts")
    problem = None
    if world.rank == 0:
        try:
            require_writable(options.file)
        except OSError as error:
            problem = f"{options.file}: {error.strerror}"
    problem = world.broadcast_object(problem)
    if problem is not None:
        parser.error(problem)
    started_s = time.monotonic()
    constants = measure(world, options.seconds)
    world.bootstrap.settings = replace(
        world.bootstrap.settings, tuning=options.file, constants=constants
    )
    tuned = world.split(0, algorithm="auto")
    assert tuned is not None
    times_s = check(tuned, options.seconds / 6)
    if world.rank > 0:
        return
    where = {
        "ranks": world.size,
        "hosts": world.core.window_info()["nodes"],
        "ranks on rank 0's host": world.local_size,
        "rank 0's host": platform.node(),
        "on": time.strftime("%Y-%m-%d"),
    }
    tuning.write(options.file, constants, where)
    print_tuning(tuning_report(tuned, times_s))
    print(f"{options.file}: measured in {time.monotonic() - started_s:.1f} s")


if __name__ == "__main__":
    main()
