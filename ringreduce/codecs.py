"""How a bucket of gradients travels: as it is, in 16 bits, or as a user's own class has it.

A codec sees one bucket at a time and knows nothing of parameters, hooks and backward.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ringreduce.communicator import Communicator


class Pending(Protocol):
    """A reduction under way, as a Work is."""

    def wait(self) -> object:
        """Returns when the bucket holds the result, the same on all ranks.

        On a GPU: when the caller's current stream will, at what it is given next.
        """
        ...


class Codec:
    """Base of all codecs: gradients travel as they are.

    Override `wire_dtype` to have them cast on their way into the bucket, and back on their way out;
    `reduce` for anything else. A model calls `reduce` for its buckets in the same order on all
    ranks, one after the other without waiting in between, and waits for each at the end. What a
    codec has to remember of a bucket from one backward to the next, it keeps under its index.

    name: how ranks compare codecs, and what messages say; by default the class's. Let it hold all
        arguments that ranks must agree on.
    lossless: whether the average of gradients that are averaged already is the same again. If not,
        a reduced gradient cannot be accumulated onto: it takes `zero_grad()` in between.
    """

    lossless = False

    @property
    def name(self) -> str:
        return type(self).__qualname__

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients of this dtype lie in the bucket that `reduce` gets."""
        return dtype

    def reduce(
        self, comm: Communicator, bucket: Tensor, op: str, index: int
    ) -> tuple[Pending, int]:
        """Starts to reduce a bucket in place, over all ranks. Collective.

        bucket: 1-d, of `wire_dtype`, in symmetric memory, where the gradients are. op: "sum",
        "avg", "min", "max", "prod". index: of the bucket in the model. Returns what to wait for,
        and how many bytes of this rank's go into it.
        """
        return comm.allreduce_(bucket, op, async_op=True), bucket.nbytes


class Plain(Codec):
    """No compression."""

    lossless = True


class Cast(Codec):
    """Rounds real gradients to a narrower float. Sums are made in float32 and rounded once.

    Infinities and NaN stay what they are, and what is too large for float16 becomes infinite: a
    GradScaler notices.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: torch.bfloat16 or torch.float16."""
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"a Cast is to bfloat16 or float16, not to {dtype}")
        self._dtype = dtype

    @property
    def name(self) -> str:
        return f"Cast({self._dtype})"

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        wider = dtype.is_floating_point and dtype.itemsize > self._dtype.itemsize
        return self._dtype if wider else dtype


NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def codec_of(compression: str | Codec | None) -> Codec:
    """What the argument `compression` stands for. Raises ValueError or TypeError."""
    if compression is None:
        return Plain()
    if isinstance(compression, Codec):
        return compression
    if isinstance(compression, str):
        if compression not in NAMED:
            names = ", ".join(repr(name) for name in NAMED)
            raise ValueError(f"compression {compression!r} is none of {names}, None, or a Codec")
        return Cast(NAMED[compression])
    raise TypeError(f"compression must be a name, a Codec or None, not {compression!r}")
