"""Ranks as threads, each with a DistributedModel, and what they must get: for the tests of models.

Models are made before the ranks start: torch has one random generator for all threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringreduce.model import DistributedModel
from ringreduce.testing import run_threads

TINY = {"bucket_mb": 1e-4, "first_bucket_mb": 1e-4}  # a bucket for almost every parameter

Gradients = dict[str, Tensor | None]


def build(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model whose values depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().double()


def mlp(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1])


class SumOfBranches(nn.Module):
    """The sum of those branches that a call names; the others are unused."""

    def __init__(self, branches: nn.ModuleList) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor, which: Sequence[int]) -> Any:
        return sum(self.branches[i](x) for i in which)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loss(model: nn.Module, rank: int) -> Tensor:
    """Of each rank's own data, for a model of three inputs."""
    return model(normal(4, 3, seed=rank)).square().sum()


def run_wrapped(
    models: Sequence[nn.Module], fn: Callable[[DistributedModel, int], Any], **options: Any
) -> list[Any]:
    """fn(wrapped, rank) on as many ranks as there are models, each wrapping its own."""

    def run(comm: Any) -> Any:
        return fn(DistributedModel(models[comm.rank], comm=comm, **options), comm.rank)

    return run_threads(len(models), run)


def run_copies(
    n: int, model: nn.Module, fn: Callable[[DistributedModel, int], Any], **options: Any
) -> list[Any]:
    """run_wrapped on n equal models."""
    return run_wrapped([copy.deepcopy(model) for _ in range(n)], fn, **options)


def gradients(model: nn.Module) -> Gradients:
    """Copies: what they view is overwritten by the next backward."""
    return {
        name: None if x.grad is None else x.grad.detach().clone()
        for name, x in model.named_parameters()
    }


def alone(model: nn.Module, rank: int, *losses: Callable[[nn.Module, int], Tensor]) -> Gradients:
    """What one process has after the backward of each loss(model, rank). Leaves the model alone."""
    model = copy.deepcopy(model)
    for loss in losses:
        loss(model, rank).backward()
    return gradients(model)


def mean(n: int, model: nn.Module, *losses: Callable[[nn.Module, int], Tensor]) -> Gradients:
    """What n ranks must have: None counts as zero, and stays None where no rank has anything."""
    of_ranks = [alone(model, rank, *losses) for rank in range(n)]
    found: Gradients = {}
    for name in of_ranks[0]:
        known = [grad for grads in of_ranks if (grad := grads[name]) is not None]
        found[name] = torch.stack([_dense(grad) for grad in known]).sum(0) / n if known else None
    return found


def times(factor: float, grads: Gradients) -> Gradients:
    return {name: None if grad is None else factor * grad for name, grad in grads.items()}


def assert_equal(a: Gradients, b: Gradients) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (x is None) == (y is None), f"{name}: {x} and {y}"
        assert x is None or (y is not None and torch.equal(x, y)), f"{name}: {x} and {y}"


def assert_close(a: Gradients, b: Gradients, tolerance: float = 1e-12) -> None:
    """Relative to the largest value of each tensor."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (x is None) == (y is None), f"{name}: {x} and {y}"
        if x is not None and y is not None and x.numel():
            assert x.dtype == y.dtype
            assert (x - y).abs().max() <= tolerance * y.abs().max(), f"{name}: {x} and {y}"


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def assert_trained_as_one_process(result: Path, ranks: int = 2) -> None:
    """result: the state that ranks saved, of the small model that users' scripts train here."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 8, dtype=torch.float64), torch.randn(48, 4).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * ranks, momentum=0.9)
    rows = 4 * ranks
    for begin in [*range(0, 48, rows)] * 2:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[begin : begin + rows]), y[begin : begin + rows]).backward()
        optimizer.step()
    found = torch.load(result)
    for name, expected in model.state_dict().items():
        assert (found[name] - expected).abs().max() <= 1e-12, name
