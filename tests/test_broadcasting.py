"""Objects, models, optimizers: all ranks end with one rank's state, or are told what differs."""

import copy
import itertools

import numpy as np
import pytest
import torch
from expected import bits_of
from torch import nn

from ringreduce import MismatchError

OBJECTS = [
    None,
    0,
    "text",
    b"",
    b"bytes" * 100_000,
    [1, {"two": (3.0, {4})}],
    np.arange(10.0).reshape(2, 5),
    torch.arange(6).view(2, 3),
    {"step": torch.tensor(3.0), "lr": 1e-3},
    float("inf"),
    ValueError("an exception"),
]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return type(a) is type(b) and a.dtype == b.dtype and bits_of(a) == bits_of(b)
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


@pytest.mark.parametrize("size", (1, 2, 5))
def test_broadcast_object(ranks, size):
    def check(comm):
        for obj, root in itertools.product(OBJECTS, range(size)):
            mine = obj if comm.rank == root else "ignored"
            result = comm.broadcast_object(mine, root)
            assert equal(result, obj), (obj, root)
            assert comm.rank != root or result is obj
        assert comm.broadcast_object({"rank": comm.rank}) == {"rank": 0}
        # What cannot be pickled does not matter where it is not sent.
        assert comm.broadcast_object((lambda: 0) if comm.rank else 5) == 5

    ranks(size, check)


def test_an_object_that_cannot_be_pickled_is_refused_before_anything_is_sent(ranks):
    def check(comm):
        if comm.rank == 1:
            sequence = comm.core.sequence
            with pytest.raises(
                (TypeError, AttributeError, ValueError, Exception), match="pickle|local"
            ):
                comm.broadcast_object(lambda: 0, root=1)
            assert comm.core.sequence == sequence
        assert comm.broadcast_object(comm.rank, root=1) == 1

    ranks(2, check)


def test_roots_that_differ(ranks):
    def check(comm):
        with pytest.raises(MismatchError):
            comm.broadcast_object(1, root=comm.rank)
        assert comm.broadcast_object(comm.rank, root=1) == 1

    ranks(2, check)


def mixed_model(seed):
    """Several dtypes, shapes and layouts; buffers, one 0-d; a frozen and a shared parameter."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(4),
        nn.Linear(5, 5).to(torch.float64),
        nn.Linear(5, 5, bias=False).to(torch.bfloat16),
        nn.Linear(7, 5, bias=False),
    )
    model[4].weight = nn.Parameter(torch.randn(5, 7).t())  # not C-contiguous
    model[2].weight.requires_grad_(False)
    model.register_parameter("shared", model[0].bias)
    model.register_buffer("mask", torch.rand(9) < 0.5)
    model.register_buffer("counter", torch.tensor(seed))
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("unsaved", torch.randn(2), persistent=False)
    return model


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("source", ["module", "state dict", "named parameters", "shuffled list"])
@pytest.mark.parametrize("root", (0, 2))
def test_broadcast_parameters(ranks, source, root):
    models = [mixed_model(seed) for seed in range(3)]
    wanted = {name: bits_of(x) for name, x in tensors_of(models[root]).items()}

    def check(comm):
        model = copy.deepcopy(models[comm.rank])
        mine = tensors_of(model)
        addresses = {name: x.data_ptr() for name, x in mine.items()}
        if source == "module":
            given = model
        elif source == "state dict":
            given = model.state_dict()
        elif source == "named parameters":
            given = model.named_parameters()
        else:  # the names count, not the order
            given = list(mine.items())
            given = given[comm.rank :] + given[: comm.rank]
        assert comm.broadcast_parameters(given, root) is None
        after = tensors_of(model)
        assert {name: x.data_ptr() for name, x in after.items()} == addresses
        sent = {
            "state dict": model.state_dict(),
            "named parameters": dict(model.named_parameters()),
        }
        for name in sent.get(source, after):
            if name in wanted:
                assert bits_of(after[name]) == wanted[name], name
        assert not model[2].weight.requires_grad and model[0].weight.requires_grad
        assert model.shared is model[0].bias

    ranks(3, check)


def test_broadcast_parameters_of_arrays_and_of_nothing(ranks):
    def check(comm):
        arrays = {
            "a": np.full(3, comm.rank),
            "b": torch.full((2,), float(comm.rank)),
            "c": np.zeros((0, 2)),
        }
        comm.broadcast_parameters(arrays, root=1)
        assert (arrays["a"] == 1).all() and (arrays["b"] == 1).all()
        for nothing in ({}, [], nn.ReLU()):
            comm.broadcast_parameters(nothing)

    ranks(2, check)


@pytest.mark.parametrize("root", (0, 1))
def test_models_that_differ(ranks, root):
    def check(comm):
        odd = comm.rank == 1
        for one, other, shown in (
            ({"a": torch.ones(2)}, {"b": torch.ones(2)}, ("a", "b")),
            ({"a": torch.ones(2)}, {"a": torch.ones(3)}, ("(2,)", "(3,)")),
            ({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, ("(2, 3)", "(3, 2)")),
            ({"a": torch.ones(2)}, {"a": torch.ones(2).double()}, ("float32", "float64")),
            ({"a": torch.ones(2)}, {"a": torch.ones(2), "z": torch.ones(1)}, ("z",)),
            ({}, {"a": torch.ones(2)}, ("a",)),
        ):
            given = {name: x * (comm.rank + 1) for name, x in (one if odd else other).items()}
            before = {name: bits_of(x) for name, x in given.items()}
            with pytest.raises(MismatchError) as caught:
                comm.broadcast_parameters(given, root)
            text = str(caught.value)
            assert all(part in text for part in (*shown, "rank 0", "rank 1")), text
            assert {name: bits_of(x) for name, x in given.items()} == before
        assert comm.allreduce(np.ones(1)).tolist() == [3]

    ranks(3, check)


def test_parameters_that_cannot_be_written(ranks):
    def check(comm):
        if comm.rank == 1:
            sequence = comm.core.sequence
            for wrong, exception in (
                ({"weight": torch.ones(1).expand(3)}, ValueError),
                ({"weight": np.frombuffer(b"12345678", np.float64)}, ValueError),
                ({"weight": [1, 2]}, TypeError),
                ({"weight": torch.ones(2).to_sparse()}, TypeError),
            ):
                with pytest.raises(exception, match="weight"):
                    comm.broadcast_parameters(wrong)
            for wrong in (5, None, "text", [1, 2]):
                with pytest.raises(TypeError):
                    comm.broadcast_parameters(wrong)
            assert comm.core.sequence == sequence
        comm.barrier()

    ranks(2, check)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, history_size=3),
}


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)

        def loss(x=x):
            optimizer.zero_grad()
            value = (model(x) - x.sum(1, keepdim=True)).square().mean()
            value.backward()
            return value

        optimizer.step(loss)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("root", (0, 1))
def test_training_goes_on_from_roots_state(ranks, kind, root):
    """With root's state, all ranks take the steps that root would have taken alone."""

    models = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(3)]

    def start(rank):
        model = copy.deepcopy(models[rank])
        optimizer = OPTIMIZERS[kind](model.parameters())
        for group in optimizer.param_groups:
            group["lr"] /= rank + 1
        return model, optimizer

    alone, optimizer = start(root)
    train(alone, optimizer, 3, 0)
    train(alone, optimizer, 2, 9)
    wanted = [bits_of(p) for p in alone.parameters()]

    def check(comm):
        model, optimizer = start(comm.rank)
        if comm.rank == root:
            train(model, optimizer, 3, 0)
        elif comm.rank == 2:  # has a state of its own, which must not survive
            train(model, optimizer, 1, 5)
        comm.broadcast_parameters(model, root)
        comm.broadcast_optimizer_state(optimizer, root)
        groups = [
            {k: v for k, v in g.items() if k != "params"}
            for g in optimizer.state_dict()["param_groups"]
        ]
        train(model, optimizer, 2, 9)
        assert [bits_of(p) for p in model.parameters()] == wanted
        return repr(groups)

    told = ranks(3, check)
    assert told == [told[0]] * 3


def test_optimizers_that_differ(ranks):
    def check(comm):
        model = nn.Linear(3, 2 + comm.rank)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        before = repr(optimizer.state_dict())
        with pytest.raises(MismatchError, match=r"rank 0 .*rank 1"):
            comm.broadcast_optimizer_state(optimizer)
        assert repr(optimizer.state_dict()) == before
        comm.barrier()

    ranks(2, check)


def test_hyperparameters_that_are_tensors_stay_tensors(ranks):
    def check(comm):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5 / (comm.rank + 1)))
        comm.broadcast_optimizer_state(optimizer, root=1)
        rate = optimizer.param_groups[0]["lr"]
        assert isinstance(rate, torch.Tensor) and rate.item() == 0.25
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)

    ranks(2, check)
