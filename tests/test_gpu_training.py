"""Training on GPUs, as far as Python goes: the same as on CPUs. Memory and GPUs are fakes."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import wrapped
from fake_gpu import FakeCuda, cuda, plain
from torch import Tensor, nn
from wrapped import TINY, SumOfBranches, assert_close, assert_equal, build, mlp, normal

import ringreduce as rr
from ringreduce.c10d_work import Callbacks, GroupWork
from ringreduce.model import DistributedModel
from ringreduce.testing import run_threads
from ringreduce.work import Work

SIZE = 3


def to_gpu(module: nn.Module, names: tuple[str, ...] | None = None) -> nn.Module:
    """A copy whose parameters and buffers (of these names) say that they are on a GPU."""
    module = copy.deepcopy(module)
    for path, owner in module.named_modules():
        for name, x in list(owner._parameters.items()):
            if x is not None and (names is None or f"{path}.{name}" in names):
                owner._parameters[name] = nn.Parameter(cuda(x.detach().clone()), x.requires_grad)
        for name, x in list(owner._buffers.items()):
            if x is not None and names is None:
                owner._buffers[name] = cuda(x.clone())
    return module


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if x.grad is None else plain(x.grad).clone()
        for name, x in model.named_parameters()
    }


def data(rank: int) -> Tensor:
    return normal(4, 5, seed=rank)


def loss(model: nn.Module, rank: int) -> Tensor:
    return model(data(rank)).square().mean()


@pytest.mark.parametrize("options", [{}, TINY, {"op": "sum"}, {"compression": "bf16"}])
def test_gradients_are_those_of_the_cpu(fake_gpu, options):
    model = build(lambda: mlp(5, 7, 3))

    def run(comm, to_device):
        wrapped_model = DistributedModel(to_device(model), comm=comm, **options)
        for _ in range(2):
            wrapped_model.zero_grad()
            loss(wrapped_model, comm.rank).backward()
        return gradients(wrapped_model), [type(x.grad) for x in wrapped_model.parameters()]

    on_cpu = run_threads(SIZE, lambda comm: run(comm, copy.deepcopy))
    on_gpu = run_threads(SIZE, lambda comm: run(comm, to_gpu))
    for (expected, _), (found, kinds) in zip(on_cpu, on_gpu, strict=True):
        assert_equal(found, expected)
        assert set(kinds) == {FakeCuda}
    if not options:
        assert_close(on_gpu[0][0], wrapped.mean(SIZE, model, loss))


def test_buckets_are_packed_and_reduced_on_the_gpu(fake_gpu):
    model = build(lambda: mlp(5, 7, 3))

    def run(comm):
        wrapped_model = DistributedModel(to_gpu(model), comm=comm, **TINY)
        buckets = wrapped_model.stats()["buckets"]
        fake_gpu.take()
        loss(wrapped_model, comm.rank).backward()
        own, entries = fake_gpu.stream, fake_gpu.take()
        reductions = [entry for entry in entries if entry[0] == "allreduce"]
        assert len(reductions) == buckets > 2
        assert all(entry[:3] == ("allreduce", own, 0) for entry in reductions)
        # All but the last one are on a stream of the communicator.
        assert [entry for entry in entries if entry[0] == "wait"] == [("wait", own, own)] * (
            buckets - 1
        )
        for run in wrapped_model._attachment._reducer._runs:
            assert isinstance(run.wire, FakeCuda)

    run_threads(2, run)


def test_gradients_of_several_streams_come_together(fake_gpu):
    """As where forward has used several: each node of backward runs on the stream of its own."""
    model = build(lambda: mlp(5, 7, 3))

    def run(comm):
        wrapped_model = DistributedModel(to_gpu(model), comm=comm)
        own = fake_gpu.stream

        def switch(stream):
            def hook(_):
                fake_gpu.stream = stream

            return hook

        parameters = list(wrapped_model.parameters())
        for x, stream in zip(parameters, (own, 7, own, 8), strict=True):
            x.register_hook(switch(stream))
        output = wrapped_model(data(comm.rank)).square().mean()
        fake_gpu.take()
        output.backward()
        entries = [entry for entry in fake_gpu.take() if entry[0] in ("join", "part", "allreduce")]
        last = entries[0][1]
        others = sorted({own, 7, 8} - {last})
        assert [entry[0] for entry in entries] == [*["join"] * 2, *["part"] * 2, "allreduce"]
        assert [entry[2] for entry in entries[:-1]] == others * 2
        fake_gpu.stream = own

    run_threads(2, run)


def test_parameters_on_the_cpu_and_on_a_gpu(fake_gpu):
    model = build(lambda: mlp(5, 7, 3))

    def run(comm):
        mixed = to_gpu(model, ("0.weight", "2.bias"))
        wrapped_model = DistributedModel(mixed, comm=comm)
        assert wrapped_model.stats()["buckets"] == 2
        loss(wrapped_model, comm.rank).backward()
        return gradients(wrapped_model)

    expected = wrapped.mean(SIZE, model, loss)
    for found in run_threads(SIZE, run):
        assert_close(found, expected)


def test_weights_unused_parameters_and_no_sync(fake_gpu):
    model = build(lambda: nn.ModuleList([mlp(5, 3), mlp(5, 3)]))

    def run(comm, to_device):
        rank = comm.rank
        wrapped_model = DistributedModel(SumOfBranches(to_device(model)), comm=comm, **TINY)
        with wrapped_model.no_sync():
            wrapped_model(data(rank), [0]).square().mean().backward()
        wrapped_model(data(rank), [rank % 2]).square().mean().backward()
        found = [gradients(wrapped_model)]
        wrapped_model.zero_grad()
        wrapped_model.set_weight(float(rank))
        wrapped_model(data(rank), [0]).square().mean().backward()
        wrapped_model(data(rank), [0]).square().mean().backward()  # onto views of the buckets
        return [*found, gradients(wrapped_model)]

    on_cpu = run_threads(SIZE, lambda comm: run(comm, copy.deepcopy))
    on_gpu = run_threads(SIZE, lambda comm: run(comm, to_gpu))
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert_equal(a, b)


def test_join(fake_gpu):
    model = build(lambda: mlp(5, 7, 3))

    def run(comm, to_device):
        wrapped_model = DistributedModel(to_device(model), comm=comm)
        with wrapped_model.join():
            for _ in range(comm.rank + 1):
                wrapped_model.zero_grad()
                loss(wrapped_model, comm.rank).backward()
        return gradients(wrapped_model)

    on_cpu = run_threads(SIZE, lambda comm: run(comm, copy.deepcopy))
    on_gpu = run_threads(SIZE, lambda comm: run(comm, to_gpu))
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        assert_equal(found, expected)


def test_sync_batchnorm(fake_gpu):
    model = build(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)))

    def run(comm, to_device, wrap):
        converted = rr.convert_sync_batchnorm(to_device(model), comm=comm)
        wrapped_model = DistributedModel(converted, comm=comm)
        x = wrap(normal(3 + comm.rank, 5, seed=comm.rank))
        for _ in range(2):
            wrapped_model.zero_grad()
            wrapped_model(x).square().sum().backward()
        state = {name: plain(x).clone() for name, x in wrapped_model.state_dict().items()}
        return gradients(wrapped_model) | state

    on_cpu = run_threads(SIZE, lambda comm: run(comm, copy.deepcopy, lambda x: x))
    on_gpu = run_threads(SIZE, lambda comm: run(comm, to_gpu, cuda))
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        assert_equal(found, expected)


def test_broadcast_of_models_and_optimizers(fake_gpu):
    """Adam keeps its step counts on the CPU."""

    def run(comm):
        model = to_gpu(build(lambda: nn.Sequential(mlp(5, 3), nn.BatchNorm1d(3)), seed=comm.rank))
        rr.broadcast_parameters(model, 1, comm=comm)
        assert all(isinstance(x, FakeCuda) for x in model.state_dict().values())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (comm.rank + 1), foreach=False)
        if comm.rank == 1:
            loss(model, 0).backward()
            optimizer.step()
        rr.broadcast_optimizer_state(optimizer, 1, comm=comm)
        state = optimizer.state_dict()
        assert state["param_groups"][0]["lr"] == 0.2
        for x in state["state"].values():
            assert not isinstance(x["step"], FakeCuda) and isinstance(x["exp_avg"], FakeCuda)
        return [plain(x["exp_avg"]) for x in state["state"].values()]

    first, *others = run_threads(2, run)
    for other in others:
        assert len(first) == 4
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_models_on_different_kinds_of_device_differ(fake_gpu):
    def run(comm):
        model = build(lambda: mlp(5, 3))
        with pytest.raises(rr.MismatchError, match="cuda"):
            DistributedModel(to_gpu(model) if comm.rank else model, comm=comm)
        with pytest.raises(rr.MismatchError, match="cuda float64"):
            rr.broadcast_parameters(to_gpu(model) if comm.rank else model, comm=comm)

    run_threads(2, run)


def test_who_brings_results_into_place_keeps_their_memory_for_its_stream(monkeypatch):
    """Of torch.distributed's calls: the thread of the callbacks has a stream of its own."""
    kept = []
    stream = types.SimpleNamespace(record_event=lambda: "event", wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(
        FakeCuda, "record_stream", lambda x, stream: kept.append((x.data_ptr(), stream))
    )
    whole, output = cuda(torch.ones(3)), cuda(torch.zeros(3))
    callbacks = Callbacks()
    work = GroupWork(
        [Work((), (whole, [3]))], [[output]], callbacks, lambda found: output.copy_(found[0][0])
    )
    for _ in range(2):
        assert work.wait()
    callbacks.close()
    assert kept == [(whole.data_ptr(), stream), (output.data_ptr(), stream)]
    assert plain(output).tolist() == [1.0] * 3
