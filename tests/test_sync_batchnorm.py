"""SyncBatchNorm: on parts of a batch, what BatchNorm is on the whole."""

import copy
import io

import pytest
import torch
from torch import nn
from wrapped import assert_close, assert_equal, build, gradients, normal

import ringreduce as rr
from ringreduce.testing import run_threads

KINDS = [
    (nn.BatchNorm1d, (3,)),
    (nn.BatchNorm1d, (3, 5)),
    (nn.BatchNorm2d, (3, 4, 2)),
    (nn.BatchNorm3d, (3, 2, 2, 2)),
]
ROWS = [4, 1, 0, 6]  # of each rank


def parts(x):
    return x.split(ROWS)


def train(layer, x, target):
    """Two steps: outputs, gradients of inputs and parameters, buffers."""
    found = {}
    for step in range(2):
        inputs = (x * (1 + step)).requires_grad_()
        y = layer(inputs)
        layer.zero_grad()
        (y * target).pow(2).sum().backward()
        found |= {f"y{step}": y.detach(), f"grad{step}": inputs.grad}
    return found, gradients(layer), {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"eps": 0.1}])
@pytest.mark.parametrize("kind, shape", KINDS)
def test_equals_one_process(kind, shape, options):
    """Rank 1 has one row, rank 2 none; far from zero, where sums of squares would lose digits."""
    layer = build(lambda: kind(3, **options))
    if layer.affine:
        layer.weight.data, layer.bias.data = normal(3, seed=1), normal(3, seed=2)
    x, target = 300 + normal(sum(ROWS), *shape), normal(sum(ROWS), *shape, seed=3)
    results = []
    models = [copy.deepcopy(layer) for _ in ROWS]

    def run(comm):
        model = rr.convert_sync_batchnorm(models[comm.rank], comm=comm)
        return train(model, parts(x)[comm.rank].clone(), parts(target)[comm.rank])

    results = run_threads(len(ROWS), run)
    found, grads, buffers = train(layer, x.clone(), target)
    # Of 300 in float64 13 digits are left of each difference: from what longer floats give, both
    # this (up to 5e-14) and BatchNorm (6e-14) are as far as from each other.
    for name, whole in found.items():
        assert_close({"": torch.cat([r[0][name] for r in results])}, {"": whole})
    for name, whole in grads.items():
        assert_close({"": sum(r[1][name] for r in results)}, {"": whole})
    for result in results:
        assert_close(result[2], buffers)
        assert_equal(result[2], results[0][2])


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_model_equals_one_process(channels_last):
    """Each rank has its part of the whole's loss; evaluation is BatchNorm's, on one rank alone."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build(network).to(memory_format=layout)
    x, y = normal(sum(ROWS), 2, 3, 3), normal(sum(ROWS), 2, seed=1)
    models = [copy.deepcopy(model) for _ in ROWS]

    def run(comm):
        net = rr.convert_sync_batchnorm(models[comm.rank], comm=comm)
        assert list(net.state_dict()) == list(model.state_dict())
        wrapped = rr.DistributedModel(net, comm=comm, op="sum")
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        inputs, target = parts(x)[comm.rank], parts(y)[comm.rank]
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(wrapped(inputs), target, reduction="sum").backward()
            optimizer.step()
        wrapped.eval()
        if comm.rank == 0:
            wrapped(x)
        return wrapped.state_dict(), wrapped(inputs).detach()

    results = run_threads(len(ROWS), run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y, reduction="sum").backward()
        optimizer.step()
    model.eval()
    for state, _ in results:
        assert_equal(state, results[0][0])
        for name, value in model.state_dict().items():
            assert_close({name: state[name]}, {name: value})
    assert_close({"": torch.cat([y for _, y in results])}, {"": model(x).detach()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """Statistics are float32's; the result has the input's dtype."""
    x = (normal(4, 3) * 100).to(dtype)
    layers = [nn.BatchNorm1d(3) for _ in range(2)]

    def run(comm):
        inputs = x[comm.rank * 2 :][:2].requires_grad_()
        y = rr.convert_sync_batchnorm(layers[comm.rank], comm=comm)(inputs)
        y.float().sum().backward()
        assert y.dtype == inputs.grad.dtype == dtype
        return y.detach()

    expected = nn.BatchNorm1d(3)(x.float()).detach()
    tolerance = 2 * torch.finfo(dtype).eps
    found = torch.cat(run_threads(2, run)).float()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    models = [build(network) for _ in range(2)]

    def run(comm):
        net = rr.convert_sync_batchnorm(models[comm.rank], comm=comm)
        if how == "deepcopy":
            twin = copy.deepcopy(net)
        else:
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
            twin[1]._group.parent = comm  # these ranks are not the world
        x = normal(2, 2, 3, 3, seed=comm.rank)
        assert torch.equal(twin(x), net(x))

    run_threads(2, run)


def test_what_is_converted():
    """Shared layers stay shared, parameters the same objects, everything else as it is."""

    def run(comm):
        layer = nn.BatchNorm1d(3).eval()
        model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.InstanceNorm1d(3))})
        weight = layer.weight
        assert rr.convert_sync_batchnorm(model, comm=comm) is model
        assert model["a"] is model["b"][0]
        assert isinstance(model["a"], rr.SyncBatchNorm) and not model["a"].training
        assert model["a"].weight is weight
        assert type(model["b"][1]) is nn.InstanceNorm1d
        again = model["a"]
        assert rr.convert_sync_batchnorm(model, comm=comm)["a"] is again
        assert isinstance(rr.convert_sync_batchnorm(layer, comm=comm), rr.SyncBatchNorm)
        with pytest.raises(ValueError, match="no shape"):
            rr.convert_sync_batchnorm(nn.LazyBatchNorm1d(), comm=comm)

    run_threads(1, run)


def test_one_value_for_each_channel():
    def run(comm):
        layer = rr.convert_sync_batchnorm(nn.BatchNorm1d(3), comm=comm)
        with pytest.raises(ValueError, match="one value for each channel"):
            layer(torch.ones(1 - comm.rank, 3))
        with pytest.raises(ValueError, match="3 channels"):
            layer(torch.ones(2, 4))
        with pytest.raises(ValueError, match="dimensions"):
            layer(torch.ones(3))
        layer(torch.ones(1, 3))

    run_threads(2, run)
