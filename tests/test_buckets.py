"""The bucket layout: a pure function, so no ranks here."""

import math

import pytest
import torch
from torch import nn

from ringreduce.buckets import ALIGNMENT_BYTES, plan_buckets, trainable

KB = 1024


def parameters(*sizes_bytes, dtype=torch.float32):
    return [
        (f"p{i}", torch.empty(size // dtype.itemsize, dtype=dtype))
        for i, size in enumerate(sizes_bytes)
    ]


def names(plan):
    return [[place.name for place in bucket.places] for bucket in plan]


def test_reverse_order_and_limits():
    named = parameters(*[KB] * 9)
    assert names(plan_buckets(named, 2 * KB, 3 * KB)) == [
        ["p8", "p7"],
        ["p6", "p5", "p4"],
        ["p3", "p2", "p1"],
        ["p0"],
    ]
    assert names(plan_buckets(named, 100 * KB, 3 * KB)) == [[f"p{i}" for i in reversed(range(9))]]


def test_a_large_gradient_has_a_bucket_of_its_own():
    named = parameters(KB, 50 * KB, KB, KB)
    assert names(plan_buckets(named, 2 * KB, 4 * KB)) == [["p3", "p2"], ["p1"], ["p0"]]


def test_one_open_bucket_for_each_dtype():
    named = []
    for i in range(4):
        named += [(f"w{i}", torch.empty(256)), (f"n{i}", torch.empty(8, dtype=torch.float64))]
    plan = plan_buckets(named, 2 * KB, 2 * KB)
    # The small float64 bucket ends with n0, which comes before w0 in reverse order.
    assert names(plan) == [["w3", "w2"], ["n3", "n2", "n1", "n0"], ["w1", "w0"]]
    assert [bucket.dtype for bucket in plan] == [torch.float32, torch.float64, torch.float32]


def test_order_is_that_of_the_last_gradients():
    """Not that in which buckets are found to be full."""
    named = [
        (name, torch.empty(KB // dtype.itemsize, dtype=dtype))
        for name, dtype in [
            ("w0", torch.float32),
            ("n0", torch.float64),
            ("n1", torch.float64),
            ("w1", torch.float32),
        ]
    ]
    assert names(plan_buckets(named, KB, KB)) == [["w1"], ["n1"], ["n0"], ["w0"]]


@pytest.mark.parametrize("limit", [1, 100, 3000, 10**6])
def test_places_cover_the_bucket_without_overlap(limit):
    shapes = [(3,), (), (5, 7), (0, 4), (64,), (1,), (2, 3, 4), (100,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
    named = [
        (f"p{i}{j}", torch.empty(shape, dtype=dtype))
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(dtypes)
    ]
    plan = plan_buckets(named, limit, limit)
    assert sorted(sum(names(plan), [])) == sorted(name for name, _ in named)
    for bucket in plan:
        end = 0
        for place in bucket.places:
            tensor = dict(named)[place.name]
            assert (tensor.dtype, tuple(tensor.shape)) == (bucket.dtype, place.shape)
            assert place.offset * bucket.dtype.itemsize % ALIGNMENT_BYTES == 0
            assert 0 <= place.offset - end < ALIGNMENT_BYTES
            end = place.offset + math.prod(place.shape)
        assert end <= bucket.length
        assert bucket.size_bytes <= sum(
            dict(named)[place.name].nbytes + ALIGNMENT_BYTES - 1 for place in bucket.places
        )


def test_views_keep_the_layout():
    dense = torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last)
    gaps = torch.empty(6, 8)[:, ::2]
    transposed = torch.empty(5, 3).t()
    named = [("dense", dense), ("gaps", gaps), ("transposed", transposed)]
    (bucket,) = plan_buckets(named, 10**6, 10**6)
    flat = torch.zeros(bucket.length)
    views = {place.name: place.view(flat) for place in bucket.places}
    assert views["dense"].stride() == dense.stride()
    assert views["transposed"].stride() == transposed.stride()
    assert views["gaps"].is_contiguous()
    for i, view in enumerate(views.values(), 1):
        view.fill_(i)
    for i, (name, view) in enumerate(views.items(), 1):
        assert view.shape == dict(named)[name].shape
        assert (view == i).all()


def test_pure():
    """The same from equal models; values and gradients do not matter."""

    def plan(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))
        model[seed % 3].weight.grad = torch.ones_like(model[seed % 3].weight)
        return plan_buckets(trainable(model), 100, 1000)

    assert plan(0) == plan(1) == plan(2)


def test_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert [name for name, _ in trainable(model)] == ["0.weight", "0.bias", "1.bias", "2.weight"]
    assert [name for name, _ in trainable(model, ["0.bias", "2.bias"])] == [
        "0.weight",
        "1.bias",
        "2.weight",
    ]
    # A shared parameter is left out by any of its names.
    assert [name for name, _ in trainable(model, ["1.weight"])] == ["0.bias", "1.bias", "2.weight"]
