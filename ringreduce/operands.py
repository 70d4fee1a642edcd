"""What a message is made of, as the core takes it: checked ops, described tensors, packed ones.

The core moves what is strided on the CPU by itself, but only contiguous memory of a GPU. There the
tensors' own library copies what is strided, and what is to travel together, before and after the
call, on the caller's current stream; nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from ringreduce import _core, tensors
from ringreduce.arrays import DTYPE_NAMES, Array, DeviceFramework

OP_INDEX = {
    (op, dtype): op_index
    for op, op_index in _core.OPS.items()
    for dtype in _core.DTYPES.values()
    if _core.supports(op_index, dtype)
}

# Streams that stand for "the default one", which waits for all others of its device.
DEFAULT_STREAMS = (0, 1, 2)


def operand(source: Array, target: Array | None) -> tuple:
    if target is None:
        return source.address, 0, source.shape, source.strides, None
    return source.address, target.address, source.shape, source.strides, target.strides


def check_op(op: str, dtype: int) -> int:
    try:
        return OP_INDEX[op, dtype]
    except (KeyError, TypeError):
        if op in tuple(_core.OPS):
            name = DTYPE_NAMES[dtype]
            raise TypeError(
                f"op {op!r} is not defined for {name}: use another op or dtype"
            ) from None
        raise ValueError(f"op must be one of {', '.join(_core.OPS)}, not {op!r}") from None


def check_group_op(op: str, arrays: list[Array]) -> int:
    for array in arrays:
        check_op(op, array.dtype)
    return check_op(op, _core.DTYPES["float64"])  # which has every op: the list may be empty


def describe_list(xs: Iterable[Any], writable: bool = False) -> list[Array]:
    if tensors.is_tensor(xs):
        raise TypeError("xs must be a list of tensors, not one tensor")
    return tensors.describe_all(((f"xs[{i}]", x) for i, x in enumerate(xs)), writable)


def stream_of(x: Array) -> int:
    """The caller's current stream on x's GPU, as cudaStream_t."""
    return cast(DeviceFramework, x.framework).stream(x.device)


class DeviceOperands:
    """The tensors of one message on one GPU: contiguous, and several of them adjacent.

    addresses: of (input, output) of each tensor. keepalive: what must live until the device has
    finished.
    """

    def __init__(
        self, sources: Sequence[Array], targets: Sequence[Array | None], stream: int
    ) -> None:
        """Packs the sources on the stream, which is the caller's current one.

        A target may be the source itself; None: this rank gets no result.
        """
        first = sources[0]
        self._device = first.device
        self._framework = cast(DeviceFramework, first.framework)
        self._stream = stream
        self._targets: list[Any] = []  # to be overwritten with ...
        self._results: list[Any] = []  # ... these, once they are there
        self._brought: Callable[[int], None] | None = None  # the moment after it, once enqueued
        self._brought_on = stream
        self.keepalive: tuple[Any, ...] = (sources, targets)
        if len(sources) == 1:
            self.addresses = [self._place(first, targets[0])]
        else:
            self.addresses = self._place_all(sources, targets)

    def _place(self, source: Array, target: Array | None) -> tuple[int, int]:
        address = source.address
        packed = None
        if source.strides is not None:
            packed = self._pack([source])
            address = packed.address
        if target is None:
            return address, 0
        if target.strides is None:
            return address, target.address
        if packed is None:
            shape, dtype = target.shape, target.owner.dtype
            packed = self._keep(self._framework.empty((math.prod(shape),), dtype, self._device))
        self._bring(packed.owner, [target])
        return address, packed.address

    def _place_all(
        self, sources: Sequence[Array], targets: Sequence[Array | None]
    ) -> list[tuple[int, int]]:
        """In place, in one piece of memory."""
        flat = self._pack(sources)
        self._bring(flat.owner, [target for target in targets if target is not None])
        addresses, address = [], flat.address
        for source in sources:
            addresses.append((address, address))
            address += math.prod(source.shape) * source.itemsize
        return addresses

    def _pack(self, sources: Sequence[Array]) -> Array:
        return self._keep(self._framework.flatten([source.owner for source in sources]))

    def _keep(self, x: Any) -> Array:
        self.keepalive += (x,)
        return self._framework.describe(x, True)

    def _bring(self, flat: Any, targets: Sequence[Array]) -> None:
        self._targets = [target.owner for target in targets]
        self._results = self._framework.split(flat, [target.shape for target in targets])

    def current_stream(self) -> int:
        return self._framework.stream(self._device)

    def unpack(self) -> None:
        """After the call: the results come into their places on the caller's current stream, the
        first time; later ones wait for that."""
        if not self._targets:
            return
        now = self.current_stream()
        if self._brought is None:
            self._framework.assign(self._targets, self._results)
            self._brought = self._framework.event(self._device)
            self._brought_on = now
            # Where the packed memory comes from, and may be used again.
            if now != self._stream:
                self._brought(self._stream)
        elif now != self._brought_on:
            self._brought(now)
