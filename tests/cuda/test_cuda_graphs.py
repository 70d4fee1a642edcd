"""Collectives in CUDA graphs: recorded once, replayed on other data; and replays that go wrong."""

from __future__ import annotations

import threading

import pytest
import torch

import ringreduce as rr
from ringreduce.testing import run_threads

pytestmark = pytest.mark.cuda

REPLAYS = 5


def record(comm, step) -> torch.cuda.CUDAGraph:
    """Of the current stream. While one rank records, none may wait for the whole device."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    comm.barrier()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        step()
    finally:
        graph.capture_end()
    comm.barrier()
    return graph


@pytest.mark.parametrize("algorithm", ["auto", "one_shot", "two_shot", "ring", "tree"])
@pytest.mark.parametrize("count", [100, 200_003])
def test_replays(algorithm, count):
    def run(comm):
        x, y = torch.empty(count, device="cuda"), torch.empty(count, device="cuda")
        symmetric = comm.empty(count, torch.float32, device="cuda")
        comm.allreduce_(torch.ones(3, device="cuda"))

        def step() -> None:
            y.copy_(x)
            comm.allreduce_(y)
            symmetric.copy_(y)
            comm.allreduce_(symmetric, "avg")
            y.add_(comm.broadcast(symmetric, 1))

        graph = record(comm, step)
        for turn in range(REPLAYS):
            x.fill_(comm.rank + turn)
            graph.replay()
            total = 3 + 3 * turn
            assert bool((symmetric == total).all()) and bool((y == 2 * total).all())
        # Between replays, calls as always.
        assert comm.allreduce(torch.ones(5, device="cuda")).tolist() == [3.0] * 5
        x.fill_(1)
        graph.replay()
        assert bool((y == 6).all())
        comm.check()

    run_threads(3, run, algorithm=algorithm, timeout=60.0)


def test_what_a_training_step_sends():
    """Groups, asynchronous calls, and an allgather, whose host meets the others at the capture."""

    def run(comm):
        grads = [torch.empty(n, device="cuda") for n in (10, 5000, 70_001)]
        state = [torch.empty(4, device="cuda"), torch.empty(6, device="cuda").view(2, 3).t()]
        found: list[torch.Tensor] = []
        comm.allreduce_(torch.ones(3, device="cuda"))

        def step() -> None:
            works = [comm.allreduce_(grad, "avg", async_op=True) for grad in grads]
            comm.grouped_allreduce_(state)
            for work in works:
                work.wait()
            found[:] = [comm.allgather(state[0][: comm.rank + 1])]

        graph = record(comm, step)
        for turn in range(REPLAYS):
            for x in (*grads, *state):
                x.fill_(2 * comm.rank + turn)
            graph.replay()
            assert all(bool((x == 1 + turn).all()) for x in grads)
            assert all(bool((x == 2 + 2 * turn).all()) for x in state)
            assert found[0].tolist() == [2.0 + 2 * turn] * 3

    run_threads(2, run)


def test_the_first_call_cannot_be_recorded():
    def run(comm):
        x = torch.ones(3, device="cuda")
        with pytest.raises(ValueError, match="before the capture"):
            record(comm, lambda: comm.allreduce_(x))
        torch.cuda.current_stream().synchronize()
        assert comm.allreduce(x).tolist() == [2.0] * 3

    run_threads(2, run)


def test_a_rank_that_does_not_replay_is_named():
    """No host looks on: the kernel leaves at the deadline, and the device stays usable."""
    told = threading.Event()

    def run(comm):
        x = torch.ones(1000, device="cuda")
        comm.allreduce_(x)
        graph = record(comm, lambda: comm.allreduce_(x))
        if comm.rank == 0:
            graph.replay()
            torch.cuda.current_stream().synchronize()
            with pytest.raises(rr.CollectiveTimeout, match="rank 1"):
                while True:  # until the host has heard of it; the time limit of the ranks ends it
                    comm.check()
            assert torch.ones(3, device="cuda").sum().item() == 3.0
            told.set()
        assert told.wait(50.0)

    run_threads(2, run, timeout=2.0)


def test_ranks_that_replay_different_collectives():
    def run(comm):
        x = torch.ones(1000, device="cuda")
        comm.allreduce_(x)
        graphs = [record(comm, lambda op=op: comm.allreduce_(x, op)) for op in ("sum", "max")]
        graphs[comm.rank].replay()
        torch.cuda.current_stream().synchronize()
        with pytest.raises(rr.RingReduceError):
            while True:
                comm.check()

    run_threads(2, run, timeout=5.0)
