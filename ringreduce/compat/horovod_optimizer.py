"""DistributedOptimizer of horovod.torch: an optimizer whose step averages the gradients first.

All gradients are reduced together in step(), in one message for each dtype, in the order of the
parameters: what a rank's backward did or left out cannot confuse the others. To reduce during
backward use `ringreduce.DistributedModel`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ringreduce.compat.horovod_ops import check_op, scaled
from ringreduce.compat.horovod_types import Average, Compression, ProcessSet, global_process_set


def DistributedOptimizer(  # noqa: N802 (called like a class)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: str = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """The optimizer, which from now on must not be used itself, with a step that is collective.

    A parameter without a gradient counts as zero and gets one. Gradients are reduced as they are
    when step() or synchronize() is called, after however many backward passes, so
    backward_passes_per_step changes nothing, nor do num_groups and groups. Sparse gradients travel
    dense. gradient_predivide_factor: divides before the average, multiplies after it.
    """
    op = check_op(op)
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor needs op=Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be above 0")
    if named_parameters is not None:
        _check_names(optimizer, list(named_parameters))
    kind = type(optimizer)
    wrapped: Any = object.__new__(type(kind.__name__, (_SynchronizingMixin, kind), {}))
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped.__dict__.pop("step", None)  # a scheduler's wrapper, around the other step
    wrapped._compression, wrapped._op, wrapped._process_set = compression, op, process_set
    wrapped._predivide_factor = gradient_predivide_factor
    wrapped._synchronized, wrapped._step_synchronizes = False, True
    return wrapped


def _check_names(
    optimizer: torch.optim.Optimizer, named_parameters: list[tuple[str, Tensor]]
) -> None:
    if any(not isinstance(pair, tuple) for pair in named_parameters):
        raise ValueError("named_parameters must be (name, parameter): model.named_parameters()")
    twice = [name for name, n in Counter(name for name, _ in named_parameters).items() if n > 1]
    if twice:
        raise ValueError(f"named_parameters has names twice: {', '.join(twice)}")
    named = {id(x) for _, x in named_parameters}
    if any(id(x) not in named for group in optimizer.param_groups for x in group["params"]):
        raise ValueError("named_parameters lacks parameters of the optimizer")


class _SynchronizingMixin:
    param_groups: list[dict[str, Any]]
    _compression: Any
    _op: str
    _process_set: ProcessSet
    _predivide_factor: float
    _synchronized: bool
    _step_synchronizes: bool

    def synchronize(self) -> None:
        """Collective: reduces the gradients now, for example to clip them before step()."""
        self._synchronized = True
        if not self._process_set.included() or self._process_set.size() == 1:
            return
        parameters = [x for group in self.param_groups for x in group["params"] if x.requires_grad]
        with torch.no_grad():
            dense = [self._dense_grad(x) for x in parameters]
            packed = [self._compression.compress(grad) for grad in dense]
            sent = [scaled(x, 1.0 / self._predivide_factor) for x, _ in packed]
            self._process_set.comm.grouped_allreduce_(sent, self._op)
            for parameter, grad, x, (_, context) in zip(
                parameters, dense, sent, packed, strict=True
            ):
                x = self._compression.decompress(scaled(x, self._predivide_factor), context)
                if x is not grad:
                    grad.copy_(x)
                if parameter.grad.is_sparse:
                    parameter.grad = grad.to_sparse()

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within, step() only steps: after a synchronize() of one's own."""
        self._step_synchronizes = False
        try:
            yield
        finally:
            self._step_synchronizes = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._step_synchronizes:
            if self._synchronized:
                warnings.warn(
                    "step() reduces the gradients again after synchronize(): call it within "
                    "optimizer.skip_synchronize()",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        return super().step(closure)  # type: ignore[misc]

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes nothing: see DistributedOptimizer."""

    def _dense_grad(self, parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
