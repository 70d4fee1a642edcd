"""DistributedOptimizer of horovod.torch: an optimizer whose step averages the gradients first.

Gradients are reduced in groups, in place, while backward goes on: a group when all of its gradients
are there, and after the groups before it. What is missing then is sent by step(), zeros for what
this rank has not used. Groups are the same on all ranks, and so is their order.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ringreduce.buckets import plan_buckets
from ringreduce.compat.horovod_ops import (
    Handle,
    check_op,
    grouped_allreduce_async_,
    scaled,
    synchronize,
)
from ringreduce.compat.horovod_types import Average, Compression, ProcessSet, global_process_set

FIRST_GROUP_BYTES, GROUP_BYTES = 2**20, 25 * 2**20  # those of DistributedModel


def DistributedOptimizer(  # noqa: N802 (called like a class)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: str = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """The optimizer, which from now on must not be used itself, with a step that is collective.

    A parameter without a gradient counts as zero and gets one. backward_passes_per_step: after how
    many gradients a parameter is reduced. groups: how many, or lists of the parameters to be
    reduced together; by default as large as suits. Sparse gradients travel dense in any case.
    gradient_predivide_factor: divides before the average, multiplies after it.

    Raises ValueError for wrong arguments; in backward(), if a gradient comes after its parameter is
    reduced; and in zero_grad(), if gradients are being reduced. All need step() or synchronize().
    """
    op = check_op(op)
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor needs op=Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be above 0")
    if groups is None:
        groups = num_groups or None
    _check_groups(groups)
    names = _names(optimizer, named_parameters)
    kind = type(optimizer)
    if issubclass(kind, _SynchronizingMixin):
        raise ValueError("this is a DistributedOptimizer already")
    wrapped: Any = object.__new__(type(kind.__name__, (_SynchronizingMixin, kind), {}))
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped.__dict__.pop("step", None)  # a scheduler's wrapper, around the other step
    wrapped._parameter_names = names
    wrapped._passes = backward_passes_per_step
    wrapped._synchronized, wrapped._step_synchronizes = False, True
    wrapped._reduction = _Reduction(
        names, groups, compression, op, gradient_predivide_factor, process_set
    )
    wrapped._reduction.hook(wrapped)
    return wrapped


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    """Of all parameters of the optimizer."""
    if named_parameters is None:
        return {
            x: f"group {i} parameter {j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, x in enumerate(group["params"])
        }
    pairs = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in pairs):
        raise ValueError("named_parameters must be (name, parameter): model.named_parameters()")
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"named_parameters has names twice: {', '.join(twice)}")
    names = {x: name for name, x in pairs}
    mine = [x for group in optimizer.param_groups for x in group["params"]]
    if any(x not in names for x in mine):
        raise ValueError("named_parameters lacks parameters of the optimizer")
    return {x: names[x] for x in mine}


def _check_groups(groups: Any) -> None:
    if groups is None or (isinstance(groups, int) and groups >= 0):
        return
    if not isinstance(groups, (list, tuple)):
        raise ValueError("groups must be a number, 0 or above, or a list of lists of parameters")
    members = [x for group in groups for x in group]
    if any(not isinstance(x, Tensor) for x in members):
        raise ValueError("groups must consist of parameters")
    if len(set(members)) < len(members):
        raise ValueError("groups has a parameter twice")


class _Group:
    """Parameters whose gradients travel together."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.missing: set[Tensor] = set()
        self.sent: list[Tensor] = []  # parameters, those that required a gradient
        self.packed: list[tuple[Tensor, Any]] = []  # their gradients, compressed
        self.handle: Handle | None = None


class _Reduction:
    """The gradients of one optimizer on their way."""

    def __init__(
        self,
        names: dict[Tensor, str],
        groups: int | Sequence[Sequence[Tensor]] | None,
        compression: Any,
        op: str,
        predivide_factor: float,
        process_set: ProcessSet,
    ) -> None:
        self.active = process_set.included() and process_set.size() > 1
        self.counts: Counter[Tensor] = Counter()  # gradients since the last synchronize
        self._compression, self._op = compression, op
        self._predivide_factor = predivide_factor
        self._process_set = process_set
        self._groups = [_Group(members) for members in _plan(names, groups)]
        self._group_of = {x: group for group in self._groups for x in group.parameters}
        self._next = 0  # group to send
        self._number = process_set.count_optimizer()
        self._start()

    @property
    def under_way(self) -> bool:
        return bool(self.counts)

    def _start(self) -> None:
        self._next = 0
        self.counts.clear()
        for group in self._groups:
            group.missing = {x for x in group.parameters if x.requires_grad}
            group.handle = None

    def hook(self, optimizer: _SynchronizingMixin) -> None:
        if not self.active:
            return
        # A hook lives as long as its parameter, and must not keep the optimizer.
        owner = weakref.ref(optimizer)

        def count(parameter: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None:
                self._count(parameter, optimizer._passes)

        handles = [
            x.register_post_accumulate_grad_hook(count) for x in self._group_of if x.requires_grad
        ]
        weakref.finalize(optimizer, lambda: [handle.remove() for handle in handles])

    def _count(self, parameter: Tensor, passes: int) -> None:
        """During backward: a gradient has come."""
        group = self._group_of[parameter]
        if group.handle is not None:
            raise ValueError(
                f"a gradient came after backward_passes_per_step={passes} of them had been reduced:"
                " call step() or synchronize() before, or raise backward_passes_per_step"
            )
        self.counts[parameter] += 1
        if self.counts[parameter] == passes:
            group.missing.discard(parameter)
            while self._next < len(self._groups) and not self._groups[self._next].missing:
                self._send_next()

    def _send_next(self) -> None:
        group = self._groups[self._next]
        with torch.no_grad():
            group.sent = [x for x in group.parameters if x.requires_grad]
            group.packed = [self._compression.compress(_dense_grad(x)) for x in group.sent]
            tensors = [scaled(x.detach(), 1.0 / self._predivide_factor) for x, _ in group.packed]
        name = f"gradients {self._number}.{self._next}"
        group.handle = grouped_allreduce_async_(
            tensors, name=name, op=self._op, process_set=self._process_set
        )
        self._next += 1

    def finish(self, parameters: Iterable[Tensor]) -> None:
        """Collective. parameters: all of the optimizer. Those that are new get a group."""
        later = [x for x in parameters if x.requires_grad and x not in self._group_of]
        if later:
            self._groups.append(_Group(later))
            self._group_of.update(dict.fromkeys(later, self._groups[-1]))
        while self._next < len(self._groups):
            self._send_next()
        with torch.no_grad():
            for group in self._groups:
                assert group.handle is not None
                reduced = synchronize(group.handle)
                for parameter, x, (_, context) in zip(
                    group.sent, reduced, group.packed, strict=True
                ):
                    x = scaled(x, self._predivide_factor)
                    self._publish(parameter, self._compression.decompress(x, context))
                group.sent, group.packed = [], []
        self._start()

    def _publish(self, parameter: Tensor, grad: Tensor) -> None:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = grad.to_sparse()
        elif parameter.grad.data_ptr() != grad.data_ptr():
            parameter.grad.copy_(grad)


def _plan(
    names: dict[Tensor, str], groups: int | Sequence[Sequence[Tensor]] | None
) -> list[list[Tensor]]:
    """Parameters in groups, in the order in which backward tends to come to them."""
    trainable = [x for x in names if x.requires_grad]
    if not groups:
        by_name = {name: x for x, name in names.items()}
        plan = plan_buckets([(names[x], x) for x in trainable], FIRST_GROUP_BYTES, GROUP_BYTES)
        return [[by_name[place.name] for place in bucket.places] for bucket in plan]
    if isinstance(groups, int):
        size = -(-len(trainable) // groups)
        return [trainable[i : i + size] for i in range(0, len(trainable), size)][::-1]
    known = set(trainable)
    given = [[x for x in group if x in known] for group in groups]
    known.difference_update(x for group in given for x in group)
    given += [[x] for x in trainable if x in known]
    order = {x: i for i, x in enumerate(trainable)}
    return sorted(filter(None, given), key=lambda group: -min(order[x] for x in group))


def _dense_grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


class _SynchronizingMixin:
    param_groups: list[dict[str, Any]]
    _parameter_names: dict[Tensor, str]
    _reduction: _Reduction
    _passes: int
    _synchronized: bool
    _step_synchronizes: bool

    def synchronize(self) -> None:
        """Collective: the gradients are reduced when it returns, for example to be clipped."""
        self._synchronized = True
        if self._reduction.active:
            parameters = [x for group in self.param_groups for x in group["params"]]
            self._reduction.finish(parameters)

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
                    "optimizer.step() called without optimizer.skip_synchronize(), after "
                    "synchronize(): it reduces the gradients again",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        return super().step(closure)  # type: ignore[misc]

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self._reduction.under_way:
            raise ValueError(
                "zero_grad() while gradients are being reduced: call step() or synchronize() first"
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def set_backward_passes_per_step(self, passes: int) -> None:
        self._passes = passes
