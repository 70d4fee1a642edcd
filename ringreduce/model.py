"""DistributedModel: a torch module whose backward() ends with the same gradients on every rank.

How is in attachment.py. Here is what users touch, and that it can be taken for the module itself.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ringreduce.attachment import Attachment, Join, Options
from ringreduce.codecs import Codec
from ringreduce.communicator import Communicator


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
    op: "avg"; or "sum", "min", "max", "prod". With those, and with compression, a reduced gradient
        cannot be accumulated onto: it takes `zero_grad()` between two reduced backwards.
    bucket_mb: size of a bucket, in units of 2**20 bytes: a run of gradients reduced as one message.
    first_bucket_mb: the same for the first one: smaller, to start early.
    sync_buffers: after each reduced backward in training mode, all ranks get rank 0's buffers.
    compression: "bf16" or "fp16": gradients of wider floats travel in 16 bits; they are summed in
        float32 and rounded once more. Or a Codec, one for each model.
    ignore: names of parameters and buffers to leave alone: neither broadcast nor reduced.
    comm: the ranks; default: all. The model talks on a communicator of its own, split off it.

    Construction is collective, and so is each backward() whose forward ran outside of `no_sync()`:
    all ranks must call it, and where one loss has several models, run their forwards in the same
    order. The loss must depend on what forward returned. `.grad` is then a view of a bucket, which
    the next reduced backward overwrites: clone it to keep it. Until backward returns it is this
    rank's: that is what a hook on a parameter sees. An optimizer that steps in one raises
    RingReduceError at the end of backward. What hooks registered later than this write to any
    `.grad` is not reduced.

    On a GPU `.grad` is final, when backward returns, for what the current stream is given next.

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
        compression: str | Codec | None = None,
        ignore: Collection[str] = (),
        comm: Communicator | None = None,
    ) -> None:
        super().__init__()
        options = Options(op, bucket_mb, first_bucket_mb, sync_buffers, compression, ignore)
        self._attachment = Attachment(module, options, comm)
        self.module = module  # last: from here on, unknown attributes are the module's
        self._attachment.connect()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        attachment = self._attachment
        attachment.before_forward()
        outputs = self.module(*args, **kwargs)
        attachment.after_forward(outputs)
        return outputs

    def no_sync(self) -> AbstractContextManager[None]:
        """A context: gradients of a forward within are accumulated on this rank alone.

        The next reduced backward reduces them too, also those of parameters that it does not use.
        Only where forward ran matters, not where backward() is called. All ranks must do the same.
        """
        return self._attachment.no_sync()

    def set_weight(self, weight: float | None) -> None:
        """Makes the mean a weighted one: sum of weight * gradient over ranks / sum of weights.

        weight: this rank's, 0 or above: of how many samples or tokens its loss is the mean; with 0,
        what its gradients are does not matter. If all weights are 0, so are the gradients. None:
        all ranks count the same again.

        It holds until it is set again, for each backward that begins after the call: set it before
        or after forward. All ranks must have weights, or none. It weighs all that backward reduces,
        what was accumulated under `no_sync()` included: there divide each loss by the number of
        samples in all of this rank's parts, and make that number the weight. No message is added;
        with gradients that travel as float16, one small one, when backward begins.

        Local. Raises ValueError for any other weight, and where op is not "avg".
        """
        self._attachment.set_weight(weight)

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """A context for a training loop that may be shorter on some ranks, or empty.

        A rank that leaves it takes part in the backwards of the others, with gradients of zero, or
        with what it accumulated under `no_sync()` and did not reduce. When all have left it, they
        get parameters and buffers of the first rank that had data to the end; `root` of what `with`
        gives (`as`) says which. Optimizers of the others missed steps: broadcast_optimizer_state
        from there, too, before training goes on. Entering and leaving are collective, and a
        backward begins with one small message more.

        divide_by_initial_world_size: True: averages are over all ranks; False: over those that have
            data. With weights, those alone decide.
        enable: False: the context does nothing.
        throw_on_early_termination: as soon as some ranks, but not all, are out of data, all raise
            RingReduceError: those at the end of the context, the others at their next forward. The
            small message then comes before each forward, as a SyncBatchNorm in it needs.

        Within it, no rank may unfreeze or convert parameters. Other collectives of the loop or of
        forward find no partners in ranks that left. Raises ValueError unless op
        is "avg" or "sum", RuntimeError within a join() of this or another model.
        """
        return self._attachment.join(
            divide_by_initial_world_size, enable, throw_on_early_termination
        )

    def stats(self) -> dict[str, Any]:
        """What communication has cost this rank since the model was wrapped.

        backwards: reduced ones. gradient_bytes: of gradients that were reduced, as they are in
        `.grad`; bytes: as they travel, compressed. Both with the padding of buckets.
        wait_s: seconds that backward() had to wait for communication at its end.
        communication_s: seconds from the moment when a bucket's turn had come, waiting for other
        ranks included, to its end, summed over buckets. hidden_s: how many of these had passed when
        backward had computed its last gradient. overlap: hidden_s / communication_s, 0 to 1: which
        part of communication backward has hidden; None before the first one. Buckets of a codec
        whose `reduce` returns no Work do not count in these three.
        buckets: how many. unused: names of the parameters that no rank had a gradient for in the
        last reduced backward. A world of one reduces nothing.
        On a GPU all times are the host's, for which a bucket has ended when it is launched: they
        do not tell what is hidden there.
        """
        return self._attachment.stats()

    def close(self) -> None:
        """Local: removes the hooks for good, leaves gradients as they are. Deletion does it too."""
        self._attachment.close()

    detach = close

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

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: which child's name is not part of others."""
        return {"": "module"}

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
        self._attachment.layout_touched = True
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
        self._attachment.layout_touched = True
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_attachment": self._attachment.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Not connected, and of the world."""
        super().__setstate__(state)
        self._attachment = Attachment(self.module, state["_attachment"], None)

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedModel:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._attachment.comm = self._attachment.comm
        return twin
