"""What the ranks must agree on when a model is wrapped, where they start, and what buffers do."""

import contextlib

import pytest
import torch
from torch import nn
from wrapped import build, mlp, normal, run_copies, run_wrapped

from ringreduce.errors import MismatchError
from ringreduce.model import DistributedModel
from ringreduce.testing import run_threads


def values(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


class Buffered(nn.Module):
    """Buffers of several dtypes; one outside of the state, one made anew in every forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("aside", torch.randn(3), persistent=False)
        self.register_buffer("last", torch.randn(2))
        self.register_buffer("none", None)

    def forward(self, x):
        y = self.layers(x)
        self.last = y.detach().mean(0)
        return y


def test_rank_0_gives_parameters_and_buffers():
    models = [build(Buffered, seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.layers[0].bias.requires_grad_(False)
        model.layers[1].num_batches_tracked.fill_(seed + 5)
    expected = values(models[0]), models[0].aside.clone()

    def run(wrapped, rank):
        return values(wrapped), wrapped.aside.clone()

    for state, aside in run_wrapped(models, run):
        assert_same(state, expected[0])
        assert torch.equal(aside, expected[1])


def test_ignore():
    """Neither broadcast nor reduced: each rank keeps its own."""
    models = [build(Buffered, seed) for seed in range(2)]
    own = [values(model) for model in models]
    ignored = ["layers.0.weight", "layers.1.running_mean"]

    def run(wrapped, rank):
        for name, x in values(wrapped).items():
            assert torch.equal(x, own[rank if name in ignored else 0][name]), name
        wrapped(normal(5, 3, seed=rank)).square().sum().backward()
        layers = wrapped.module.layers
        return layers[0].weight.grad, layers[0].bias.grad, layers[1].running_mean

    (weight, bias, mean), (other_weight, other_bias, other_mean) = run_wrapped(
        models, run, ignore=ignored
    )
    assert not torch.equal(weight, other_weight)
    assert torch.equal(bias, other_bias)
    assert not torch.equal(mean, other_mean)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sync_buffers", [True, False])
@pytest.mark.parametrize("no_sync", [True, False])
def test_buffers_follow_rank_0_after_backward(training, sync_buffers, no_sync):
    """And not before; nor in eval, where nothing may wait for other ranks."""
    model = build(Buffered)

    def run(wrapped, rank):
        wrapped.train(training)
        for step in range(2):  # `last` is another tensor each time
            with wrapped.no_sync() if no_sync else contextlib.nullcontext():
                y = wrapped(normal(5, 3, seed=rank + 2 * step))
            before = values(wrapped)
            y.sum().backward()
        return before, values(wrapped)

    (first_before, first), (second_before, second) = run_copies(
        2, model, run, sync_buffers=sync_buffers
    )
    assert not torch.equal(first_before["last"], second_before["last"])
    assert_same(first, first_before)
    same = training and sync_buffers and not no_sync
    assert_same(second, first if same else second_before)


def test_assigned_buffers_of_other_shapes():
    """On all ranks the same advice, and training goes on with it."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("last", torch.zeros(1, 2))

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    def run(wrapped, rank):
        with pytest.raises(MismatchError, match=r"buffers.*`ignore`.*\(5, 2\)"):
            wrapped(normal(4 + rank, 3)).sum().backward()

    def run_ignoring(wrapped, rank):
        wrapped(normal(4 + rank, 3)).sum().backward()
        assert len(wrapped.last) == 4 + rank

    run_copies(2, build(Last), run)
    run_copies(2, build(Last), run_ignoring, ignore=["last"])


def test_forward_twice_with_batch_norm():
    """Buffers are overwritten while the graph of another forward waits."""

    def run(wrapped, rank):
        first = wrapped(normal(5, 3, seed=rank))
        second = wrapped(normal(5, 3, seed=rank + 10))
        first.sum().backward()
        second.square().sum().backward()
        return [p.grad.clone() for p in wrapped.parameters()]

    a, b = run_copies(2, build(Buffered), run)
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("grad", [True, False])
def test_one_rank_evaluates_alone(grad):
    """No other rank takes part, be gradients enabled or not, and training goes on."""

    def run(wrapped, rank):
        for step in range(2):
            wrapped.train()
            wrapped(normal(5, 3, seed=rank)).sum().backward()
            if rank == step:
                wrapped.eval()
                with torch.set_grad_enabled(grad):
                    wrapped(normal(5, 3))

    run_copies(2, build(Buffered), run)


def change_shape(model):
    model.layers[2] = nn.Linear(4, 3).double()


def change_dtype(model):
    model.layers[2].float()


def change_grad(model):
    model.layers[2].weight.requires_grad_(False)


def change_strides(model):
    model.layers[2].weight.data = model.layers[2].weight.data.t().contiguous().t()


def change_buffer(model):
    model.last = torch.zeros(7)


def add_parameter(model):
    model.extra = nn.Parameter(torch.ones(1))


def drop_parameter(model):
    model.layers[2].bias = None


def make_lazy(model):
    model.layers[2] = nn.LazyLinear(2)


@pytest.mark.parametrize(
    "change, words",
    [
        (change_shape, ["parameter layers.2.weight", "(2, 4)", "(3, 4)"]),
        (change_dtype, ["parameter layers.2.weight", "float64", "float32"]),
        (change_grad, ["parameter layers.2.weight", "requires_grad=True", "requires_grad=False"]),
        (change_strides, ["parameter layers.2.weight", "strides (4, 1)", "strides (1, 2)"]),
        (change_buffer, ["buffer last", "(2,)", "(7,)"]),
        (add_parameter, ["parameter extra", "shape (1,)"]),
        (drop_parameter, ["parameter layers.2.bias"]),
        (make_lazy, ["parameter layers.2.weight", "lazy"]),
    ],
)
def test_models_that_differ(change, words):
    """The first difference, on every rank in the same words; the communicator stays usable."""
    models = [build(Buffered) for _ in range(3)]
    change(models[2])

    def run(comm):
        with pytest.raises(MismatchError) as error:
            DistributedModel(models[comm.rank], comm=comm)
        assert comm.allreduce(torch.ones(1)).item() == 3
        return str(error.value)

    texts = run_threads(3, run)
    assert len(set(texts)) == 1
    for word in ["rank 0", "rank 2", *words]:
        assert word in texts[0]


@pytest.mark.parametrize(
    "name, value",
    [("op", "sum"), ("bucket_mb", 2.0), ("ignore", ["0.bias"]), ("compression", "bf16")],
)
def test_arguments_that_differ(name, value):
    def run(comm):
        options = {name: value} if comm.rank else {}
        with pytest.raises(MismatchError, match=name):
            DistributedModel(build_on_rank(comm.rank), comm=comm, **options)

    models = [build(lambda: mlp(3, 2)) for _ in range(2)]
    build_on_rank = models.__getitem__
    run_threads(2, run)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "factory, options, message",
    [
        (nn.Identity, {}, "no parameter that requires grad"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), {}, "no parameter that requires grad"),
        (lambda: nn.Linear(2, 2), {"ignore": ["weight", "bias"]}, "no parameter that requires"),
        (lambda: nn.LazyLinear(2), {}, "'weight' is lazy"),
        (lambda: nn.Linear(2, 2), {"ignore": ["wait"]}, "wait"),
        (lambda: nn.Linear(2, 2), {"op": "mean"}, "'mean' is none of sum, avg"),
        (lambda: nn.Linear(2, 2), {"bucket_mb": 0}, "bucket_mb"),
        (lambda: nn.Linear(2, 2), {"first_bucket_mb": float("nan")}, "first_bucket_mb"),
        (lambda: nn.Linear(2, 2), {"compression": "bf17"}, "compression"),
    ],
)
def test_what_cannot_be_wrapped(n, factory, options, message):
    models = [factory() for _ in range(n)]

    def run(comm):
        with pytest.raises(ValueError, match=message):
            DistributedModel(models[comm.rank], comm=comm, **options)
        assert comm.allreduce(torch.ones(1)).item() == n

    run_threads(n, run)


def test_no_module():
    def run(comm):
        with pytest.raises(TypeError, match="Module"):
            DistributedModel(lambda x: x, comm=comm)
        with pytest.raises(TypeError, match="Communicator"):
            DistributedModel(nn.Linear(2, 2), comm="world")

    run_threads(1, run)
