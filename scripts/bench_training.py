"""What communication adds to a training step: DistributedModel beside torch's DDP over Gloo.

Run as `mpirun -np 2 python scripts/bench_training.py`. Three models are trained, each in three
ways: by every rank alone, with DDP, with DistributedModel. One step = zero_grad, forward, backward,
SGD; the steps of the three ways alternate. Only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import ringreduce as rr
from ringreduce.bench import describe, parse_list
from ringreduce.bench_peers import Gloo, Unavailable
from ringreduce.bench_table import number
from ringreduce.bench_timing import gather, measure, seconds_left

if TYPE_CHECKING:
    from ringreduce.communicator import Communicator

FIRST_STEPS = 2  # not timed; DDP arranges its buckets anew after the first
GRADIENT_TOLERANCE = 1e-3  # relative, after so many steps
LEARNING_RATE = 1e-3
WAYS = ("local", "ddp", "ringreduce")
EXPLANATION = (
    "times: ms of a step, slowest rank, median over rounds: local, then what is added to it;",
    "ratio: ringreduce's addition / DDP's",
    "memory: peak beyond the local way's, in units of the gradients' bytes, mean over ranks:",
    "resident pages, those of shared memory divided by how many ranks have touched them",
)

Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Task:
    """A model, and one rank's batch. The loss is the cross entropy of the last dimension."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    steps: int  # of one way before it is another's turn


@dataclass(frozen=True)
class Row:
    """What was found for one model. By way where it is a dict."""

    model: str
    parameters: int  # elements
    gradient_bytes: int
    local_ms: float  # a step without communication, slowest rank, median over rounds
    added_ms: dict[str, float]  # to the local step of the same round, median over rounds
    ratio: float | None  # ringreduce's added time / DDP's; None if DDP's lies below the noise
    extra_memory: dict[str, float | None]  # peak, in units of gradient_bytes, mean over ranks
    difference: float  # of ringreduce's gradients from DDP's, relative
    rounds_ms: dict[str, list[float]]


class SmallGpt(nn.Module):
    """A causal transformer: (batch, length) tokens to (batch, length, VOCABULARY) logits."""

    VOCABULARY, LENGTH, WIDTH, DEPTH, HEADS = 1024, 128, 256, 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(self.VOCABULARY, self.WIDTH)
        self.positions = nn.Embedding(self.LENGTH, self.WIDTH)
        layer = nn.TransformerEncoderLayer(
            self.WIDTH, self.HEADS, 4 * self.WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, self.DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(self.LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def build_mlp() -> nn.Module:
    """25 million parameters in four layers."""
    sizes = (1024, 3072, 3072, 3072, 1024)
    layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def build_tiny() -> nn.Module:
    """400 layers of 32 x 32, orthogonal: gradients neither vanish nor become subnormal."""
    layers = [nn.Linear(32, 32) for _ in range(400)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers)


def random_rows(rows: int, width: int, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (rows,), generator=generator)
        return torch.randn(rows, width, generator=generator), labels

    return batch


def random_text(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(SmallGpt.VOCABULARY, (4, SmallGpt.LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


TASKS = {
    "mlp": Task(build_mlp, random_rows(32, 1024, 1024), 1),
    "gpt": Task(SmallGpt, random_text, 1),
    "tiny": Task(build_tiny, random_rows(8, 32, 32), 4),
}


class Contestant:
    """One way to train one model: the model, and the loop of its steps."""

    def __init__(self, task: Task, wrap: Wrap, rank: int) -> None:
        torch.manual_seed(0)  # the same parameters in all ways, on all ranks
        self.model = wrap(task.build())
        self.x, self.y = task.batch(torch.Generator().manual_seed(rank))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def loop(self, steps: int) -> None:
        for _ in repeat(None, steps):
            self.optimizer.zero_grad()
            logits = self.model(self.x)
            nn.functional.cross_entropy(logits.flatten(0, -2), self.y.flatten()).backward()
            self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


class Memory:
    """Peak of this process's resident memory since it was made.

    Counts what the process has to itself, and of every page that others have mapped too (the
    ranks' symmetric memory) its part: so the sum over ranks is what the machine must hold.
    """

    def __init__(self) -> None:
        """Where there is no Linux, `grown_bytes` is None."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # or what was freed before would be used again and not be counted
            trim(0)
        self.start_bytes: int | None = None
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # the peak is now the present
            self.start_bytes = self.peak_bytes()
        except OSError:
            pass

    @staticmethod
    def peak_bytes() -> int:
        found = {}
        for path in ("/proc/self/status", "/proc/self/smaps_rollup"):
            with open(path, encoding="ascii", errors="replace") as lines:
                for text in lines:
                    name, _, value = text.partition(":")
                    if name in ("VmHWM", "Rss", "Pss"):
                        found[name] = int(value.split()[0]) * 1024
        return found["VmHWM"] - (found["Rss"] - found["Pss"])

    def grown_bytes(self) -> int | None:
        return None if self.start_bytes is None else self.peak_bytes() - self.start_bytes


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of two lists of gradients, relative to the largest element of each."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def make_row(
    model: str,
    elements: int,
    gradient_bytes: int,
    seconds: dict[str, list[float]],
    grown_bytes: dict[str, float | None],
    difference: float,
) -> Row:
    """seconds: per step, by way, in rounds; the rounds of all ways belong together."""
    local = seconds["local"]
    added_ms = {
        way: statistics.median(a - b for a, b in zip(seconds[way], local, strict=True)) * 1e3
        for way in WAYS[1:]
    }
    before = grown_bytes["local"]
    return Row(
        model=model,
        parameters=elements,
        gradient_bytes=gradient_bytes,
        local_ms=statistics.median(local) * 1e3,
        added_ms=added_ms,
        ratio=added_ms["ringreduce"] / added_ms["ddp"] if added_ms["ddp"] > 0 else None,
        extra_memory={
            way: None if grown is None or before is None else (grown - before) / gradient_bytes
            for way, grown in grown_bytes.items()
            if way != "local"
        },
        difference=difference,
        rounds_ms={way: [each * 1e3 for each in taken] for way, taken in seconds.items()},
    )


def run_task(comm: Communicator, name: str, rounds: int, deadline_s: float) -> Row:
    """Collective. Builds all three ways, lets each take its first steps, then times them."""
    task = TASKS[name]
    wraps: dict[str, Wrap] = {
        "local": lambda module: module,
        "ddp": nn.parallel.DistributedDataParallel,
        "ringreduce": lambda module: rr.DistributedModel(module, comm=comm),
    }
    Contestant(task, wraps["local"], comm.rank).loop(1)  # libraries take their own memory
    ways: dict[str, Contestant] = {}
    grown_bytes: dict[str, float | None] = {}
    for way in WAYS:
        comm.barrier()
        memory = Memory()
        comm.barrier()
        ways[way] = Contestant(task, wraps[way], comm.rank)
        ways[way].loop(FIRST_STEPS)
        comm.barrier()  # all have touched what they share
        grown = memory.grown_bytes()
        of_ranks = gather(comm, [-1 if grown is None else grown])
        grown_bytes[way] = float(of_ranks.mean()) if of_ranks.min() >= 0 else None
    ours, theirs = ways["ringreduce"].gradients(), ways["ddp"].gradients()
    difference = float(gather(comm, [largest_difference(ours, theirs)]).max())
    gc.disable()  # a collection inside a round would be counted
    loops = [ways[way].loop for way in WAYS]
    _, seconds = measure(comm, loops, rounds, seconds_left(comm, deadline_s), task.steps)
    gc.enable()
    parameters = list(ways["local"].model.parameters())
    return make_row(
        name,
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.itemsize for p in parameters),
        dict(zip(WAYS, seconds.T.tolist(), strict=True)),
        grown_bytes,
        difference,
    )


def heading() -> str:
    return (
        f"# {'model':>5} {'parameters':>11} {'local':>8} {'ddp':>9} {'ringreduce':>11}"
        f" {'ratio':>6} {'ddp memory':>11} {'ringreduce memory':>18}"
    )


def line(row: Row) -> str:
    ddp, ours = (number(row.added_ms[way]) for way in WAYS[1:])
    memory = [number(row.extra_memory[way]) for way in WAYS[1:]]
    return (
        f"  {row.model:>5} {row.parameters:>11} {number(row.local_ms):>8} {ddp:>9} {ours:>11}"
        f" {number(row.ratio):>6} {memory[0]:>11} {memory[1]:>18}"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", type=parse_list(TASKS), default=list(TASKS), help=f"of {','.join(TASKS)}")
    add("--rounds", type=int, default=15, help="of each model, at most (%(default)s)")
    add("--seconds", type=float, default=30.0, help="for the whole run, about (%(default)s)")
    add("--json", metavar="FILE", help="write everything measured")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not options.models:
        parser.error("--rounds must be at least 1, and --models name one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    rr.init()
    comm = rr.world()

    def say(text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)

    try:
        gloo = Gloo(comm)
    except Unavailable as missing:
        say(f"ddp: unavailable: {missing}")
        return 1
    machine = describe(comm)
    for text in machine.values():
        say(f"# {text}")
    for text in EXPLANATION:
        say(f"# {text}")
    say(heading())
    deadline_s = time.perf_counter() + options.seconds
    rows = []
    for index, name in enumerate(options.models):
        now_s = time.perf_counter()
        task_deadline_s = now_s + (deadline_s - now_s) / (len(options.models) - index)
        own = comm.split(0)  # opening one drops what closed ones still hold
        assert own is not None
        with own:
            rows.append(run_task(own, name, options.rounds, task_deadline_s))
        say(line(rows[-1]))
    gloo.close()
    wrong = [row.model for row in rows if not row.difference <= GRADIENT_TOLERANCE]
    for name in wrong:
        say(f"# {name}: the gradients are not DDP's")
    if comm.rank == 0 and options.json:
        report = {
            "machine": machine,
            "arguments": vars(options),
            "rows": [asdict(row) for row in rows],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
