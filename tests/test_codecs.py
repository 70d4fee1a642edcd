"""Gradients that travel in another form: 16 bits, or what a user's class makes of them."""

import copy

import pytest
import torch
from torch import nn
from wrapped import (
    TINY,
    assert_close,
    assert_equal,
    build,
    gradients,
    mean,
    mlp,
    normal,
    plain_loss,
    run_copies,
)

import ringreduce as rr
from ringreduce.codecs import Cast
from ringreduce.errors import RingReduceError
from ringreduce.testing import run_threads

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNITS = {"bf16": 2**-8, "fp16": 2**-11}  # relative error of one rounding
named = pytest.mark.parametrize("name", DTYPES)


@named
@pytest.mark.parametrize("limits", [{}, TINY])
def test_mean_to_the_last_bit(name, limits):
    """Rounded once for each rank, summed in float32, rounded once more."""
    n, model = 3, build(lambda: mlp(3, 5, 2)).float()

    def loss(m, rank):
        return m(normal(4, 3, seed=rank).float()).square().sum()

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad(set_to_none=False)
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    of_ranks = [mean(1, model, lambda m, _, rank=rank: loss(m, rank)) for rank in range(n)]
    expected = {}
    for key in of_ranks[0]:
        total = sum(grads[key].to(DTYPES[name]).float() for grads in of_ranks)
        expected[key] = (total / n).to(DTYPES[name]).float()
    for grads in run_copies(n, model, run, compression=name, **limits):
        assert_equal(grads, expected)


@named
def test_infinities_and_nan_survive(name):
    def run(wrapped, rank):
        values = [torch.inf, -torch.inf, torch.nan, 1e30] if rank else [1.0] * 4
        wrapped(torch.tensor([values])).sum().backward()
        return wrapped.weight.grad[0].tolist()

    model = nn.Linear(4, 2, bias=False)
    for a, b, c, d in run_copies(2, model, run, compression=name):
        assert (a, b) == (torch.inf, -torch.inf)
        assert c != c
        assert d == pytest.approx(5e29, rel=0.01) if name == "bf16" else d == torch.inf


@pytest.mark.parametrize("compression, size", [(None, 4), ("bf16", 2), ("fp16", 2)])
def test_bytes_on_the_wire(compression, size):
    def run(wrapped, rank):
        wrapped(torch.ones(1, 32)).sum().backward()
        return wrapped.stats()["bytes"]

    model = nn.Linear(32, 32)
    assert run_copies(2, model, run, compression=compression) == [(32 * 32 + 32) * size] * 2


def test_what_is_not_cast():
    """Complex gradients, and those that are as narrow already."""
    assert Cast(torch.float16).wire_dtype(torch.complex64) == torch.complex64
    assert Cast(torch.float16).wire_dtype(torch.bfloat16) == torch.bfloat16
    assert Cast(torch.bfloat16).wire_dtype(torch.float64) == torch.bfloat16
    with pytest.raises(ValueError, match="float32"):
        Cast(torch.float32)

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1 + 2j, 3j]))

        def forward(self, x):
            return (self.weight * x).abs().square().sum()

    def loss(m, rank):
        return m(1 / 3 + rank)

    model = Complex()
    grads = run_copies(2, model, lambda m, r: (loss(m, r).backward(), gradients(m))[1])
    cast = run_copies(
        2, model, lambda m, r: (loss(m, r).backward(), gradients(m))[1], compression="bf16"
    )
    assert_equal(cast[0], grads[0])


@named
def test_channels_last_keeps_its_layout(name):
    model = build(lambda: nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)

    def loss(m, rank):
        return m(normal(2, 3, 5, 5, seed=rank)).square().sum()

    def run(wrapped, rank):
        loss(wrapped, rank).backward()
        assert wrapped.weight.grad.stride() == wrapped.weight.stride()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, compression=name):
        assert_close(grads, mean(2, model, loss), 3 * UNITS[name])


@named
def test_unused_parameters(name):
    """Of the others nothing changes: not even what is only rounded would."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x, *indices):
            return sum(self.layers[i](x) for i in indices)

    def run(wrapped, rank):
        layers = wrapped.module.layers
        wrapped(normal(4, 3, seed=rank), 0).sum().backward()
        before = gradients(layers[0])
        wrapped(normal(4, 3, seed=rank), 1).sum().backward()
        assert_equal(gradients(layers[0]), before)
        assert layers[2].weight.grad is None
        return gradients(layers[1])

    assert_equal(*run_copies(2, build(Branches), run, compression=name))


@named
def test_onto_what_is_reduced_already_is_refused(name):
    """It would be rounded again each time."""

    def run(wrapped, rank):
        plain_loss(wrapped, rank).backward()
        with pytest.raises(RingReduceError, match=r"Cast.*zero_grad\(\).*no_sync\(\)"):
            plain_loss(wrapped, rank).backward()
        wrapped.zero_grad()
        with wrapped.no_sync():
            plain_loss(wrapped, rank).backward()
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    model = build(lambda: mlp(3, 4, 2))
    for grads in run_copies(2, model, run, compression=name, **TINY):
        assert_close(grads, mean(2, model, plain_loss, plain_loss), 3 * UNITS[name])


@named
def test_with_weights_and_join(name):
    model = build(lambda: mlp(3, 4, 2))

    def run(wrapped, rank):
        with wrapped.join():
            for step in range(1 + rank):
                wrapped.zero_grad()
                wrapped.set_weight(1 + 2 * rank)
                plain_loss(wrapped, rank + 5 * step).backward()
        return gradients(wrapped)

    expected = mean(1, model, lambda m, _: plain_loss(m, 6))
    for grads in run_copies(2, model, run, compression=name):
        assert_close(grads, expected, 3 * UNITS[name])


class Int8(rr.Codec):
    """What a user may write: all ranks get all ranks' bytes and scales, and add them up."""

    def __init__(self, levels):
        self.levels = levels
        self.seen = set()

    @property
    def name(self):
        return f"Int8({self.levels})"

    def reduce(self, comm, bucket, op, index):
        assert op in ("avg", "sum")
        self.seen.add(index)
        scale = bucket.abs().max().clamp_min(1e-30) / self.levels
        rounded = (bucket / scale).round().to(torch.int8)
        works = [comm.allgather(x, async_op=True) for x in (rounded, scale.reshape(1))]
        return Adding(bucket, comm.size if op == "avg" else 1, works), rounded.nbytes + 8


class Adding:
    def __init__(self, bucket, divisor, works):
        self.bucket, self.divisor, self.works = bucket, divisor, works

    def wait(self):
        rounded, scales = (work.wait() for work in self.works)
        rows = rounded.view(-1, self.bucket.numel()) * scales[:, None]
        self.bucket.copy_(rows.sum(0) / self.divisor)


@pytest.mark.parametrize("limits", [{}, TINY])
@pytest.mark.parametrize("weight", [None, 2])
def test_a_codec_of_the_user(limits, weight):
    model = build(lambda: mlp(3, 4, 2))
    codecs = [Int8(127) for _ in range(2)]

    def run(comm):
        wrapped = rr.DistributedModel(
            models[comm.rank], compression=codecs[comm.rank], comm=comm, **limits
        )
        wrapped.set_weight(weight)
        plain_loss(wrapped, comm.rank).backward()
        assert codecs[comm.rank].seen == set(range(wrapped.stats()["buckets"]))
        assert wrapped.stats()["bytes"] < sum(p.nbytes for p in model.parameters())
        return gradients(wrapped)

    models = [copy.deepcopy(model) for _ in range(2)]
    results = run_threads(2, run)
    assert_equal(*results)
    expected = mean(2, model, plain_loss)
    largest = max(grad.abs().max() for grad in expected.values())
    for key, grad in results[0].items():
        assert (grad - expected[key]).abs().max() <= 0.02 * largest


def test_codecs_that_differ():
    models = [build(lambda: mlp(3, 2)) for _ in range(2)]

    def run(comm):
        with pytest.raises(rr.MismatchError, match=r"Int8\(7\).*Int8\(8\)"):
            rr.DistributedModel(models[comm.rank], compression=Int8(7 + comm.rank), comm=comm)
        rr.DistributedModel(models[comm.rank], compression=Int8(7), comm=comm)

    run_threads(2, run)


def test_what_is_no_codec():
    def run(comm):
        for compression, error in [(Cast, TypeError), (3, TypeError), ("int3", ValueError)]:
            with pytest.raises(error, match="compression"):
                rr.DistributedModel(nn.Linear(2, 2), compression=compression, comm=comm)

    run_threads(1, run)
