"""Which gradients are reduced together: the bucket layout, a pure function of the model.

The same model gives the same layout on every rank and in every run: nothing here depends on what
happened before. It allocates nothing and knows no communicator.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALIGNMENT_BYTES = 64  # of each gradient in its bucket: a cache line, and any vector register


@dataclass(frozen=True)
class Place:
    """Where the gradient of one parameter lies in its bucket."""

    name: str
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements; the parameter's where it is dense: channels_last stays so

    def view(self, flat: Tensor) -> Tensor:
        """The gradient, in the memory of the whole bucket."""
        return flat.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Bucket:
    """A run of gradients that one message reduces."""

    dtype: torch.dtype
    device: torch.device
    places: tuple[Place, ...]  # in the order in which backward tends to finish them
    length: int  # elements, padding included

    @property
    def size_bytes(self) -> int:
        return self.length * self.dtype.itemsize


def trainable(module: nn.Module, ignore: Collection[str] = ()) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter, in registration order, of those that require grad; a shared one once.

    ignore: names to leave out, any of the names of a shared one.
    """
    ignored = {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in ignore
    }
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in ignored
    ]


def plan_buckets(
    parameters: Sequence[tuple[str, Tensor]], first_bytes: float, bucket_bytes: float
) -> list[Bucket]:
    """The buckets in the order in which they are reduced.

    parameters: name and parameter in registration order. Backward finishes gradients roughly in
    the reverse of it, so buckets are filled backwards, one open for each dtype and device, and
    reduced in the order of their last gradients. A bucket holds at most bucket_bytes bytes, or one
    larger gradient; until one is full, first_bytes, so that communication starts early.
    """
    filled: list[_Filling] = []
    open_by_kind: dict[tuple[torch.dtype, torch.device], _Filling] = {}
    for position, (name, parameter) in enumerate(reversed(parameters)):
        kind = (parameter.dtype, parameter.device)
        filling = open_by_kind.setdefault(kind, _Filling(*kind))
        if filling.places and filling.end_bytes(parameter) > (
            bucket_bytes if filled else first_bytes
        ):
            filled.append(filling)
            filling = open_by_kind[kind] = _Filling(*kind)
        filling.add(name, parameter, position)
    filled.extend(open_by_kind.values())
    return [filling.bucket() for filling in sorted(filled, key=lambda filling: filling.last)]


@dataclass
class _Filling:
    """A bucket that is still open."""

    dtype: torch.dtype
    device: torch.device
    places: list[Place] = field(default_factory=list)
    length: int = 0  # elements; a multiple of the alignment
    last: int = 0  # position of the latest parameter

    def end_bytes(self, parameter: Tensor) -> int:
        """Size with one more gradient."""
        return (self.length + parameter.numel()) * self.dtype.itemsize

    def add(self, name: str, parameter: Tensor, position: int) -> None:
        # torch keeps the strides of what is dense, else it makes dense ones of the same order.
        strides = torch.empty_like(parameter, device="meta").stride()
        self.places.append(Place(name, self.length, tuple(parameter.shape), tuple(strides)))
        step = max(1, ALIGNMENT_BYTES // self.dtype.itemsize)
        self.length += -(-parameter.numel() // step) * step
        self.last = position

    def bucket(self) -> Bucket:
        return Bucket(self.dtype, self.device, tuple(self.places), self.length)
