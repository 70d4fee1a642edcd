"""Data-parallel training on a GPU is training in one process on all ranks' data together."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import wrapped
from torch import nn
from wrapped import TINY, SumOfBranches, assert_close, assert_equal, build, gradients, mlp, normal

import ringreduce as rr
from ringreduce.model import DistributedModel
from ringreduce.sync_batchnorm import convert_sync_batchnorm
from ringreduce.testing import run_threads

pytestmark = pytest.mark.cuda

SIZE = 3


def data(rank: int, rows: int = 8) -> torch.Tensor:
    return normal(rows, 32, seed=rank).cuda()


def loss(model: nn.Module, rank: int) -> torch.Tensor:
    return model(data(rank)).square().mean()


def on_gpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cuda()


@pytest.mark.parametrize("options", [{}, TINY, {"first_bucket_mb": 0.01, "bucket_mb": 0.05}])
def test_equals_one_process_on_the_union_of_batches(options):
    model = build(lambda: mlp(32, 64, 64, 8))

    def run(comm):
        mine = DistributedModel(on_gpu(model), comm=comm, **options)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss(mine, step * SIZE + comm.rank).backward()
            optimizer.step()
        stats = mine.stats()
        assert stats["backwards"] == 4 and (stats["buckets"] > 1) == bool(options)
        return gradients(mine), {name: x.clone() for name, x in mine.state_dict().items()}

    alone = on_gpu(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        union = torch.cat([data(step * SIZE + rank) for rank in range(SIZE)])
        alone(union).square().mean().backward()
        optimizer.step()
    found = run_threads(SIZE, run)
    for grads, state in found:
        assert_close(grads, gradients(alone))
        assert_close(state, alone.state_dict())
        assert_equal(grads, found[0][0])


def test_buckets_are_symmetric_memory_of_the_gpu():
    model = build(lambda: mlp(32, 64, 8))

    def run(comm):
        mine = DistributedModel(on_gpu(model), comm=comm)
        loss(mine, comm.rank).backward()
        core = mine._attachment._reducer.comm.core
        for x in mine.parameters():
            assert x.grad.is_cuda and core.is_symmetric(x.grad.data_ptr(), x.grad.nbytes)

    run_threads(2, run)


def test_reductions_begin_before_backward_has_ended():
    """A bucket is on its way on another stream while the device still computes gradients."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.cuda._sleep(800_000_000)  # cycles: a third of a second or more
            return grad

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(Slow.apply(self.first(x)))

    model = build(Model)

    def run(comm):
        mine = DistributedModel(on_gpu(model), comm=comm, **TINY)
        loss(mine, comm.rank).backward()  # sets things up
        mine.zero_grad()
        torch.cuda.current_stream().synchronize()
        loss(mine, comm.rank).backward()
        end = torch.cuda.current_stream().record_event()
        first = mine._attachment._reducer._runs[0].work
        while not first.done():
            pass
        assert not end.query(), "the first bucket has waited for the whole of backward"
        assert_close(gradients(mine), wrapped.mean(SIZE, on_gpu(model), loss))

    run_threads(SIZE, run)


def test_streams_of_forward():
    """Gradients that backward makes on several streams come into one bucket."""
    model = build(lambda: nn.ModuleList([mlp(32, 64, 8), mlp(32, 64, 8)]))
    threads = threading.local()  # torch has a few streams only: each rank takes two

    class Parallel(nn.Module):
        def __init__(self, branches):
            super().__init__()
            self.branches = branches

        def forward(self, x):
            if not hasattr(threads, "streams"):
                threads.streams = [torch.cuda.Stream() for _ in self.branches]
            outputs, here = [], torch.cuda.current_stream()
            for branch, stream in zip(self.branches, threads.streams, strict=True):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(20_000_000)
                    outputs.append(branch(x))
            for stream in threads.streams:
                here.wait_stream(stream)
            return sum(outputs)

    def run(comm):
        mine = DistributedModel(Parallel(on_gpu(model)), comm=comm)
        for _ in range(3):
            mine.zero_grad()
            loss(mine, comm.rank).backward()
        return gradients(mine)

    expected = wrapped.mean(SIZE, Parallel(on_gpu(model)), loss)
    for found in run_threads(SIZE, run):
        assert_close(found, expected)


def test_parameters_on_the_cpu_and_on_the_gpu():
    model = build(lambda: mlp(32, 64, 8))

    class Split(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers
            self.layers[-1].cuda()

        def forward(self, x):
            return self.layers[-1](self.layers[:-1](x.cpu()).cuda())

    def run(comm):
        mine = DistributedModel(Split(copy.deepcopy(model)), comm=comm)
        assert mine.stats()["buckets"] == 2
        loss(mine, comm.rank).backward()
        return {name: x.cpu() for name, x in gradients(mine).items()}

    expected = wrapped.mean(SIZE, Split(copy.deepcopy(model)), loss)
    for found in run_threads(SIZE, run):
        assert_close(found, {name: x.cpu() for name, x in expected.items()})


def test_no_sync_weights_and_unused_parameters():
    model = build(lambda: nn.ModuleList([mlp(32, 8), mlp(32, 8)]))

    def used(model, rank):
        return model(data(rank), [0, 1] if rank else [0]).square().mean()

    def run(comm):
        mine = DistributedModel(SumOfBranches(on_gpu(model)), comm=comm, **TINY)
        with mine.no_sync():
            used(mine, comm.rank).backward()
        used(mine, comm.rank).backward()
        found = [gradients(mine)]
        mine.zero_grad()
        mine.set_weight(comm.rank)
        used(mine, comm.rank).backward()
        return [*found, gradients(mine)]

    alone = SumOfBranches(on_gpu(model))
    twice = wrapped.mean(SIZE, alone, used, used)
    of_ranks = [wrapped.alone(alone, rank, used) for rank in range(SIZE)]
    weighted = {name: (x + 2 * of_ranks[2][name]) / 3 for name, x in of_ranks[1].items()}
    for first, second in run_threads(SIZE, run):
        assert_close(first, twice)
        assert_close(second, weighted)


@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_compression_gives_the_bits_of_the_cpu(compression):
    model = build(lambda: mlp(32, 64, 8)).float()

    def run(comm, device):
        mine = DistributedModel(copy.deepcopy(model).to(device), comm=comm, compression=compression)
        # What is reduced must not depend on arithmetic.
        total = mine(torch.zeros(1, 32, device=device)).sum() * 0
        for number, x in enumerate(mine.parameters()):
            factors = normal(*x.shape, seed=comm.rank + 10 * number).float()
            total = total + (x * factors.to(device)).sum()
        total.backward()
        return {name: x.cpu() for name, x in gradients(mine).items()}

    on_cpu = run_threads(SIZE, lambda comm: run(comm, "cpu"))
    for found in run_threads(SIZE, lambda comm: run(comm, "cuda")):
        assert_equal(found, on_cpu[0])


def test_join_with_uneven_data():
    model = build(lambda: mlp(32, 64, 8))

    def run(comm):
        mine = DistributedModel(on_gpu(model), comm=comm)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
        with mine.join():
            for step in range(comm.rank + 1):
                optimizer.zero_grad()
                loss(mine, step).backward()
                optimizer.step()
        return {name: x.clone() for name, x in mine.state_dict().items()}

    first, *others = run_threads(SIZE, run)
    for other in others:
        assert_equal(first, other)


def test_grad_scaler_sees_an_infinity_of_one_rank_on_all():
    model = build(lambda: mlp(32, 8)).float()

    def run(comm):
        mine = DistributedModel(on_gpu(model), comm=comm, compression="fp16")
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
        before = {name: x.clone() for name, x in mine.state_dict().items()}
        for factor in (float("inf") if comm.rank == 1 else 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(mine(data(comm.rank).float()).mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() == 2.0 and factor != 1.0:
                assert_equal(before, mine.state_dict())
        assert scaler.get_scale() == 2.0
        return {name: x.clone() for name, x in mine.state_dict().items()}

    first, *others = run_threads(SIZE, run)
    for other in others:
        assert_equal(first, other)


def test_sync_batchnorm():
    first = nn.Linear(32, 16, bias=False)  # of a bias the gradient is 0: noise
    model = build(lambda: nn.Sequential(first, nn.BatchNorm1d(16), nn.Linear(16, 8)))

    def run(comm):
        mine = DistributedModel(convert_sync_batchnorm(on_gpu(model), comm=comm), comm=comm)
        rows = 4 + comm.rank
        # Means of unequal batches are no mean of all: sums are.
        (mine(data(comm.rank, rows)).square().sum() * comm.size).backward()
        return gradients(mine), {name: x.clone() for name, x in mine.state_dict().items()}

    alone = on_gpu(model)
    union = torch.cat([data(rank, 4 + rank) for rank in range(SIZE)])
    alone(union).square().sum().backward()
    for grads, state in run_threads(SIZE, run):
        assert_close(grads, gradients(alone), 1e-10)
        assert_close(state, alone.state_dict(), 1e-10)


def test_broadcast_of_models_and_optimizers():
    def run(comm):
        model = on_gpu(build(lambda: nn.Sequential(mlp(32, 8), nn.BatchNorm1d(8)), comm.rank))
        rr.broadcast_parameters(model, 1, comm=comm)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (comm.rank + 1))
        if comm.rank == 1:
            loss(model, 0).backward()
            optimizer.step()
        rr.broadcast_optimizer_state(optimizer, 1, comm=comm)
        states = optimizer.state_dict()["state"].values()
        assert all(x["exp_avg"].is_cuda for x in states)
        return [x["exp_avg"] for x in states], optimizer.param_groups[0]["lr"]

    (first, rate), *others = run_threads(SIZE, run)
    assert rate == 0.2 and len(first) == 4
    for other, other_rate in others:
        assert other_rate == rate
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
