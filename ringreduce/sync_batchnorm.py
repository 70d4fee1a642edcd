"""SyncBatchNorm: batch normalization over the batches of all ranks, as one process would do it.

For any device on which collectives work. Where ranks normalize alone, as when a model is evaluated,
no other rank takes part.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ringreduce.collectives import communicator_of
from ringreduce.communicator import Communicator


class _Group:
    """The private communicator of all layers of one model. Closed when neither they nor a graph is
    left; a copy has one of its own, later.
    """

    def __init__(self, parent: Communicator | None = None) -> None:
        self.parent = parent  # None: the world
        self._comm: Communicator | None = None

    def comm(self) -> Communicator:
        """Collective the first time."""
        if self._comm is None:
            comm = communicator_of(self.parent).split(0)
            assert comm is not None
            weakref.finalize(self, comm.close)
            self._comm = comm
        return self._comm

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        memo[id(self)] = twin = _Group(self.parent)
        return twin

    def __reduce__(self) -> Any:
        return _Group, ()


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm whose mean and variance are of the batches of all ranks together.

    `convert_sync_batchnorm` makes them of BatchNorm layers, with their parameters and buffers, and
    one communicator for all; a layer made otherwise has its own.

    In training mode forward and backward are collective, of equal order on all ranks. A rank's
    batch may be empty, or of another size. Outputs, gradients of inputs and running values are what
    one process would have for the union of the batches and the sum of the losses; gradients of
    weight and bias are of this rank's part, to be reduced with all others. As layers mix the losses
    of all ranks, `set_weight` comes too late for them: where batches differ in size, scale the
    loss. Statistics are computed in float32, or wider.

    input: shape (N, C) or (N, C, ...). Raises ValueError for other shapes, and, on all ranks, where
    all batches together have one value for each channel.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; variances are combined as in Chan, Golub
    and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(self, *args: Any, comm: Communicator | None = None, **kwargs: Any) -> None:
        """Arguments as of nn.BatchNorm2d. comm: the ranks; default: all."""
        super().__init__(*args, **kwargs)
        self._group = _Group(comm)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must have 2 dimensions or more, not {input.dim()}")
        if input.shape[1] != self.num_features:
            raise ValueError(f"input must have {self.num_features} channels, not {input.shape[1]}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes over all dimensions but the second."""
        self._check_input_dim(input)
        if not self.training:
            return functional.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                0.0,
                self.eps,
            )
        return self._train(input)

    @torch.compiler.disable  # collectives need the tensors themselves
    def _train(self, input: Tensor) -> Tensor:
        mean, variance, count = _statistics(input.detach(), self._group.comm())
        if count == 1:
            raise ValueError("the batches of all ranks have one value for each channel: that is 0")
        if self.running_mean is not None:
            self._update(mean, variance * (count / max(1.0, count - 1)), count)
        scale = torch.rsqrt(variance + self.eps)
        return _Normalize.apply(input, self.weight, self.bias, mean, scale, count, self._group)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """variance: unbiased. Where no rank has any value, nothing changes."""
        assert self.running_mean is not None and self.running_var is not None
        if not count:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:
            factor = 1.0 / float(self.num_batches_tracked or 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class _Normalize(torch.autograd.Function):
    """Of what all ranks have the mean and the scale of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        count: float,
        group: _Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.group = count, group
        y = _normalized(x, mean, scale)
        if weight is not None:
            y = y * _channels(weight.to(y.dtype), x)
        if bias is not None:
            y = y + _channels(bias.to(y.dtype), x)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        normalized = _normalized(x, mean, scale)
        grad = grad.to(normalized.dtype)
        over = [i for i in range(x.dim()) if i != 1]
        sums = torch.stack([grad.sum(over), (grad * normalized).sum(over)])
        grad_bias, grad_weight = sums.clone()
        ctx.group.comm().allreduce_(sums)  # also where this rank alone needs no gradient of x
        means = sums / max(1.0, ctx.count)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        grad_x = grad - _channels(means[0], x) - normalized * _channels(means[1], x)
        grad_x = (grad_x * _channels(factor, x)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None, None, None, None
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _statistics(x: Tensor, comm: Communicator) -> tuple[Tensor, Tensor, float]:
    """Collective: mean and biased variance of each channel over all ranks, and how many values."""
    wide = x.to(_accumulator(x))
    over = [i for i in range(x.dim()) if i != 1]
    count = x.numel() // max(1, x.shape[1])
    mine = wide.new_zeros(1, 1 + 2 * x.shape[1])
    mine[0, 0] = count
    if count:
        variance, mean = torch.var_mean(wide, over, correction=0)
        mine[0, 1:] = torch.cat([mean, variance])
    everyone = comm.allgather(mine)
    counts = everyone[:, :1]
    means, variances = everyone[:, 1:].chunk(2, 1)
    total = _total(count, counts, comm)
    shares = counts / max(1.0, total)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean) ** 2)).sum(0), total


def _total(count: int, counts: Tensor, comm: Communicator) -> float:
    """Collective: of all counts, which lie on x's device; of this rank's, the host knows it too."""
    if counts.is_cpu:
        return float(counts.sum())
    # To read it from a GPU would be to wait for all that is before it.
    return float(sum(int(message) for message in comm.exchange(b"%d" % count)))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """One for each channel, to be broadcast to the shape of x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _normalized(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _channels(mean, x)) * _channels(scale, x)


def convert_sync_batchnorm(module: nn.Module, *, comm: Communicator | None = None) -> nn.Module:
    """Replaces all BatchNorm layers of a module, in place, by SyncBatchNorm; returns the module.

    module: returned as another one only if it is a BatchNorm itself. Parameters and buffers stay
    the same objects: an optimizer may have them already. comm: the ranks; default: all.

    Collective: the layers talk on a communicator of their own, split off it; a copy (deepcopy,
    pickle) splits another one off it, or the world, in its first forward in training mode. Raises
    ValueError for lazy layers.
    """
    layers = [layer for layer in module.modules() if _is_convertible(layer)]
    for layer in layers:
        if any(is_lazy(x) for x in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"{type(layer).__name__} has no shape yet: run one forward before it is converted"
            )
    group = _Group(comm)
    group.comm()
    twins = {id(layer): _convert(layer, group) for layer in layers}
    for owner in list(module.modules()):
        for name, child in owner._modules.items():
            if id(child) in twins:
                owner._modules[name] = twins[id(child)]
    return twins.get(id(module), module)


def _is_convertible(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)


def _convert(layer: nn.Module, group: _Group) -> SyncBatchNorm:
    assert isinstance(layer, _BatchNorm)
    twin = SyncBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    twin._parameters = layer._parameters.copy()
    twin._buffers = layer._buffers.copy()
    twin.training = layer.training
    twin._group = group
    return twin
