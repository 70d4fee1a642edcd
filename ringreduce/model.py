"""DistributedModel: a torch module whose backward() ends with the same gradients on every rank.

What the ranks must agree on is in agreement.py, how gradients are reduced in gradients.py, in which
portions in buckets.py. Here is what users touch, and that it can be taken for the module itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils._pytree import tree_flatten

from ringreduce import _core
from ringreduce.agreement import Buffers, agree, broadcast_model, check_names, check_parameters
from ringreduce.buckets import Bucket, plan_buckets, trainable
from ringreduce.collectives import communicator_of
from ringreduce.communicator import Communicator
from ringreduce.gradients import GradientReducer, Totals

BYTES_PER_MB = 2**20


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments, on which all ranks agree."""

    op: str
    bucket_mb: float
    first_bucket_mb: float
    sync_buffers: bool
    compression: str | None
    ignore: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.op not in _core.OPS:
            raise ValueError(f"op {self.op!r} is none of {', '.join(_core.OPS)}")
        for name in ("bucket_mb", "first_bucket_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.compression is not None:
            raise ValueError(f"compression={self.compression!r}: there is only None so far")


class DistributedModel(nn.Module):
    """Averages the gradients of a module over all ranks, during backward().

    Use it in place of the module. Gradients are reduced in the background while backward() goes on;
    when it returns, every `.grad` is final and bitwise the same on all ranks, so clipping, scaling
    and stepping need nothing more. Parameters that a rank or all ranks did not use need no flag: a
    rank that did not use one counts as a zero gradient; what nobody used keeps its `.grad`, None or
    not.

    module: with the same parameters and buffers (names, shapes, dtypes, strides, requires_grad) on
        all ranks. They get rank 0's values. Parameters may be frozen and unfrozen later, on all
        ranks alike; change the module in any other way before it is wrapped.
    op: "avg"; or "sum", "min", "max", "prod". With those a reduced gradient cannot be accumulated
        onto: it takes `zero_grad()` between two reduced backwards.
    bucket_mb: size of a bucket, in units of 2**20 bytes: a run of gradients reduced as one message.
    first_bucket_mb: the same for the first one: smaller, to start early.
    sync_buffers: after each reduced backward in training mode, all ranks get rank 0's buffers.
    compression: None, for now.
    ignore: names of parameters and buffers to leave alone: neither broadcast nor reduced.
    comm: the ranks; default: all. The model talks on a communicator of its own, split off it.

    Construction is collective, and so is each backward() whose forward ran outside of `no_sync()`:
    all ranks must call it. The loss must depend on what forward returned. `.grad` is then a view of
    a bucket, which the next reduced backward overwrites: clone it to keep it.

    Attributes and methods that are not its own are the module's, for reading and writing, and so
    are the names in `state_dict()` and `named_parameters()`. A copy (deepcopy, pickle) is connected
    by its first forward with gradients enabled, which is collective like construction.

    Raises MismatchError, on all ranks, naming the first difference between them; ValueError for a
    module without trainable parameters or with lazy ones, and for bad arguments.
    """

    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        *,
        op: str = "avg",
        bucket_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        sync_buffers: bool = True,
        compression: str | None = None,
        ignore: Collection[str] = (),
        comm: Communicator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        names = (ignore,) if isinstance(ignore, str) else tuple(sorted(ignore))
        self._options = _Options(op, bucket_mb, first_bucket_mb, sync_buffers, compression, names)
        self._parent = comm  # None: the world, which a copy elsewhere has too
        self._totals = Totals()
        self._syncing = True
        self._connected = False
        self._closed = False
        self._layout_touched = False
        self._reducer: GradientReducer | None = None  # None in a world of one, too
        self._frozen: list[nn.Parameter] = []
        self._finalizer: weakref.finalize | None = None
        self.module = module  # last: from here on, unknown attributes are the module's
        self._connect()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if not self._connected and not self._closed:
            self._connect()
        if self._reducer is not None:
            self._reducer.recover()
            if self._syncing and self._is_outdated(self._reducer):
                self._build(self._reducer.comm, self._reducer)
        outputs = self.module(*args, **kwargs)
        if self._reducer is not None:
            self._reducer.watch(_tensors_in(outputs), self._syncing)
        return outputs

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a forward within are accumulated on this rank alone.

        The next reduced backward reduces them too, also those of parameters that it does not use.
        Only where forward ran matters, not where backward() is called. All ranks must do the same.
        """
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def stats(self) -> dict[str, Any]:
        """What communication has cost this rank since the model was wrapped.

        backwards: reduced ones. bytes: of gradients that were reduced. wait_s: seconds that
        backward() had to wait for communication at its end. buckets: how many. unused: names of the
        parameters that no rank had a gradient for in the last reduced backward. A world of one
        reduces nothing.
        """
        reducer = self._reducer
        buckets, unused = (0, []) if reducer is None else (len(reducer.plan), reducer.unused)
        return {**dataclasses.asdict(self._totals), "buckets": buckets, "unused": unused}

    def close(self) -> None:
        """Local: removes the hooks for good, leaves gradients as they are. Deletion does it too."""
        if self._finalizer is not None:
            self._finalizer()
        self._reducer = None
        self._closed = True

    detach = close

    # ---- Connecting to the other ranks.

    def _connect(self) -> None:
        """Collective over the parent: makes one model of all ranks'."""
        ignore = self._options.ignore
        check_names(self.module, ignore)
        parent = communicator_of(self._parent)
        if parent.size == 1:
            check_parameters(self.module, ignore)
        else:
            comm = parent.split(0)
            assert comm is not None
            try:
                agree(comm, self.module, ignore, self._options)
                check_parameters(self.module, ignore)  # after it: all ranks raise if one does
                broadcast_model(comm, self.module, ignore)
                self._build(comm)
            except BaseException:
                comm.close()
                raise
        self._connected = True

    def _build(self, comm: Communicator, previous: GradientReducer | None = None) -> None:
        """Collective: plans the buckets and sets the hooks, in place of the previous ones."""
        options = self._options
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
            buffers.broadcast if options.sync_buffers else _nothing,
            self._totals,
            previous,
        )
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
        options = self._options
        return plan_buckets(
            parameters, options.first_bucket_mb * BYTES_PER_MB, options.bucket_mb * BYTES_PER_MB
        )

    def _is_outdated(self, reducer: GradientReducer) -> bool:
        """Whether parameters were unfrozen, converted or replaced since they were planned."""
        if any(parameter.requires_grad for parameter in self._frozen):
            return True
        if not self._layout_touched:
            return False
        self._layout_touched = False
        parameters = trainable(self.module, self._options.ignore)
        return not (reducer.holds(parameters) and reducer.plan == self._plan(parameters))

    # ---- Being taken for the module.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not set yet
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or name == "module" or hasattr(type(self), name)
        if own or "module" not in self.__dict__.get("_modules", ()):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The module's; torch derives the names of parameters and buffers from it."""
        return self.module.named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """The module's. The names may all begin with "module.", as other wrappers write them."""
        prefixed = bool(state_dict) and all(name.startswith("module.") for name in state_dict)
        if prefixed and "module" not in self.module._modules:
            metadata = getattr(state_dict, "_metadata", None)
            state_dict = OrderedDict(state_dict)
            if metadata is not None:
                state_dict._metadata = copy.copy(metadata)  # type: ignore[attr-defined]
            consume_prefix_in_state_dict_if_present(state_dict, "module.")
        self._layout_touched = True
        return self.module.load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """When a module around this loads: torch looks for "module.", which state_dict left out."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}module.{name[len(prefix) :]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Behind .to(), .half() and the like."""
        self._layout_touched = True
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        unconnected: dict[str, Any] = {
            "_parent": None,
            "_totals": Totals(),
            "_connected": False,
            "_reducer": None,
            "_frozen": [],
            "_finalizer": None,
        }
        return self.__dict__ | unconnected

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedModel:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._parent = self._parent
        return twin


def _disconnect(reducer: GradientReducer) -> None:
    reducer.close()
    reducer.comm.close()


def _nothing() -> None:
    """Where buffers are not synchronised."""


def _tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dicts and dataclasses, nested in any way."""
    if isinstance(structure, Tensor):
        yield structure
        return
    for leaf in tree_flatten(structure)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors_in(getattr(leaf, field.name))
