"""Uneven data: ranks that have none any more accompany the others, and all end with one model."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
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
    run_copies,
    run_wrapped,
    times,
)

from ringreduce.errors import RingReduceError
from ringreduce.model import DistributedModel
from ringreduce.sync_batchnorm import SyncBatchNorm
from ringreduce.testing import run_threads

BATCHES = [3, 0, 5, 2]  # of each rank


def batch(rank, step):
    return normal(4, 3, seed=1 + rank + 10 * step), normal(4, 2, seed=100 + rank + 10 * step)


def rank_loss(model, rank, step):
    x, y = batch(rank, step)
    return nn.functional.mse_loss(model(x), y)


def values(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def one_process(model, divide_by_initial_world_size, batches=BATCHES):
    """Each step on what the ranks have then, with the divisor that is asked for."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(max(batches)):
        losses = [rank_loss(model, r, step) for r, number in enumerate(batches) if step < number]
        optimizer.zero_grad()
        count = len(batches) if divide_by_initial_world_size else len(losses)
        (sum(losses) / count).backward()
        optimizer.step()
    return values(model)


def train(wrapped, rank, batches, zeroed="before", **arguments):
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with wrapped.join(**arguments) as joined:
        for step in range(batches[rank]):
            if zeroed == "before":
                optimizer.zero_grad()
            rank_loss(wrapped, rank, step).backward()
            optimizer.step()
            if zeroed == "after":
                optimizer.zero_grad()
    return joined.root


@pytest.mark.parametrize("limits", [{}, TINY, {"bucket_mb": 5e-4, "first_bucket_mb": 2e-4}])
@pytest.mark.parametrize("initial", [True, False])
def test_equals_one_process(initial, limits):
    def run(wrapped, rank):
        root = train(wrapped, rank, BATCHES, divide_by_initial_world_size=initial)
        assert root == 2
        return values(wrapped)

    models = [build(lambda: mlp(3, 5, 2), seed) for seed in range(len(BATCHES))]
    expected = one_process(build(lambda: mlp(3, 5, 2)), initial)
    results = run_wrapped(models, run, **limits)
    for result in results:
        assert_equal(result, results[0])
        assert_close(result, expected)


@pytest.mark.parametrize("zeroed", ["before", "after"])
@pytest.mark.parametrize("batches", [[3, 3], [0, 0], [1, 4]])
def test_training_goes_on_afterwards(batches, zeroed):
    """Ranks out of data are left with no gradients that the others do not have."""
    model = build(lambda: mlp(3, 5, 2))

    def run(wrapped, rank):
        for _ in range(2):
            train(wrapped, rank, batches, zeroed)
        if zeroed == "before":
            wrapped.zero_grad()
        rank_loss(wrapped, rank, 7).backward()
        return values(wrapped), gradients(wrapped)

    (model_a, grads_a), (model_b, grads_b) = run_copies(2, model, run)
    assert_equal(model_a, model_b)
    assert_equal(grads_a, grads_b)
    one_process(model, True, batches)
    assert_close(model_a, one_process(model, True, batches))
    assert_close(grads_a, mean(2, model, lambda model, rank: rank_loss(model, rank, 7)))


def test_sum():
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        with wrapped.join():
            for step in range(1 + rank):
                wrapped.zero_grad()
                rank_loss(wrapped, rank, step).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, op="sum"):
        assert_close(grads, alone(model, 1, lambda m, rank: rank_loss(m, rank, 1)))


def test_weights():
    """The last part of an epoch: other numbers of rows, none on one rank; exact with weights."""
    model = build(lambda: mlp(3, 5, 2))
    x, y = normal(10, 3), normal(10, 2, seed=1)
    parts = [[slice(0, 4), slice(4, 5)], [slice(5, 10)], []]

    def loss(model, rows):
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    def run(wrapped, rank):
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with wrapped.join():
            for rows in parts[rank]:
                optimizer.zero_grad()
                wrapped.set_weight(rows.stop - rows.start)
                loss(wrapped, rows).backward()
                optimizer.step()
        return values(wrapped)

    results = run_copies(3, model, run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in ([*range(4), *range(5, 10)], [4]):
        optimizer.zero_grad()
        loss_of_rows = nn.functional.mse_loss(model(x[rows]), y[rows])
        loss_of_rows.backward()
        optimizer.step()
    for result in results:
        assert_close(result, values(model))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_several_backwards_in_a_step(initial, set_to_none):
    """The last accumulates onto what is reduced: ranks without data have it, too. The first does
    not, though what is zeroed may be what was reduced."""
    model = build(lambda: mlp(3, 5, 2))

    def run(wrapped, rank):
        with wrapped.join(initial):
            for step in range(1 + rank):
                wrapped.zero_grad(set_to_none)
                for part in range(3):
                    with contextlib.nullcontext() if part else wrapped.no_sync():
                        rank_loss(wrapped, rank, step + 10 * part).backward()
        return gradients(wrapped)

    def losses(model, rank):
        return sum(rank_loss(model, rank, 1 + 10 * part) for part in range(3))

    for grads in run_copies(2, model, run):
        assert_close(grads, times(0.5 if initial else 1, alone(model, 1, losses)))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("weight", [None, 3])
def test_what_is_left_of_an_accumulation(weight, initial):
    """Rank 0 has one part of two when its data ends: that is reduced with the others' step."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        wrapped.set_weight(weight)
        with wrapped.join(initial):
            with wrapped.no_sync():
                rank_loss(wrapped, rank, 0).backward()
            if rank:
                rank_loss(wrapped, rank, 1).backward()
        return gradients(wrapped)

    total = alone(model, 0, lambda m, rank: rank_loss(m, 0, 0))
    other = alone(model, 1, *(lambda m, rank, s=s: rank_loss(m, rank, s) for s in range(2)))
    expected = {name: (total[name] + other[name]) / 2 for name in total}
    for grads in run_copies(2, model, run):
        assert_close(grads, expected)


def test_checkpoints_and_unused_parameters_of_others():
    """Their buckets get gradients late, and some of their parameters none."""

    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.layer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(3):
                x = checkpoint(self.layer, x.requires_grad_(), use_reentrant=True).tanh()
            return x

    model = build(Repeating)

    def loss(model, rank):
        return model(normal(4, 3, seed=rank)).sum()

    def run(wrapped, rank):
        with wrapped.join(divide_by_initial_world_size=False):
            for _ in range(rank):
                wrapped.zero_grad()
                loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, alone(model, 1, loss))


def test_buffers_are_of_a_rank_with_data():
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))

    def run(wrapped, rank):
        with wrapped.join():
            for step in range(1 + 3 * rank):
                wrapped(normal(5, 3, seed=step + 10 * rank)).square().sum().backward()
        return values(wrapped)

    first, second = run_copies(2, model, run)
    assert_equal(first, second)
    assert first["1.num_batches_tracked"] == 4


def test_all_end_with_one_model_whatever_they_did():
    """As a loop that steps also with gradients of its rank alone, under no_sync()."""

    def run(wrapped, rank):
        with wrapped.join():
            rank_loss(wrapped, rank, 0).backward()
            with torch.no_grad():
                wrapped.module[0].weight.add_(rank)
        return values(wrapped)

    assert_equal(*run_copies(2, build(lambda: mlp(3, 2)), run))


def test_early_termination():
    """Ranks are told before forward, in which the batch norm would wait for rank 1."""
    model = build(lambda: mlp(3, 2))

    def run(comm):
        norm = SyncBatchNorm(2, momentum=0.5, comm=comm).double()
        wrapped = DistributedModel(nn.Sequential(copy.deepcopy(model), norm), comm=comm)
        done = []
        message = "rank 1 ran out of data"
        with pytest.raises(RingReduceError, match=message), wrapped.join(True, True, True):
            for step in range(3 - comm.rank):
                wrapped.zero_grad()
                rank_loss(wrapped, comm.rank, step).backward()
                done.append(step)
        assert done == [0, 1]
        with wrapped.join(throw_on_early_termination=True):  # equal: nothing to complain of
            rank_loss(wrapped, comm.rank, 5).backward()
        return gradients(wrapped)

    assert_equal(*run_threads(2, run))


def test_not_enabled_and_within_another():
    def run(wrapped, rank):
        with wrapped.join(enable=False):
            rank_loss(wrapped, rank, 0).backward()
        with wrapped.join(), wrapped.join(enable=False):
            rank_loss(wrapped, rank, 0).backward()
        other = DistributedModel(nn.Linear(1, 1), comm=wrapped._attachment.comm)
        with wrapped.join():
            for inner in wrapped, other:
                with pytest.raises(RuntimeError, match="within join"), inner.join():
                    pass
        with other.join():
            other.close()
        with wrapped.join():
            pass

    run_copies(2, build(lambda: mlp(3, 2)), run)


def test_an_error_is_not_waited_for():
    """It leaves the context at once: the others learn of it from the end of the process."""

    def run(wrapped, rank):
        with pytest.raises(KeyError), wrapped.join():
            raise KeyError
        rank_loss(wrapped, rank, 0).backward()

    run_copies(2, build(lambda: mlp(3, 2)), run)


def test_world_of_one():
    def run(wrapped, rank):
        return train(wrapped, rank, [3]), values(wrapped)

    model = build(lambda: mlp(3, 2))
    ((root, result),) = run_copies(1, model, run)
    assert root == 0
    assert_close(result, one_process(model, True, [3]))


def test_other_ops_have_no_join():
    def run(wrapped, rank):
        with pytest.raises(ValueError, match="max"):
            wrapped.join()

    run_copies(1, build(lambda: mlp(3, 2)), run, op="max")
