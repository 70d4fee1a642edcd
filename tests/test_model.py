"""DistributedModel as a whole: it trains like one process, and can be taken for its module."""

import copy
import gc
import io
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

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
    run_wrapped,
)

from ringreduce.errors import RingReduceError
from ringreduce.model import DistributedModel
from ringreduce.testing import run_threads

STEPS = 30


def train(model, rank=0, size=1):
    """On the rank's rows of each batch; the batch is the same however many ranks share it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS):
        rows = slice(rank, None, size)
        x, y = normal(24, 8, seed=2 * step)[rows], normal(24, 4, seed=2 * step + 1)[rows]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("limits", [{}, TINY, {"bucket_mb": 5e-4, "first_bucket_mb": 2e-4}])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_training_equals_one_process(n, limits):
    """Each rank begins elsewhere and sees its own rows; all end where rank 0 alone would."""
    models = [build(lambda: mlp(8, 16, 16, 4), seed) for seed in range(n)]
    expected = train(copy.deepcopy(models[0]))
    results = run_wrapped(models, lambda wrapped, rank: train(wrapped, rank, n), **limits)
    for parameters in results:
        assert_equal(parameters, results[0])
        assert_close(parameters, expected)


@dataclass
class Output:
    value: torch.Tensor
    rest: object = None


def find_tensor(structure):
    if isinstance(structure, torch.Tensor):
        return structure
    if isinstance(structure, (Output, SimpleNamespace)):
        structure = vars(structure)
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, (list, tuple)):
        return None
    return next((y for y in map(find_tensor, structure) if y is not None), None)


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: (y, 1, "text"),
        lambda y: [{"a": [None, {"b": y}]}],
        lambda y: Output(y),
        lambda y: {"x": (Output(None, [Output(y)]),)},
        lambda y: SimpleNamespace(hidden=y),  # not looked into: the first gradient begins
    ],
)
def test_outputs_of_any_structure(pack):
    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(3, 4, 2)

        def forward(self, x):
            return pack(self.layers(x))

    def loss(m, rank):
        return find_tensor(m(normal(4, 3, seed=rank))).sum()

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    model = build(Packing)
    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, mean(2, model, loss))


class Mixed(nn.Module):
    """Parameters of several dtypes, one without elements, one shared, one with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.f64, self.f32 = nn.Linear(4, 3), nn.Linear(4, 3)
        self.b16 = nn.Parameter(torch.ones(3))
        self.c128 = nn.Parameter(torch.ones(3))
        self.nothing = nn.Parameter(torch.ones(0, 3))
        self.table = nn.Embedding(5, 3, sparse=True)
        self.tied = self.f64

    def convert(self):
        self.f32.float()
        self.b16.data = self.b16.data.bfloat16()
        self.c128.data = torch.tensor([1 + 2j, 3j, -1], dtype=torch.complex128)
        return self

    def forward(self, x, indices):
        y = self.f64(x) + self.f32(x.float()).double() * self.tied(x)
        y = y * self.b16.double() * (self.c128 * self.c128).real
        return y.sum() + self.nothing.sum() + self.table(indices).square().sum()


@pytest.mark.parametrize("limits", [{}, TINY])
def test_parameters_of_every_kind(limits):
    model = build(Mixed).convert()

    def loss(m, rank):
        return m(normal(2, 4, seed=rank), torch.tensor([rank, 3]))

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    results = run_copies(2, model, run, **limits)
    assert_equal(*results)
    for name, expected in mean(2, model, loss).items():
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}.get(expected.dtype, 1e-12)
        assert_close({name: results[0][name]}, {name: expected}, tolerance)


def test_channels_last():
    model = build(lambda: nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)

    def loss(m, rank):
        return m(normal(2, 3, 5, 5, seed=rank)).square().sum()

    def run(wrapped, rank):
        loss(wrapped, rank).backward()
        assert wrapped.weight.grad.stride() == wrapped.weight.stride()
        assert not wrapped.weight.grad.is_contiguous()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, loss))


def test_create_graph():
    model = build(lambda: mlp(3, 4, 1))

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            plain_loss(wrapped, rank).backward(create_graph=True)
        return gradients(wrapped)

    with pytest.warns(UserWarning, match="create_graph"):
        results = run_copies(2, model, run)
    for grads in results:
        assert_close(grads, mean(2, model, plain_loss))


def test_gradients_that_user_code_replaces():
    """`p.grad` may be assigned, pointed elsewhere or scaled between backwards."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        weight = wrapped.module[0].weight
        plain_loss(wrapped, rank).backward()
        weight.grad.data = torch.full_like(weight, rank)
        plain_loss(wrapped, rank).backward()
        found = [weight.grad.clone()]
        weight.grad = torch.full_like(weight, rank)
        plain_loss(wrapped, rank).backward()
        found.append(weight.grad.clone())
        weight.grad *= 3
        plain_loss(wrapped, rank).backward()
        return [*found, weight.grad.clone()]

    step = mean(2, model, plain_loss)["0.weight"]
    for first, second, third in run_copies(2, model, run):
        torch.testing.assert_close(first, step + 0.5)
        torch.testing.assert_close(second, step + 0.5)
        torch.testing.assert_close(third, 3 * second + step)


def test_clipping_needs_nothing_more():
    def run(wrapped, rank):
        plain_loss(wrapped, rank).backward()
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        return norm.item(), gradients(wrapped)

    (norm, grads), (other_norm, other_grads) = run_copies(2, build(lambda: mlp(3, 2)), run)
    assert norm == other_norm > 0.5
    assert_equal(grads, other_grads)
    total = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    torch.testing.assert_close(total.item(), 0.5, rtol=1e-5, atol=0)


def test_frozen_and_unfrozen():
    """On the way, on all ranks alike; also where the unfrozen one has a local gradient already."""
    model = build(lambda: mlp(3, 4, 2))
    expected = mean(2, model, plain_loss)
    model[2].requires_grad_(False)

    def of(layer):
        return {name[2:]: grad for name, grad in expected.items() if name[0] == layer}

    def run(wrapped, rank):
        first, second = wrapped.module[0], wrapped.module[2]
        plain_loss(wrapped, rank).backward()
        assert second.weight.grad is None
        assert_close(gradients(first), of("0"))
        second.requires_grad_(True)
        first.requires_grad_(False)
        wrapped.zero_grad()
        plain_loss(wrapped, rank).backward()
        assert first.weight.grad is None
        assert_close(gradients(second), of("2"))
        first.requires_grad_(True)
        wrapped.zero_grad()
        with wrapped.no_sync():
            plain_loss(wrapped, rank).backward()
        plain_loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), {name: 2 * grad for name, grad in expected.items()})

    run_copies(2, model, run)


def test_new_buckets_remember_what_is_reduced():
    """A sum is not summed again because other parameters were unfrozen."""
    model = build(lambda: mlp(1, 1, 1))
    model[0].requires_grad_(False)

    def run(wrapped, rank):
        x = torch.ones(1, 1).double()
        wrapped(x).sum().backward()
        assert wrapped.module[2].bias.grad.item() == 2.0
        wrapped.module[0].requires_grad_(True)
        with pytest.raises(RingReduceError, match="zero_grad"):
            wrapped(x).sum().backward()

    run_copies(2, model, run, op="sum")


def test_converted_after_wrapping():
    model = build(lambda: mlp(3, 4, 2))
    expected = {name: grad.float() for name, grad in mean(2, model, plain_loss).items()}

    def loss(wrapped, rank):
        return wrapped(normal(4, 3, seed=rank).float()).square().sum()

    def run(wrapped, rank):
        wrapped.float()
        loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), expected, 1e-5)
        if rank == 0:  # there and back on one rank alone changes nothing
            wrapped.double().float()
        wrapped.zero_grad()
        loss(wrapped, rank).backward()
        return gradients(wrapped)

    assert_equal(*run_copies(2, model, run))


# ---- Being taken for the module.


def test_names_are_the_modules():
    model = build(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))

    def run(wrapped, rank):
        assert list(wrapped.state_dict()) == list(model.state_dict())
        for of in ("parameters", "buffers", "modules"):
            theirs = [name for name, _ in getattr(model, f"named_{of}")()]
            assert [name for name, _ in getattr(wrapped, f"named_{of}")()] == theirs
        assert list(map(id, wrapped.parameters())) == list(map(id, wrapped.module.parameters()))

        class Outer(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

        outer, plain = Outer(wrapped), Outer(copy.deepcopy(model))
        assert list(outer.state_dict()) == list(plain.state_dict())
        assert list(dict(outer.named_parameters())) == list(dict(plain.named_parameters()))
        nn.init.ones_(plain.net[0].weight)
        assert not outer.load_state_dict(plain.state_dict()).missing_keys
        assert (wrapped.module[0].weight == 1).all()

    run_copies(2, model, run)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(prefix, assign):
    source = build(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), seed=5)
    holder = nn.Module()
    holder.module = source
    state = (holder if prefix else source).state_dict()
    names = list(state)

    def run(wrapped, rank):
        wrapped.load_state_dict(state, assign=assign)
        assert list(state) == names
        with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
            wrapped.load_state_dict({**source.state_dict(), "other": torch.ones(1)})
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    model = build(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, source, plain_loss))


def test_attributes_are_the_modules():
    class Named(nn.Module):
        kind = "named"

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.temperature = 1.0

        def forward(self, x):
            return self.fc(x) * self.temperature

        def describe(self):
            return f"{self.kind} {self.temperature}"

    def run(wrapped, rank):
        assert wrapped.fc is wrapped.module.fc
        wrapped.temperature = 2.0
        wrapped.novel = 3
        assert wrapped.module.temperature == 2.0
        assert wrapped.module.novel == 3
        assert wrapped.describe() == "named 2.0"
        wrapped.eval()
        assert not wrapped.training and not wrapped.module.fc.training
        with pytest.raises(AttributeError, match="Named.*absent"):
            _ = wrapped.absent
        other = {name: torch.ones_like(x) for name, x in wrapped.named_parameters()}
        y = torch.func.functional_call(wrapped, other, (torch.ones(1, 3).double(),))
        assert (y == 8).all()

    run_copies(1, build(Named), run)
    run_copies(2, build(Named), run)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_connect_when_they_are_trained(how):
    """A copy evaluates on one rank alone; all ranks that train it are connected."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        plain_loss(wrapped, rank).backward()
        before = gradients(wrapped)
        if how == "deepcopy":
            twin = copy.deepcopy(wrapped)
        else:
            file = io.BytesIO()
            torch.save(wrapped, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
            twin._attachment.comm = wrapped._attachment.comm  # these ranks are not the world
        if rank == 0:
            with torch.no_grad():
                twin(normal(4, 3))
        twin.zero_grad()
        plain_loss(twin, rank).backward()
        assert_equal(gradients(twin), before)
        assert_equal(gradients(wrapped), before)
        assert twin.stats()["backwards"] == 1

    run_copies(2, model, run)


@pytest.mark.parametrize("how", ["close", "detach", "delete"])
def test_hooks_are_removed(how):
    """At once, without garbage collection; the module is as it was, and can be wrapped again."""
    models = [build(lambda: mlp(3, 2)) for _ in range(2)]

    def run(comm):
        module = models[comm.rank]
        wrapped = DistributedModel(module, comm=comm)
        plain_loss(wrapped, comm.rank).backward()
        grads = gradients(module)
        gone = weakref.ref(wrapped)
        if how == "delete":
            del wrapped
            assert gone() is None
        else:
            getattr(wrapped, how)()
            getattr(wrapped, how)()
        assert not any(x._post_accumulate_grad_hooks for x in module.parameters())
        assert_equal(gradients(module), grads)
        module.zero_grad()
        plain_loss(module if how == "delete" else wrapped, comm.rank).backward()
        assert_equal(gradients(module), alone(module, comm.rank, plain_loss))
        module.zero_grad()
        again = DistributedModel(module, comm=comm)
        plain_loss(again, comm.rank).backward()
        assert_equal(gradients(module), grads)

    gc.disable()
    try:
        run_threads(2, run)
    finally:
        gc.enable()


def test_closed_between_forward_and_backward():
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        loss = plain_loss(wrapped, rank)
        wrapped.close()
        loss.backward()
        assert_equal(gradients(wrapped), alone(model, rank, plain_loss))

    run_copies(2, model, run)


def test_world_of_one():
    model = build(Mixed).convert()

    def run(wrapped, rank):
        assert wrapped.stats()["unused"] == []
        with wrapped.no_sync():
            wrapped(normal(2, 4), torch.tensor([1])).backward()
        wrapped.zero_grad()
        wrapped(normal(2, 4), torch.tensor([1])).backward()
        assert not any(x._post_accumulate_grad_hooks for x in wrapped.parameters())
        return gradients(wrapped)

    (grads,) = run_copies(1, model, run)
    expected = alone(model, 0, lambda m, rank: m(normal(2, 4), torch.tensor([1])))
    for name, grad in grads.items():
        assert torch.equal(grad.to_dense(), expected[name].to_dense())
