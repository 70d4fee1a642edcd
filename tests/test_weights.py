"""The weighted mean: what one process has on the data of all ranks, however many rows each has."""

import math

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
    run_copies,
    times,
)

from ringreduce.errors import MismatchError

ROWS = [5, 0, 2, 9]  # of each rank
X, Y = normal(sum(ROWS), 3), normal(sum(ROWS), 2, seed=1)


def rows_of(rank):
    first = sum(ROWS[:rank])
    return slice(first, first + ROWS[rank])


def mean_loss(model, rows):
    return nn.functional.mse_loss(model(X[rows]), Y[rows])


def whole(model, _):
    return mean_loss(model, slice(None))


@pytest.mark.parametrize("limits", [{}, TINY])
def test_equals_one_process(limits):
    """Rank 1 has no rows: the mean of nothing is NaN, and so are its gradients."""
    model = build(lambda: mlp(3, 5, 2))
    expected = alone(model, 0, whole)

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.set_weight(ROWS[rank])
            mean_loss(wrapped, rows_of(rank)).backward()
            assert_close(gradients(wrapped), expected)
            wrapped.zero_grad()
        return gradients(wrapped)

    run_copies(4, model, run, **limits)


def test_training_equals_one_process():
    model = build(lambda: mlp(3, 5, 2))
    steps = 20

    def train(model, rank=None):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(steps):
            x, y = normal(16, 3, seed=2 * step), normal(16, 2, seed=2 * step + 1)
            if rank is not None:  # another number of rows on each rank and in each step
                cut = (step * 5) % 17
                rows = slice(cut, None) if rank else slice(0, cut)
                x, y = x[rows], y[rows]
                model.set_weight(len(x))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        return {name: x.detach().clone() for name, x in model.named_parameters()}

    results = run_copies(2, model, train)
    assert_equal(*results)
    assert_close(results[0], train(model), 1e-11)


def weighted(model, weights, *losses):
    """Of gradients of the ranks alone."""
    total = {}
    for rank, weight in enumerate(weights):
        for name, grad in alone(model, rank, *losses).items():
            total[name] = total.get(name, 0) + weight / sum(weights) * grad
    return total


def test_set_after_forward_and_until_it_is_set_again():
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        loss = plain_loss(wrapped, rank)
        wrapped.set_weight(torch.tensor(1 + rank))
        loss.backward()
        assert_close(gradients(wrapped), weighted(model, [1, 2], plain_loss))
        wrapped.zero_grad()
        plain_loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), weighted(model, [1, 2], plain_loss))
        wrapped.zero_grad()
        wrapped.set_weight(None)
        plain_loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), mean(2, model, plain_loss))

    run_copies(2, model, run)


def test_onto_what_is_reduced_already():
    """The mean of a mean is itself, with weights too; with other weights each time."""
    model = build(lambda: mlp(3, 4, 2))
    first, second = weighted(model, [1, 3], plain_loss), weighted(model, [2, 0], plain_loss)

    def run(wrapped, rank):
        wrapped.set_weight([1, 3][rank])
        plain_loss(wrapped, rank).backward()
        wrapped.set_weight([2, 0][rank])
        plain_loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), {name: first[name] + second[name] for name in first})

    run_copies(2, model, run, **TINY)


def test_accumulation():
    """A mean over all parts of all ranks, as the documentation says to compute it."""
    model = build(lambda: mlp(3, 5, 2))

    def run(wrapped, rank):
        rows = rows_of(rank)
        x, y = X[rows], Y[rows]
        wrapped.set_weight(len(x))

        def part(of):
            return (wrapped(x[of]) - y[of]).square().mean(1).sum() / max(1, len(x))

        with wrapped.no_sync():
            part(slice(0, 2)).backward()
        part(slice(2, None)).backward()
        return gradients(wrapped)

    for grads in run_copies(4, model, run):
        assert_close(grads, alone(model, 0, whole))


def test_no_weight_at_all():
    def run(wrapped, rank):
        wrapped.set_weight(0)
        plain_loss(wrapped, rank).backward()
        assert all(not grad.any() for grad in gradients(wrapped).values())

    run_copies(2, build(lambda: mlp(3, 2)), run)


@pytest.mark.parametrize("compression", [None, "fp16"])
def test_large_weights_of_float16(compression):
    """Weighted gradients may be beyond 65504 where their mean is not."""
    dtype = torch.float32 if compression else torch.float16

    def run(wrapped, rank):
        wrapped.set_weight([30000, 90000][rank])
        wrapped(torch.full((1, 2), [8.0, 16.0][rank], dtype=dtype)).sum().backward()
        return wrapped.weight.grad.unique().tolist()

    model = nn.Linear(2, 2, bias=False).to(dtype)
    assert run_copies(2, model, run, compression=compression) == [[14.0]] * 2


def test_unused_parameters_count_as_zeros():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x, i):
            return self.layers[i](x)

    def loss(m, rank):
        return m(normal(2, 3, seed=rank), rank).sum()

    def run(wrapped, rank):
        wrapped.set_weight(1 + 2 * rank)
        loss(wrapped, rank).backward()
        return gradients(wrapped)

    either = build(Either)
    expected = {}
    for rank in range(2):
        mine = {n: g for n, g in alone(either, rank, loss).items() if g is not None}
        expected |= times((1 + 2 * rank) / 4, mine)
    for grads in run_copies(2, either, run):
        assert_close(grads, dict(sorted(expected.items())))


@pytest.mark.parametrize("compression", [None, "fp16"])
def test_nan_of_no_weight(compression):
    """A mean over no data may be NaN down to the gradients: of weight 0, they are not looked at."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        wrapped.set_weight(rank)
        (plain_loss(wrapped, rank) * (1 if rank else math.nan)).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, compression=compression):
        assert_close(grads, alone(model, 1, plain_loss), 1e-2 if compression else 1e-12)


def test_no_message_more():
    def run(wrapped, rank):
        counts = []
        for weight in (None, 3, 0):
            wrapped.set_weight(weight)
            before = wrapped._attachment._reducer.comm.core.sequence
            plain_loss(wrapped, rank).backward()
            counts.append(wrapped._attachment._reducer.comm.core.sequence - before)
        assert counts == [wrapped.stats()["buckets"] + 1] * 3

    run_copies(2, build(lambda: mlp(3, 4, 2)), run, **TINY)


def test_what_is_no_weight():
    def run(wrapped, rank):
        for weight in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match="a weight is a finite number"):
                wrapped.set_weight(weight)

    run_copies(1, build(lambda: mlp(3, 2)), run)

    def run_sum(wrapped, rank):
        with pytest.raises(ValueError, match="op 'sum'"):
            wrapped.set_weight(1)

    run_copies(2, build(lambda: mlp(3, 2)), run_sum, op="sum")


def test_weights_on_some_ranks_only():
    def run(wrapped, rank):
        if rank:
            wrapped.set_weight(1)
        with pytest.raises(MismatchError):
            plain_loss(wrapped, rank).backward()

    run_copies(2, build(lambda: mlp(3, 2)), run)
