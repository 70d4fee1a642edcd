"""What makes the ranks' copies of a module one model: attach() adds it to a module.

DistributedModel is one wrapped around a module. What ranks must agree on is in agreement.py, how
gradients are reduced in gradients.py, in which portions in buckets.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import threading
import weakref
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ringreduce import _core
from ringreduce.agreement import Buffers, agree, broadcast_model, check_names, check_parameters
from ringreduce.buckets import Bucket, plan_buckets, trainable
from ringreduce.codecs import Codec, codec_of
from ringreduce.collectives import communicator_of
from ringreduce.communicator import Communicator
from ringreduce.costs import Totals
from ringreduce.gradients import GradientReducer, reducers_of
from ringreduce.join import RollCall

BYTES_PER_MB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of DistributedModel, on which all ranks agree."""

    op: str = "avg"
    bucket_mb: float = 25.0
    first_bucket_mb: float = 1.0
    sync_buffers: bool = True
    compression: str | Codec | None = None
    ignore: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.op not in _core.OPS:
            raise ValueError(f"op {self.op!r} is none of {', '.join(_core.OPS)}")
        for name in ("bucket_mb", "first_bucket_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        names = (self.ignore,) if isinstance(self.ignore, str) else tuple(sorted(self.ignore))
        object.__setattr__(self, "ignore", names)
        object.__setattr__(self, "compression", codec_of(self.compression))

    @property
    def codec(self) -> Codec:
        assert isinstance(self.compression, Codec)
        return self.compression

    def __str__(self) -> str:
        """The same on all ranks where the options are."""
        return str(vars(self) | {"compression": self.codec.name})


class Attachment:
    """The gradients of a module are reduced over all ranks, during backward().

    `attach` makes one. Its methods are those of DistributedModel.
    """

    def __init__(self, module: nn.Module, options: Options, comm: Communicator | None) -> None:
        """Local; connect() follows. comm: None is the world, which a copy elsewhere has too."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        self.module = module
        self.options = options
        self.comm = comm
        self.layout_touched = False  # whether parameters may have been converted or replaced
        self._totals = Totals()
        self._syncing = True
        self._weight: float | None = None
        self._connected = False
        self._closed = False
        self._reducer: GradientReducer | None = None  # None in a world of one, too
        self._frozen: list[nn.Parameter] = []
        self._finalizer: weakref.finalize | None = None

    # ---- Around forward.

    def before_forward(self) -> None:
        """Collective the first time, in a join that is to end early, and where parameters were
        unfrozen, converted or replaced.
        """
        if not torch.is_grad_enabled():
            return
        if not self._connected and not self._closed:
            self.connect()
        if self._reducer is not None:
            self._reducer.recover()
            self._reducer.meet()
            if self._syncing and self._is_outdated(self._reducer):
                self._build(self._reducer.comm, self._reducer)

    def after_forward(self, outputs: Any) -> None:
        """Local."""
        if self._reducer is not None and torch.is_grad_enabled():
            self._reducer.watch(_tensors_in(outputs), self._syncing)

    # ---- For users: documented in model.py.

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedModel.no_sync."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def set_weight(self, weight: float | None) -> None:
        """As DistributedModel.set_weight."""
        if weight is not None:
            if self.options.op != "avg":
                raise ValueError(f"weights are for op 'avg': op '{self.options.op}' has none")
            weight = float(weight)
            if not 0 <= weight < math.inf:
                raise ValueError(f"a weight is a finite number, 0 or above, not {weight}")
        self._weight = weight
        if self._reducer is not None:
            self._reducer.weight = weight

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """As DistributedModel.join."""
        if self.options.op not in ("avg", "sum"):
            raise ValueError(f"join is for op 'avg' or 'sum', not '{self.options.op}'")
        by_present = not divide_by_initial_world_size and self.options.op == "avg"
        return Join(self, enable, by_present, throw_on_early_termination)

    def stats(self) -> dict[str, Any]:
        """As DistributedModel.stats."""
        reducer = self._reducer
        buckets, unused = (0, []) if reducer is None else (len(reducer.plan), reducer.unused)
        totals = dataclasses.asdict(self._totals) | {"overlap": self._totals.overlap}
        return totals | {"buckets": buckets, "unused": unused}

    def close(self) -> None:
        """As DistributedModel.close."""
        if self._finalizer is not None:
            self._finalizer()
        self._reducer = None
        self._closed = True

    # ---- Connecting to the other ranks.

    def connect(self) -> None:
        """Collective over comm: makes one model of all ranks'."""
        ignore = self.options.ignore
        for reducer in reducers_of(self.module):  # ranks that still wait there cannot come here
            reducer.recover()
        check_names(self.module, ignore)
        parent = communicator_of(self.comm)
        if parent.size == 1:
            check_parameters(self.module, ignore)
        else:
            comm = parent.split(0)
            assert comm is not None
            try:
                agree(comm, self.module, ignore, self.options)
                check_parameters(self.module, ignore)  # after it: all ranks raise if one does
                broadcast_model(comm, self.module, ignore)
                self._build(comm)
            except BaseException:
                comm.close()
                raise
        self._connected = True

    def _build(self, comm: Communicator, previous: GradientReducer | None = None) -> None:
        """Collective: plans the buckets and sets the hooks, in place of the previous ones."""
        options = self.options
        if previous is not None:
            agree(comm, self.module, options.ignore, options)
            previous.close()
        parameters = trainable(self.module, options.ignore)
        buffers = Buffers(comm, self.module, options.ignore)
        self._reducer = GradientReducer(
            comm,
            options.op,
            dict(parameters),
            self._plan(parameters),
            options.codec,
            buffers.broadcast if options.sync_buffers else _nothing,
            self._totals,
            previous,
        )
        self._reducer.weight = self._weight
        self._frozen = [
            parameter
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad and name not in options.ignore
        ]
        if self._finalizer is not None:
            self._finalizer.detach()
        # The hooks keep the reducer alive, but not this: where it goes, they go.
        self._finalizer = weakref.finalize(self, _disconnect, self._reducer)

    def _plan(self, parameters: list[tuple[str, nn.Parameter]]) -> list[Bucket]:
        first_bytes, bucket_bytes = (
            megabytes * BYTES_PER_MB
            for megabytes in (self.options.first_bucket_mb, self.options.bucket_mb)
        )
        return plan_buckets(parameters, first_bytes, bucket_bytes)

    def _is_outdated(self, reducer: GradientReducer) -> bool:
        """Whether parameters were unfrozen, converted or replaced since they were planned."""
        if any(parameter.requires_grad for parameter in self._frozen):
            return True
        if not self.layout_touched:
            return False
        self.layout_touched = False
        parameters = trainable(self.module, self.options.ignore)
        return not (reducer.holds(parameters) and reducer.plan == self._plan(parameters))


_joining = threading.local()  # open: whether this thread is within a join() of any model


class Join:
    """What `model.join()` returns: a context within which ranks may run out of data.

    root: after it, the first of the ranks that had data to the end, whose values all have got.
    """

    def __init__(self, attachment: Attachment, enable: bool, by_present: bool, strict: bool):
        self.root = 0
        self._attachment = attachment
        self._enable = enable
        self._by_present = by_present
        self._strict = strict
        self._open = False

    def __enter__(self) -> Join:
        attachment = self._attachment
        if self._enable and not attachment._connected and not attachment._closed:
            attachment.connect()
        reducer = attachment._reducer
        if self._enable and reducer is not None:
            if getattr(_joining, "open", False):
                raise RuntimeError(
                    "join() within join(): a rank without data would not know which model's "
                    "backward is the others' next. Make one module of the models, and wrap that"
                )
            _joining.open = self._open = True
            reducer.roll_call = RollCall(reducer.comm, self._by_present, self._strict)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        _joining.open = self._open = False
        reducer = self._attachment._reducer
        if reducer is None or reducer.roll_call is None:  # closed meanwhile
            return
        try:
            if kind is None:
                self._accompany(reducer, reducer.roll_call)
        finally:
            reducer.roll_call = None

    def _accompany(self, reducer: GradientReducer, roll_call: RollCall) -> None:
        reducer.recover()
        while reducer.shadow():
            pass
        self.root = roll_call.here[0]
        attachment = self._attachment
        # Even where all left at once: steps after the last reduced backward may differ.
        broadcast_model(reducer.comm, attachment.module, attachment.options.ignore, self.root)


def attach(
    module: nn.Module,
    *,
    op: str = "avg",
    bucket_mb: float = 25.0,
    first_bucket_mb: float = 1.0,
    sync_buffers: bool = True,
    compression: str | Codec | None = None,
    ignore: Collection[str] = (),
    comm: Communicator | None = None,
) -> Attachment:
    """DistributedModel without a wrapper: the module stays what it is, and is used as before.

    The arguments, what is collective and what raises are DistributedModel's. Returns a handle with
    its methods `no_sync`, `join`, `set_weight`, `stats` and `close`. It lives as long as the
    module; close() undoes it. A copy of the module (deepcopy, pickle) is not attached.
    """
    options = Options(op, bucket_mb, first_bucket_mb, sync_buffers, compression, ignore)
    handle = _Handle(module, options, comm)
    handle.connect()
    handle.hook()
    return handle


class _Handle(Attachment):
    """Attached by hooks on the module's forward."""

    def __init__(self, module: nn.Module, options: Options, comm: Communicator | None) -> None:
        super().__init__(module, options, comm)
        self._hooks: list[Any] = []

    def hook(self) -> None:
        before, after = _Hook(self, "_begin"), _Hook(self, "_end")
        self._hooks = [
            self.module.register_forward_pre_hook(before, prepend=True),
            self.module.register_forward_hook(after),
        ]
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not look whether hooks have come since

    def close(self) -> None:
        """As DistributedModel.close."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().close()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.layout_touched = True  # nothing else tells whether the module was converted
        self.before_forward()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.after_forward(outputs)


class _Hook:
    """A method of a handle; of none in a copy."""

    def __init__(self, handle: _Handle | None, method: str) -> None:
        self._method = method
        self._run = None if handle is None else getattr(handle, method)

    def __call__(self, *args: Any) -> None:
        if self._run is not None:
            self._run(*args)

    def __reduce__(self) -> Any:
        return _Hook, (None, self._method)


def _disconnect(reducer: GradientReducer) -> None:
    reducer.close()
    reducer.comm.close()


def _nothing(root: int) -> None:
    """Where buffers are not synchronised."""


def _tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dicts and dataclasses, nested in any way."""
    seen: set[int] = set()  # dataclasses: their fields may lead back to them, or not be set
    left = [structure]
    while left:
        for leaf in tree_flatten(left.pop())[0]:
            if isinstance(leaf, Tensor):
                yield leaf
            elif dataclasses.is_dataclass(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                left += [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
