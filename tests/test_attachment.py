"""attach(): the module itself is trained on all ranks, without a wrapper."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from wrapped import (
    TINY,
    alone,
    assert_close,
    assert_equal,
    build,
    gradients,
    mean,
    mlp,
    normal,
    plain_loss,
    times,
)

import ringreduce as rr
from ringreduce.testing import run_threads


def run_attached(models, fn, **options):
    """fn(module, handle, rank) on as many ranks as there are models."""

    def run(comm):
        module = models[comm.rank]
        return fn(module, rr.attach(module, comm=comm, **options), comm.rank)

    return run_threads(len(models), run)


@pytest.mark.parametrize("limits", [{}, TINY])
def test_training(limits):
    """All start from rank 0's values, and keep equal."""
    models = [build(lambda: mlp(3, 4, 2), seed) for seed in range(3)]
    expected = mean(3, models[0], plain_loss)

    def run(module, handle, rank):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        plain_loss(module, rank).backward()
        grads = gradients(module)
        optimizer.step()
        optimizer.zero_grad()
        plain_loss(module, rank).backward()
        assert handle.stats()["backwards"] == 2
        return grads, gradients(module)

    results = run_attached(models, run, **limits)
    for first, second in results:
        assert_close(first, expected)
        assert_equal(second, results[0][1])


def test_the_module_stays_what_it_is():
    model = build(lambda: mlp(3, 2))

    def run(module, handle, rank):
        assert type(module) is nn.Sequential
        assert list(module.state_dict()) == list(model.state_dict())
        with torch.no_grad():
            if rank == 0:
                module(normal(4, 3))

    run_attached([copy.deepcopy(model) for _ in range(2)], run)


def test_what_the_handle_does():
    model = build(lambda: mlp(3, 2))
    expected = mean(2, model, plain_loss)

    def run(module, handle, rank):
        with handle.no_sync():
            plain_loss(module, rank).backward()
        assert_equal(gradients(module), alone(model, rank, plain_loss))
        plain_loss(module, rank).backward()
        assert_close(gradients(module), times(2, expected))
        module.zero_grad()
        handle.set_weight(rank)
        with handle.join():
            for _ in range(1 + rank):
                module.zero_grad()
                plain_loss(module, 1).backward()
        assert_close(gradients(module), alone(model, 1, plain_loss))
        handle.set_weight(None)
        handle.close()
        handle.close()
        module.zero_grad()
        plain_loss(module, rank).backward()
        assert_equal(gradients(module), alone(model, rank, plain_loss))
        assert not module._forward_hooks and not module._forward_pre_hooks

    run_attached([copy.deepcopy(model) for _ in range(2)], run)


def test_converted_and_unfrozen_afterwards():
    model = build(lambda: mlp(3, 4, 2))
    expected = {name: grad.float() for name, grad in mean(2, model, plain_loss).items()}

    def run(module, handle, rank):
        module[0].requires_grad_(False)
        module(normal(4, 3, seed=rank)).sum().backward()
        module[0].requires_grad_(True)
        module.zero_grad()
        module.float()
        module(normal(4, 3, seed=rank).float()).square().sum().backward()
        assert_close(gradients(module), expected, 1e-5)

    run_attached([copy.deepcopy(model) for _ in range(2)], run)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_not_attached(how):
    model = build(lambda: mlp(3, 2))

    def run(module, handle, rank):
        plain_loss(module, rank).backward()
        if how == "deepcopy":
            twin = copy.deepcopy(module)
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        twin.zero_grad()
        plain_loss(twin, rank).backward()
        assert_equal(gradients(twin), alone(model, rank, plain_loss))
        assert_close(gradients(module), mean(2, model, plain_loss))

    run_attached([copy.deepcopy(model) for _ in range(2)], run)


def test_it_keeps_no_module_alive():
    def run(comm):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
        rr.attach(module, comm=comm)
        plain_loss(module, comm.rank).backward()
        return weakref.ref(module)

    modules = run_threads(2, run)
    gc.collect()
    assert [module() for module in modules] == [None, None]


def test_what_cannot_be_attached():
    def run(comm):
        with pytest.raises(TypeError, match="Module"):
            rr.attach(lambda x: x, comm=comm)
        module = nn.Identity()
        with pytest.raises(ValueError, match="no parameter"):
            rr.attach(module, comm=comm)
        assert not module._forward_hooks

    run_threads(2, run)
