"""What a reduced backward leaves in .grad: whoever used what, how often, and what went wrong."""

from types import SimpleNamespace

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
    plain_loss,
    run_copies,
    times,
)

from ringreduce.errors import RingReduceError
from ringreduce.model import DistributedModel
from ringreduce.testing import run_threads


class Branches(nn.Module):
    """Uses the branches that it is told to use, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x, *indices):
        x = self.first(x)
        for i in indices:
            x = self.branches[i](x)
        return x


def test_mean_is_exact():
    """Small integers: every order of summation gives the same, so all have exactly the mean."""

    def run(wrapped, rank):
        x = torch.arange(12.0).view(4, 3) + 10 * rank
        wrapped(x.double()).sum().backward()
        return gradients(wrapped)

    x = torch.arange(12.0, dtype=torch.float64).view(4, 3) + 15  # the mean of ranks 0 to 3
    expected = {"weight": x.sum(0).expand(2, 3), "bias": torch.full((2,), 4.0).double()}
    for grads in run_copies(4, build(lambda: nn.Linear(3, 2)), run):
        assert_equal(grads, expected)


def test_reduction_starts_during_backward():
    """When the first layer's gradient comes, others are on their way: in the first step too."""

    def run(wrapped, rank):
        seen = []
        total = sum(p.nbytes for p in wrapped.parameters())
        weight = wrapped.module[0].weight
        hook = weight.register_hook(lambda _: seen.append(wrapped.stats()["bytes"]))
        wrapped(normal(2, 64, seed=rank)).sum().backward()
        hook.remove()
        assert total / 2 < seen[0] < total
        assert wrapped.stats()["bytes"] == total
        assert wrapped.stats()["buckets"] == 6

    run_copies(2, build(lambda: mlp(64, 64, 64, 64)), run, **TINY)


@pytest.mark.parametrize("limits", [{}, TINY])
def test_unused_parameters(limits):
    """Used by some ranks, by none, by all, and changing from step to step, without any flag."""
    model = build(Branches)
    steps = [((0,), (1,)), ((2,), (2,)), ((), (1, 1)), ((), ()), ((0, 1), (0, 2))]

    def loss_of(step):
        return lambda m, rank: m(normal(5, 3, seed=step + 10 * rank), *steps[step][rank]).sum()

    def run(wrapped, rank):
        found = []
        for step in range(len(steps)):
            wrapped.zero_grad()
            loss_of(step)(wrapped, rank).backward()
            found.append((gradients(wrapped), wrapped.stats()["unused"]))
        return found

    results = run_copies(2, model, run, **limits)
    for step in range(len(steps)):
        expected = mean(2, model, loss_of(step))
        for grads, unused in (results[0][step], results[1][step]):
            assert_close(grads, expected)
            assert_equal(grads, results[0][step][0])
            assert sorted(unused) == sorted(n for n, g in expected.items() if g is None)


@pytest.mark.parametrize("op", ["avg", "sum"])
def test_globally_unused_keeps_its_gradient(op):
    """Two losses in turn, each with its own branch: a backward leaves the other one's be."""
    model = build(Branches)

    def first_loss(m, rank):
        return m(normal(5, 3), 0).sum()

    def run(wrapped, rank):
        first_loss(wrapped, rank).backward()
        before = gradients(wrapped.module.branches[0])
        wrapped.module.first.zero_grad()
        wrapped(normal(5, 3, seed=rank), 1).sum().backward()
        assert_equal(gradients(wrapped.module.branches[0]), before)
        assert wrapped.module.branches[2].weight.grad is None
        # Now rank 1 alone uses branch 0, and adds to what is there where the op allows it.
        wrapped.zero_grad() if op == "sum" else wrapped.module.first.zero_grad()
        if op == "avg":
            wrapped.module.branches[0].weight.grad *= 2
        wrapped(normal(5, 3), *((0,) if rank else ())).sum().backward()
        return wrapped.module.branches[0].weight.grad.clone()

    local = alone(model, 0, first_loss)["branches.0.weight"]
    for grad in run_copies(2, model, run, op=op):
        torch.testing.assert_close(grad, 2.5 * local if op == "avg" else local)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("limits", [{}, TINY])
def test_zero_grad(set_to_none, limits):
    model = build(lambda: mlp(3, 5, 3))

    def run(wrapped, rank):
        for step in (20, 10, 0):
            wrapped.zero_grad(set_to_none=set_to_none)
            plain_loss(wrapped, rank + step).backward()
        return gradients(wrapped)

    for grads in run_copies(3, model, run, **limits):
        assert_close(grads, mean(3, model, plain_loss))


@pytest.mark.parametrize("limits", [{}, TINY])
@pytest.mark.parametrize("op", ["avg", "sum"])
def test_no_sync(op, limits):
    """Local gradients, then all at once: also of what the last backward does not use."""
    model = build(Branches)
    losses = [
        lambda m, rank: m(normal(5, 3, seed=rank), 0).sum(),
        lambda m, rank: m(normal(5, 3, seed=rank + 10), 1, *[2] * rank).sum(),
        lambda m, rank: m(normal(5, 3, seed=rank + 20), 0).sum(),
    ]
    expected = times(2 if op == "sum" else 1, mean(2, model, *losses))

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            with wrapped.no_sync():
                losses[0](wrapped, rank).backward()
                second = losses[1](wrapped, rank)
            second.backward()  # where forward ran decides
            assert_equal(gradients(wrapped), alone(model, rank, *losses[:2]))
            third = losses[2](wrapped, rank)
            with wrapped.no_sync():
                third.backward()
            assert_close(gradients(wrapped), expected)
        return gradients(wrapped)

    assert_equal(*run_copies(2, model, run, op=op, **limits))


def test_no_sync_interleaved():
    """Each backward does as its own forward was told, whichever order they come in."""
    model = build(lambda: mlp(3, 3))
    expected = mean(2, model, plain_loss)

    def run(wrapped, rank):
        with wrapped.no_sync():
            quiet = plain_loss(wrapped, rank)
        loud = plain_loss(wrapped, rank)
        quiet.backward(retain_graph=True)
        assert_equal(gradients(wrapped), alone(model, rank, plain_loss))
        wrapped.zero_grad()
        loud.backward(retain_graph=True)
        assert_close(gradients(wrapped), expected)
        wrapped.zero_grad()
        (quiet + loud).backward()
        assert_close(gradients(wrapped), times(2, expected))

    run_copies(2, model, run)


def test_several_backwards_for_one_forward_without_zero_grad():
    model = build(lambda: mlp(3, 4, 2))

    def losses(m, rank):
        a, b = m(normal(6, 3, seed=rank)).unbind(1)
        return a.square().sum(), b.exp().sum()

    def run(wrapped, rank):
        for _ in range(2):
            first, second = losses(wrapped, rank)
            first.backward(retain_graph=True)
            second.backward()
        return gradients(wrapped)

    expected = mean(3, model, lambda m, rank: 2 * sum(losses(m, rank)))
    for grads in run_copies(3, model, run, **TINY):
        assert_close(grads, expected)


def test_several_forwards_before_one_backward():
    model = build(lambda: mlp(3, 4, 2))

    def loss(m, rank):
        return plain_loss(m, rank) * plain_loss(m, rank + 10)

    def run(wrapped, rank):
        loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, mean(2, model, loss))


class Checkpointed(nn.Module):
    """One layer in several checkpoints: its gradient comes in parts, each in an inner backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.last, self.shared = nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x, repeats):
        for _ in range(repeats):
            x = checkpoint(self.shared, x, use_reentrant=self.use_reentrant).tanh()
        return checkpoint(self.last, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("limits", [{}, TINY])
@pytest.mark.parametrize("op", ["avg", "sum"])
def test_checkpointing(use_reentrant, limits, op):
    """Another number of times on each rank: all reduce again where one of them needs it."""
    model = build(lambda: Checkpointed(use_reentrant))

    def loss(m, rank):
        return m(normal(4, 3, seed=rank).requires_grad_(), 1 + 2 * rank).sum()

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad(set_to_none=False)  # the second time it accumulates into views
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    results = run_copies(3, model, run, op=op, **limits)
    expected = times(3 if op == "sum" else 1, mean(3, model, loss))
    for grads in results:
        assert_close(grads, expected)
        assert_equal(grads, results[0])


def test_loss_apart_from_the_outputs():
    """A first backward that goes past all that forward returned is reduced nevertheless."""

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x):
            self.penalty = self.aside(x).sum()
            return self.main(x)

    def run(wrapped, rank):
        y = wrapped(normal(4, 3, seed=rank))
        wrapped.penalty.backward()
        y.sum().backward()
        return gradients(wrapped)

    assert_equal(*run_copies(2, build(Aside), run))


def test_the_module_itself_stays_local():
    """Through .module nothing is reduced; the next reduced backward takes what it left."""
    model = build(lambda: mlp(3, 2))

    def run(wrapped, rank):
        plain_loss(wrapped, rank).backward()
        wrapped.zero_grad()
        plain_loss(wrapped.module, rank).backward()
        assert_equal(gradients(wrapped), alone(model, rank, plain_loss))
        plain_loss(wrapped, rank).backward()
        assert_close(gradients(wrapped), times(2, mean(2, model, plain_loss)))

    run_copies(2, model, run)


@pytest.mark.parametrize("of", ["inputs", "parameters"])
def test_autograd_grad_is_local(of):
    """Rank 0 alone calls it: no other rank is needed, and its result is rank 0's."""
    model = build(lambda: mlp(3, 4, 1))

    def loss(m, rank):
        x = normal(4, 3, seed=rank).requires_grad_()
        y = m(x).sum()
        if rank:
            return y
        wanted = [x] if of == "inputs" else list(m.parameters())
        slopes = torch.autograd.grad(y, wanted, create_graph=True)
        return y + sum(slope.square().sum() for slope in slopes)

    def run(wrapped, rank):
        loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert_close(grads, mean(2, model, loss))


@pytest.mark.parametrize("op, expected", [("sum", 9.0), ("min", 2.0), ("max", 4.0), ("prod", 24.0)])
def test_other_ops(op, expected):
    def run(wrapped, rank):
        for step in range(3):
            wrapped.zero_grad(set_to_none=step == 1)
            wrapped(torch.full((1, 2), rank + 2.0).double()).sum().backward()
        return wrapped.weight.grad[0, 0].item()

    model = build(lambda: nn.Linear(2, 2, bias=False))
    assert run_copies(3, model, run, op=op) == [expected] * 3


def test_sum_onto_a_reduced_gradient_is_refused():
    """Of 3 + 3 over two ranks, 6 and then 6 more would become 18."""

    def run(wrapped, rank):
        def step():
            wrapped(torch.full((1, 2), 3.0).double()).sum().backward()

        step()
        with pytest.raises(RingReduceError, match=r"zero_grad\(\).*no_sync\(\)"):
            step()
        with wrapped.no_sync(), pytest.raises(RingReduceError, match="zero_grad"):
            step()
        wrapped.zero_grad()
        step()
        return wrapped.weight.grad.unique().tolist()

    model = build(lambda: nn.Linear(2, 2, bias=False))
    assert run_copies(2, model, run, op="sum") == [[6.0]] * 2


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.fail:
            raise KeyError("on purpose")
        return grad, None


class Fragile(nn.Module):
    """Raises in backward: at the very beginning, or when the late layer has its gradient."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, fail_at="", early_only=False, hide=False):
        y = self.early(x)
        if not early_only:
            y = self.late(Failing.apply(y, fail_at == "middle"))
        y = Failing.apply(y, fail_at == "beginning")
        return SimpleNamespace(y=y) if hide else y


def late(grads):
    return {name: grad for name, grad in grads.items() if name.startswith("late")}


@pytest.mark.parametrize("again", ["forward", "hidden outputs", "backward"])
def test_exception_in_backward_on_all_ranks(again):
    """Half of the buckets are on their way when it comes; training goes on."""
    model = build(Fragile)

    def run(wrapped, rank):
        x = normal(4, 3, seed=rank)
        plain_loss(wrapped, rank).backward()
        wrapped.zero_grad()
        other = plain_loss(wrapped, rank)
        for _ in range(2):
            with pytest.raises(KeyError):
                wrapped(x, fail_at="middle").sum().backward()
        if again == "forward":
            # What is left on each rank is reduced with the next, also where that has nothing new.
            wrapped(x, early_only=True).sum().backward()
            left = mean(2, model, *[lambda m, rank: m(normal(4, 3, seed=rank)).sum()] * 2)
            assert_close(late(gradients(wrapped)), late(left))
        wrapped.zero_grad()
        if again == "backward":
            other.backward()
        else:
            y = wrapped(x, hide=again == "hidden outputs")
            getattr(y, "y", y).square().sum().backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, mean(2, model, plain_loss))


@pytest.mark.parametrize("fail_at", ["beginning", "middle"])
def test_exception_in_backward_on_one_rank(fail_at):
    """The others are told when that rank goes on, and all stay in step."""
    model = build(Fragile)

    def failing_loss(m, rank):
        return m(normal(4, 3, seed=rank)).sum() * (fail_at == "middle" or rank != 1)

    def run(wrapped, rank):
        x = normal(4, 3, seed=rank)
        plain_loss(wrapped, rank).backward()
        wrapped.zero_grad()
        for _ in range(2):
            with pytest.raises(KeyError if rank == 1 else RingReduceError) as error:
                wrapped(x, fail_at if rank == 1 else "").sum().backward()
            assert rank == 1 or "rank 1" in str(error.value)
        wrapped(x, early_only=True).sum().backward()
        assert_close(late(gradients(wrapped)), late(mean(3, model, *[failing_loss] * 2)))
        wrapped.zero_grad()
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(3, model, run, **TINY):
        assert_close(grads, mean(3, model, plain_loss))


@pytest.mark.parametrize("failing", [{0, 1, 2}, {1}])
def test_a_new_wrapper_after_an_exception(failing):
    """Made while the old one is still there, and other ranks may still wait in it."""
    models = [build(Fragile) for _ in range(3)]

    def run(comm):
        module, rank = models[comm.rank], comm.rank
        wrapped = DistributedModel(module, comm=comm, **TINY)
        with pytest.raises(KeyError if rank in failing else RingReduceError):
            wrapped(normal(4, 3), "middle" if rank in failing else "").sum().backward()
        wrapped = DistributedModel(module, comm=comm, **TINY)
        wrapped.zero_grad()
        plain_loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_threads(3, run):
        assert_close(grads, mean(3, build(Fragile), plain_loss))


def test_collectives_of_the_user_do_not_interleave():
    """A hook may reduce something at another time on each rank: the model has its own channel."""
    model = build(lambda: mlp(3, 4, 4, 2))

    def run(wrapped, rank):
        totals = []
        comm = wrapped._attachment.comm
        parameter = list(wrapped.parameters())[3 * rank]
        parameter.register_hook(lambda _: totals.append(comm.allreduce(torch.ones(3))))
        work = comm.allreduce(torch.full((1000,), rank + 1.0), async_op=True)
        plain_loss(wrapped, rank).backward()
        assert work.wait()[0] == 3.0
        assert totals[0].tolist() == [2.0] * 3
        return gradients(wrapped)

    for grads in run_copies(2, model, run, **TINY):
        assert_close(grads, mean(2, model, plain_loss))
