"""Uses of a DistributedModel that are legal for a module, and seldom thought of."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
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
    plain_loss,
    run_copies,
    run_wrapped,
    times,
)

import ringreduce as rr
from ringreduce.errors import RingReduceError
from ringreduce.testing import run_threads


def two_steps(loss):
    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    return run


@pytest.mark.parametrize("op", ["avg", "sum"])
def test_outputs_that_are_dropped(op):
    """Also on one rank alone, and under no_sync: a forward by itself is nobody else's business."""
    model = build(lambda: mlp(3, 4, 2))

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            if rank:
                plain_loss(wrapped, rank + 5)
                with wrapped.no_sync():
                    plain_loss(wrapped, rank + 6)
            loss = plain_loss(wrapped, rank)
            if not rank:
                plain_loss(wrapped, 7)
            loss.backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, op=op):
        assert_close(grads, times(2 if op == "sum" else 1, mean(2, model, plain_loss)))


def test_one_of_several_outputs():
    """Another one on each rank, the other dropped."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in "abc")

        def forward(self, x):
            x = self.body(x).tanh()
            return tuple(head(x) for head in self.heads)

    def loss(m, rank):
        return m(normal(4, 3, seed=rank))[rank].square().sum()

    model = build(Heads)
    for grads in run_copies(2, model, two_steps(loss), **TINY):
        assert_close(grads, mean(2, model, loss))


class Twice(nn.Module):
    """Two checkpoints one after the other, or one within the other."""

    def __init__(self, nested, use_reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.nested = nested
        self.options = {"use_reentrant": use_reentrant}

    def inner(self, x):
        return checkpoint(self.second, x.tanh(), **self.options)

    def outer(self, x):
        return self.inner(self.first(x))

    def forward(self, x):
        if self.nested:
            return checkpoint(self.outer, x, **self.options)
        return self.inner(checkpoint(self.first, x, **self.options))


@pytest.mark.parametrize("limits", [{}, TINY])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_checkpoints_within_checkpoints(nested, use_reentrant, limits):
    model = build(lambda: Twice(nested, use_reentrant))

    def loss(m, rank):
        return m(normal(4, 3, seed=rank).requires_grad_()).square().sum()

    for grads in run_copies(2, model, two_steps(loss), **limits):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiled(backend, where):
    """A compiled module is wrapped, or a wrapped one compiled. Ranks compile in turn."""
    lock = threading.Lock()
    model = build(lambda: mlp(3, 4, 2))

    def run(wrapped, rank):
        if where == "inside":
            wrapped.module.compile(backend=backend)
            compiled = wrapped
        else:
            compiled = torch.compile(wrapped, backend=backend)
        for _ in range(2):
            wrapped.zero_grad()
            with lock:
                loss = plain_loss(compiled, rank)
            loss.backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, plain_loss))


def test_hooks_of_the_user():
    """On gradients they work on this rank's, before it is reduced; on modules as ever."""
    model = build(lambda: mlp(3, 2))
    calls = []

    def run(wrapped, rank):
        wrapped.module[0].weight.register_hook(lambda grad: grad * (1 + rank))
        wrapped.register_forward_hook(lambda module, args, y: calls.append("forward"))
        wrapped.register_full_backward_hook(lambda module, a, b: calls.append("backward"))
        wrapped.module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    def loss(m, rank):
        return m(2 * normal(4, 3, seed=rank)).square().sum()

    of_ranks = [alone(model, rank, loss) for rank in range(2)]
    weight = (of_ranks[0]["0.weight"] + 2 * of_ranks[1]["0.weight"]) / 2
    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, loss) | {"0.weight": weight})
    assert sorted(calls) == ["backward"] * 2 + ["forward"] * 2


def test_functional_call_trains_others():
    """The model's own parameters are unused then; after it, they train as before."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        others = {
            name: x.detach().clone().requires_grad_() for name, x in wrapped.named_parameters()
        }
        y = torch.func.functional_call(wrapped, others, (normal(4, 3, seed=rank),))
        y.square().sum().backward()
        assert all(x.grad is None for x in wrapped.parameters())
        local = {name: x.grad for name, x in others.items()}
        assert_equal(local, alone(model, rank, plain_loss))
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, plain_loss))


def test_outputs_that_are_inputs_or_need_no_gradient():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return x, self.layer(x), x.detach(), None, 3

    def loss(m, rank):
        x, y, _, _, factor = m(normal(4, 3, seed=rank).requires_grad_())
        return x.sum() + factor * y.square().sum()

    model = build(Passing)
    for grads in run_copies(2, model, two_steps(loss)):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("cyclic", [True, False])
def test_dataclasses_that_are_not_trees(cyclic):
    """One has a field that leads back to it, the other one that is not set."""

    @dataclasses.dataclass(eq=False)
    class Output:
        rest: object = dataclasses.field(init=False)
        y: torch.Tensor

    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            output = Output(self.layer(x))
            if cyclic:
                output.rest = [output]
            return output

    def loss(m, rank):
        return m(normal(4, 3, seed=rank)).y.square().sum()

    model = build(Packing)
    for grads in run_copies(2, model, two_steps(loss)):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_of_the_whole(use_reentrant):
    """Forward runs again within backward."""
    model = build(lambda: mlp(3, 4, 2))

    def loss(m, rank):
        x = normal(4, 3, seed=rank).requires_grad_()
        return checkpoint(m, x, use_reentrant=use_reentrant).square().sum()

    for grads in run_copies(2, model, two_steps(loss), **TINY):
        assert_close(grads, mean(2, model, loss))


def test_backward_for_some_parameters():
    """Named as backward's inputs: the others have none, on any rank."""
    model = build(lambda: mlp(3, 4, 2))

    def loss(m, rank):
        return m(normal(4, 3, seed=rank)).square().sum()

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped, rank).backward(inputs=list(wrapped.module[2].parameters()))
        return gradients(wrapped)

    expected = mean(2, model, loss) | {"0.weight": None, "0.bias": None}
    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, expected)


@pytest.mark.parametrize(("value", "in_place"), [(None, False), (7.0, False), (7.0, True)])
def test_hooks_after_accumulation(value, in_place):
    """Of the user: they see this rank's gradient. What they make of it is not the result."""
    model = build(lambda: mlp(3, 2))
    expected = mean(2, model, plain_loss)

    def run(wrapped, rank):
        seen = []

        def replace(parameter):
            seen.append(parameter.grad.clone())
            if in_place:  # and in others'
                [x.grad.fill_(value) for x in wrapped.parameters() if x.grad is not None]
            else:
                parameter.grad = None if value is None else torch.full_like(parameter, value)

        weight = wrapped.module[0].weight
        weight.register_post_accumulate_grad_hook(replace)
        plain_loss(wrapped, rank).backward()
        assert_equal({"": seen[0]}, {"": alone(model, rank, plain_loss)["0.weight"]})
        return gradients(wrapped)

    for limits in {}, TINY:
        for grads in run_copies(2, model, run, **limits):
            assert_close(grads, expected)


@pytest.mark.parametrize("when", ["before", "after", "torch's"])
def test_optimizers_in_backward(when):
    """They would step with this rank's gradient: all ranks are told, and can go on."""

    def step_at_once(model):
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

    def run(wrapped, rank):
        if when == "after":
            step_at_once(wrapped)
        for _ in range(2):
            with pytest.raises(RingReduceError, match="'0.*' was written during backward"):
                plain_loss(wrapped, rank).backward()

    models = [build(lambda: mlp(3, 2)) for _ in range(2)]
    for model in models:
        if when == "before":
            step_at_once(model)
        elif when == "torch's":
            _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    run_wrapped(models, run)


@pytest.mark.parametrize("limits", [{}, TINY])
def test_gradients_that_change_places(limits):
    """They are views of a bucket, and accumulated onto where they are now."""
    model = build(lambda: mlp(3, 3, 3, 3))
    found = mean(2, model, plain_loss)
    expected = times(2.0, found)
    for i in range(3):
        expected[f"{2 * i}.weight"] = found[f"{2 * i}.weight"] + found[f"{(2 * i + 2) % 6}.weight"]

    def run(wrapped, rank):
        plain_loss(wrapped, rank).backward()
        weights = [wrapped.module[i].weight for i in (0, 2, 4)]
        weights[0].grad, weights[1].grad, weights[2].grad = (weights[i].grad for i in (1, 2, 0))
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, **limits):
        assert_close(grads, expected)


def test_two_models_in_one_loss():
    """A generator and what judges it, trained in turn."""
    generator, judge = build(lambda: mlp(3, 4, 3)), build(lambda: mlp(3, 4, 1), seed=1)
    copies = [copy.deepcopy((generator, judge)) for _ in range(2)]

    def run(comm):
        g, j = (rr.DistributedModel(model, comm=comm) for model in copies[comm.rank])
        for _ in range(2):
            x = normal(4, 3, seed=comm.rank)
            g.zero_grad()
            j(g(x).detach()).square().sum().backward()
            assert all(p.grad is None for p in g.parameters())
            j.zero_grad()
            j(g(x)).square().sum().backward()
            found = gradients(nn.Sequential(g.module, j.module))
            j.zero_grad()
        return found

    both = nn.Sequential(generator, judge)
    for grads in run_threads(2, run):
        assert_close(grads, mean(2, both, plain_loss))


def test_functional_transforms():
    """Gradients for each row, through the wrapped model: they are local."""
    model = build(lambda: mlp(3, 4, 2))

    def run(wrapped, rank):
        values = {name: x.detach() for name, x in wrapped.named_parameters()}
        rows = normal(4, 3, seed=rank)

        def loss(values, row):
            return torch.func.functional_call(wrapped, values, (row[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, rows)
        total = {name: x.sum(0) for name, x in each.items()}
        assert_close(total, alone(model, rank, plain_loss))
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, plain_loss))


def test_a_loss_without_this_model():
    """A rank whose loss does not depend on a parameter still takes part, with zeros."""
    model = build(lambda: mlp(3, 2))

    def loss(m, rank):
        y = m(normal(4, 3, seed=rank))
        return y.square().sum() if rank else (y * 0).sum()

    for grads in run_copies(2, model, two_steps(loss)):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("pattern", ["ssLs", "LsLLs", "sLLL"])
def test_no_sync_in_any_pattern(pattern):
    """s: reduced; L: local. What is local at the end stays so until the next reduced backward."""
    model = build(lambda: mlp(3, 4, 2))

    def run(wrapped, rank):
        for step, kind in enumerate(pattern):
            if kind == "s":
                plain_loss(wrapped, rank + 10 * step).backward()
            else:
                with wrapped.no_sync():
                    plain_loss(wrapped, rank + 10 * step).backward()
        return gradients(wrapped)

    def loss_of(step):
        return lambda m, rank: plain_loss(m, rank + 10 * step)

    end = pattern.rindex("s") + 1
    reduced = mean(2, model, *map(loss_of, range(end)))
    for rank, grads in enumerate(run_copies(2, model, run, **TINY)):
        local = alone(model, rank, *map(loss_of, range(end, len(pattern))))
        expected = {n: x + (0 if local[n] is None else local[n]) for n, x in reduced.items()}
        assert_close(grads, expected)


def test_recurrent_layers():
    """Weights of which torch keeps one flat copy, and outputs that are nested."""
    model = build(lambda: nn.LSTM(3, 4, num_layers=2))

    def loss(m, rank):
        y, (h, c) = m(normal(5, 2, 3, seed=rank))
        return y.square().sum() + h.sum() + c.sum()

    for grads in run_copies(2, model, two_steps(loss), **TINY):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("compression", [None, "bf16"])
def test_sparse_gradients(compression, weighted):
    """Dense when they are reduced, however."""
    model = build(lambda: nn.Embedding(6, 3, sparse=True))

    def loss(m, rank):
        return m(torch.tensor([rank, 3])).square().sum()

    def run(wrapped, rank):
        wrapped.set_weight(2 if weighted else None)
        return two_steps(loss)(wrapped, rank)

    for grads in run_copies(2, model, run, compression=compression):
        assert_close(grads, mean(2, model, loss), 1e-2 if compression else 1e-12)
