"""What a timeline has in it, that it is one picture of all ranks, and that it never costs a run."""

import json
import os
import signal
import sys
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import ringreduce as rr
from ringreduce import testing
from ringreduce.clocks import offset_between
from ringreduce.errors import MismatchError, PeerFailed
from ringreduce.recording import Span
from ringreduce.timeline import _lanes
from ringreduce.timeline import timeline as record

STEPS = 3
MODULE = sys.modules["ringreduce.timeline"]  # the package has the function by that name


def events(path, rank=None, **wanted):
    """The complete events with these values, of a rank or of all, in order of time."""
    found = json.loads(path.read_text())["traceEvents"]
    chosen = [
        event
        for event in found
        if event["ph"] == "X"
        and rank in (None, event["pid"])
        and all(event[key] == value for key, value in wanted.items())
    ]
    return sorted(chosen, key=lambda event: event["ts"])


def end(event):
    return event["ts"] + event["dur"]


def lines(path):
    """(pid, tid) -> name."""
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in json.loads(path.read_text())["traceEvents"]
        if event["name"] == "thread_name"
    }


def check_format(path, size):
    """The Trace Event Format: complete events of a thread lie within each other or apart."""
    document = json.loads(path.read_text())
    assert document["otherData"]["ranks"] == size
    assert document["otherData"]["dropped_collectives"] == 0
    names = {
        e["pid"]: e["args"]["name"]
        for e in document["traceEvents"]
        if e["ph"] == "M" and e["name"] == "process_name"
    }
    assert sorted(names) == list(range(size))
    assert all(names[rank].startswith(f"rank {rank} (") for rank in names)
    threads = defaultdict(list)
    for event in document["traceEvents"]:
        assert event["ph"] in "XM" and isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append(event)
    assert set(threads) == set(lines(path))
    for members in threads.values():
        open_until = []
        for event in sorted(members, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"] + 1e-3:
                open_until.pop()
            assert not open_until or end(event) <= open_until[-1] + 1e-3
            open_until.append(end(event))


def test_one_event_for_each_collective(tmp_path, ranks):
    path = tmp_path / "trace.json"

    def body(comm):
        comm.barrier()  # before: not in it
        with record(path, comm=comm):
            for _ in range(5):
                comm.allreduce_(np.ones(4, "f4"))  # the short way
            comm.allreduce(torch.ones(300, 300, dtype=torch.float64), "avg")
            comm.allreduce_(np.ones(7), "max", async_op=True).wait()
            comm.allgather(np.ones(comm.rank, "i4"))
            part = comm.split(0)
            part.broadcast_(np.ones(3))
            part.empty(10, "f8")
            part.close()
        comm.barrier()

    ranks(3, body)
    check_format(path, 3)
    for rank in range(3):
        mine = [e for e in events(path, rank) if "sequence" in e["args"]]
        reduced = [e["args"] for e in mine if e["name"] == "allreduce"]
        assert [e["bytes"] for e in reduced] == [16] * 5 + [720000, 56]
        assert [e["thread"] for e in reduced] == ["caller"] * 6 + ["progress"]
        assert [e["op"] for e in reduced] == ["sum"] * 5 + ["avg", "max"]
        assert [e["dtype"] for e in reduced] == ["float32"] * 5 + ["float64"] * 2
        assert [e["algorithm"] for e in reduced] == ["one_shot"] * 5 + ["two_shot", "one_shot"]
        assert len({e["sequence"] for e in reduced}) == 7
        assert [e["args"]["bytes"] for e in mine if e["name"] == "broadcast"] == [24]
        allocated = [e["args"] for e in mine if e["name"] == "empty"]
        assert [set(e) for e in allocated] == [{"bytes", "sequence", "thread"}]
        tracks = {lines(path)[e["pid"], e["tid"]] for e in mine}
        assert tracks == {"communication (test)", "communication (world/2.0)"}
        assert not [e for e in mine if e["name"] == "barrier"]


def test_phases_say_who_was_late(tmp_path):
    path = tmp_path / "trace.json"
    entered = threading.Event()

    def body(comm):
        with record(path, comm=comm):
            if comm.rank == 0:
                entered.wait(30)
                threading.Event().wait(0.05)
            else:
                entered.set()
            comm.allreduce_(np.ones(100_000))

    testing.run_threads(2, body)
    check_format(path, 2)
    for rank in range(2):
        (whole,) = events(path, rank, name="allreduce")
        (waited,) = events(path, rank, name="wait for peers")
        (moved,) = events(path, rank, name="move and reduce")
        assert waited["ts"] == whole["ts"] and end(moved) == pytest.approx(end(whole), abs=1e-2)
        assert moved["ts"] == pytest.approx(end(waited), abs=1e-2) and moved["dur"] > 0
    waits_us = [events(path, rank, name="wait for peers")[0]["dur"] for rank in range(2)]
    assert waits_us[1] > 40_000 > waits_us[0]
    # One clock: nobody has moved data before the last one came.
    came_us = max(e["ts"] for e in events(path, name="allreduce"))
    assert all(e["ts"] >= came_us for e in events(path, name="move and reduce"))


def train(comm, steps):
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    model = rr.DistributedModel(module, bucket_mb=0.03, first_bucket_mb=0.02, comm=comm)
    for _ in range(steps):
        model(torch.ones(8, 64)).sum().backward()
        model.zero_grad()
    return model


def check_training(path, size):
    check_format(path, size)
    for rank in range(size):
        backwards = events(path, rank, name="backward")
        finishes = events(path, rank, name="finish")
        assert len(backwards) == len(finishes) == STEPS
        for number in range(3):
            buckets = events(path, rank, name=f"bucket {number}")
            assert len(buckets) == STEPS
            for bucket, backward in zip(buckets, backwards, strict=True):
                assert backward["ts"] < bucket["ts"] < end(bucket) <= end(backward)
        # The first bucket is complete long before backward has computed the last gradient.
        firsts = events(path, rank, name="bucket 0")
        assert all(b["ts"] < f["ts"] for b, f in zip(firsts, finishes, strict=True))


def test_training(tmp_path):
    path = tmp_path / "trace.json"

    def body(comm):
        with record(path, comm=comm):
            stats = train(comm, STEPS).stats()
        return stats

    for stats in testing.run_threads(2, body):
        assert stats["backwards"] == STEPS and stats["buckets"] >= 3
        assert stats["bytes"] == stats["gradient_bytes"] == STEPS * 6 * (64 * 65) * 4
        assert 0 <= stats["hidden_s"] <= stats["communication_s"]
        assert stats["overlap"] == stats["hidden_s"] / stats["communication_s"]
    check_training(path, 2)


def test_stats_count_what_travels(tmp_path):
    def body(comm):
        model = rr.DistributedModel(nn.Linear(64, 64), compression="bf16", comm=comm)
        assert model.stats()["overlap"] is None
        model(torch.ones(2, 64)).sum().backward()
        return model.stats()

    for stats in testing.run_threads(2, body):
        assert stats["gradient_bytes"] == 2 * stats["bytes"] > 0


def test_overlap_is_what_ended_before_backward():
    from ringreduce.costs import Totals

    class Bucket:
        def __init__(self, begin_ns, end_ns):
            self.work = rr.Work([type("Part", (), {"times_ns": lambda _: (begin_ns, end_ns)})()])

    totals = Totals()
    assert totals.overlap is None
    # Hidden wholly, for a quarter, not at all.
    totals.count([Bucket(0, 400), Bucket(400, 800), Bucket(800, 1000)], 500)
    assert totals.communication_s == pytest.approx(1e-6)
    assert totals.overlap == pytest.approx(0.5)


def test_under_mpirun(mpirun, tmp_path):
    path = tmp_path / "trace.json"
    done = mpirun(
        2,
        f"""
import sys; sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import ringreduce as rr, torch
from test_timeline import STEPS, train
with rr.timeline({str(path)!r}):
    for _ in range(4):
        rr.allreduce(torch.ones(10))
    model = train(None, STEPS)
assert rr.world().core.aborted is False
try:
    with rr.timeline({str(path / "no" / "trace.json")!r}):
        raise AssertionError("the folder is missing")
except NotADirectoryError as error:  # it is a file
    assert "rank 0 cannot write" in str(error), error
print("done", rr.rank())
""",
    )
    assert done.returncode == 0, done.stderr
    assert "done 0" in done.stdout and "done 1" in done.stdout
    check_training(path, 2)
    for rank in range(2):
        world = [e for e in events(path, rank, name="allreduce") if e["args"]["bytes"] == 40]
        assert len(world) == 4


@pytest.mark.parametrize("name, error", [("", ValueError), (3, TypeError), (b"x", TypeError)])
def test_what_is_no_path(name, error):
    with pytest.raises(error, match="path|str"):
        rr.timeline(name)


def test_where_nothing_can_be_written(tmp_path):
    def body(comm):
        for path, error in [
            (tmp_path / "missing" / "trace.json", FileNotFoundError),
            (tmp_path, IsADirectoryError),
        ]:
            with pytest.raises(error, match="rank 0 cannot write"), record(path, comm=comm):
                raise AssertionError("it was entered")
        return comm.allreduce(np.ones(1))[0]  # all are in step

    assert testing.run_threads(2, body) == [2, 2]
    assert list(tmp_path.iterdir()) == []


def test_not_within_itself(tmp_path):
    path = tmp_path / "trace.json"

    def body(comm):
        with record(path, comm=comm):
            with pytest.raises(RuntimeError, match="within"), record(path, comm=comm):
                raise AssertionError("it was entered")
            comm.barrier()
        with record(path, comm=comm):  # one after the other is fine
            comm.barrier()
            comm.barrier()

    testing.run_threads(2, body)
    assert len(events(path, 0, name="barrier")) == 2


def test_entering_alone(tmp_path):
    def body(comm):
        if comm.rank == 0:
            with pytest.raises(MismatchError, match="all ranks must enter timeline"):
                record(tmp_path / "trace.json", comm=comm).__enter__()
        else:
            with pytest.raises(MismatchError, match="rank 0 calls allgather"):
                comm.allreduce_(np.ones(3))
        comm.barrier()

    testing.run_threads(2, body)


def test_exception_on_all_ranks(tmp_path):
    path = tmp_path / "trace.json"

    def body(comm):
        with pytest.raises(MismatchError), record(path, comm=comm):
            comm.allreduce_(np.ones(comm.rank + 1))

    testing.run_threads(2, body)
    check_format(path, 2)
    assert {e["args"]["error"] for e in events(path, name="allreduce")} == {"mismatch"}


def test_exception_on_one_rank(tmp_path, monkeypatch, caplog):
    path = tmp_path / "trace.json"
    monkeypatch.setattr(MODULE, "PATIENCE_S", 0.2)

    def body(comm):
        try:
            with record(path, comm=comm):
                if comm.rank == 0:
                    raise KeyError("mine")
                comm.barrier()  # rank 0 never comes
        except KeyError:
            comm.close()
            return "mine"
        except PeerFailed:
            return "peer"

    assert testing.run_threads(2, body, timeout_s=20) == ["mine", "peer"]
    assert not path.exists()
    assert "is not written" in caplog.text


def test_dead_rank(tmp_path):
    path = tmp_path / "trace.json"

    def body(comm):
        with pytest.raises(PeerFailed), record(path, comm=comm):
            comm.barrier()
            if comm.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return True

    assert testing.run_forks(3, body, timeout_s=20, killed=[1]) == [True, None, True]
    assert not path.exists()


def test_off_records_nothing():
    def body(comm):
        comm.allreduce_(np.ones(3))
        recorder = comm.bootstrap.recorder
        recorder.add("training", "late", 0, 1)
        return recorder.stop()

    assert testing.run_threads(2, body) == [([], 0)] * 2


def test_lanes_part_what_overlaps():
    a, b, c, d = (Span("buckets", "", *ends) for ends in [(0, 10), (5, 15), (10, 20), (11, 12)])
    assert _lanes([d, c, b, a]) == [[a, c, d], [b]]


def test_clocks_of_two_hosts():
    """Their clock is 1000 behind at the start, and 40 slower by the end."""

    def barriers(at_ns, shift_ns):
        """The quickest one takes them 4."""
        return [(t - 20 - shift_ns, t + 30 - shift_ns) for t in (at_ns, at_ns + 100)] + [
            (at_ns + 200 - 2 - shift_ns, at_ns + 200 + 2 - shift_ns)
        ]

    ours = [barriers(0, 0), barriers(10_000, 0)]
    theirs = [barriers(0, 1000), barriers(10_000, 1040)]
    offset = offset_between(ours, theirs)
    assert offset.accuracy_ns <= 4
    for time_ns, shift_ns in [(200, 1000), (5_200, 1020), (10_200, 1040)]:
        assert abs(offset(time_ns - shift_ns) - time_ns) <= 4


def test_ranks_of_several_clocks(tmp_path, monkeypatch):
    """Each rank takes itself for another host: times are still those of one picture."""
    path = tmp_path / "trace.json"
    monkeypatch.setattr(MODULE, "clock_name", lambda: f"clock {threading.get_ident()}")

    def body(comm):
        with record(path, comm=comm):
            comm.allreduce_(np.ones(100_000))

    testing.run_threads(2, body)
    accuracy_us = json.loads(path.read_text())["otherData"]["clock_accuracy_us"]
    assert 0 < accuracy_us < 50_000
    ends = [end(event) for event in events(path, name="wait for peers")]
    assert max(ends) - min(ends) < 100_000


def test_ranges_in_torch_profiler():
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    )

    def body(comm):
        model = rr.DistributedModel(nn.Linear(4, 4), comm=comm)
        outputs = model(torch.ones(2, 4)).sum()
        comm.allreduce_(torch.ones(3))  # so that torch is known
        if comm.rank == 0:
            profiler.start()
        comm.barrier()
        comm.allreduce_(torch.ones(100))
        comm.allgather(torch.ones(5, dtype=torch.int8))
        outputs.backward()
        comm.barrier()
        if comm.rank == 0:
            profiler.stop()

    testing.run_threads(2, body)
    found = defaultdict(list)
    for event in profiler.events():
        if event.name.startswith("ringreduce::"):
            found[event.name.removeprefix("ringreduce::")].append(event.kwinputs.get("bytes"))
    assert 400 in found["allreduce"]
    assert found["allgather"] == [5]
    assert found["pack"] and found["launch"] and found["finish"]
