"""An array as the core sees it: where it lies, and whether it shares memory with another one.

Knows addresses, shapes and strides, and numpy's names of dtypes, which cupy uses too. What a tensor
of which library is, is in tensors.py.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ringreduce import _core

DTYPE_NAMES = tuple(sorted(_core.DTYPES, key=_core.DTYPES.__getitem__))
CPU = -1  # a device, where others are numbers of GPUs


class Array(NamedTuple):
    """A tensor as the core sees it. Whoever submits the address keeps the owner alive."""

    address: int  # 0 only where there are no elements
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # bytes, may be negative; None: C-contiguous and aligned
    dtype: int  # index into _core.DTYPES
    itemsize: int  # bytes
    owner: Any  # the tensor itself
    framework: Framework
    device: int = CPU

    def __str__(self) -> str:
        """The same on all ranks, whichever GPU each of them has."""
        where = "" if self.device == CPU else "cuda "
        return f"{where}{DTYPE_NAMES[self.dtype]} {tuple(self.shape)}"


class Framework(Protocol):
    """What each library of tensors can do. A dtype is the library's own object, as in x.dtype."""

    def describe(self, x: Any, writable: bool) -> Array: ...

    def empty(self, shape: Sequence[int], dtype: Any, device: int = CPU) -> Any:
        """Uninitialised and C-contiguous."""

    def empty_like(self, x: Any) -> Any:
        """Uninitialised, detached, with the strides of x where x is dense."""

    def copy(self, x: Any) -> Any:
        """As empty_like, with the values of x."""

    def view(self, buffer: Any, shape: Sequence[int], dtype: Any) -> Any:
        """A uint8 array of the right size, seen as shape and dtype. Keeps the buffer alive.

        buffer: a numpy array, or of a GPU, anything that offers its memory by DLPack.
        """

    def mark_written(self, x: Any) -> None:
        """Tells the library that the values of x change behind its back."""


class DeviceFramework(Framework, Protocol):
    """What a library with arrays on GPUs can do besides. All of it on the caller's current stream,
    which each library has for itself, and each thread; nothing waits for the device."""

    def stream(self, device: int) -> int:
        """The caller's current stream, as cudaStream_t."""

    def event(self, device: int) -> Callable[[int], None]:
        """The moment after all that the current stream has been given: call it with a stream that
        is to wait for it."""

    def flatten(self, xs: Sequence[Any]) -> Any:
        """A new array: the elements of all of them in logical order, 1-d."""

    def split(self, flat: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        """Views of it, one after the other."""

    def assign(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Overwrites each target with the source of the same shape."""


def name_of(device: int) -> str:
    return "the CPU" if device == CPU else f"cuda:{device}"


@functools.cache
def cuda_unavailable() -> str:
    """Why memory of GPUs cannot be sent; empty: it can."""
    return str(_core.cuda_info()["unavailable"])


def what_moves() -> str:
    """Whose memory can be sent, for messages about a device whose memory cannot."""
    reason = cuda_unavailable()
    moved = f"CPU memory only (CUDA: {reason})" if reason else "memory of the CPU and of CUDA only"
    return f"this ringreduce moves {moved}"


def refuse_device(device: Any) -> str:
    """What to say of a tensor on such a device."""
    return f"the tensor is on device {device}, but {what_moves()}: use x.cpu()"


def unsupported(what: str) -> str:
    return f"{what} is not supported: use one of {', '.join(DTYPE_NAMES)}"


def index_of(dtype: np.dtype) -> int:
    """Of one of numpy's dtypes. Raises TypeError for those that the core does not have."""
    if not dtype.isnative:
        raise TypeError(
            f"dtype {dtype.str} is not in this machine's byte order: "
            "use x.astype(x.dtype.newbyteorder('='))"
        )
    # By name: bfloat16 is not numpy's own, ml_dtypes registers it.
    index = _core.DTYPES.get(dtype.name)
    if index is None:
        raise TypeError(unsupported(f"numpy dtype {dtype}"))
    return index


def checked(x: Array, writable: bool) -> Array:
    """For what is not plainly contiguous. Where only the alignment is amiss, strides tell the core
    to copy element by element."""
    if 0 in x.shape:
        return x._replace(strides=None)
    if x.address == 0:
        raise ValueError("the tensor has no memory: its storage was freed or never allocated")
    if writable and _overlaps_itself(x):
        raise ValueError(
            f"elements of the tensor share memory ({x}, strides {x.strides} bytes: expanded or "
            "broadcast?), and this call writes to it: copy it first"
        )
    return x


def check_apart(arrays: Iterable[Array]) -> None:
    """Raises ValueError if any two of the arrays share memory."""
    reaching: list[tuple[int, Array]] = []  # (end, array) of those that may reach the next one
    bounded = [(*_bounds(array), array) for array in arrays]
    for begin, end, array in sorted(bounded, key=operator.itemgetter(0)):
        reaching = [(other_end, other) for other_end, other in reaching if other_end > begin]
        for _, other in reaching:
            if np.shares_memory(_raw_view(array), _raw_view(other)):
                raise ValueError(
                    f"two operands share memory ({other} and {array}): what is written must not "
                    "overlap anything else that the call reads or writes. Copy one of them first"
                )
        reaching.append((end, array))


def check_together(x: Array, other: Array) -> None:
    """Raises ValueError unless one call can take both: on a GPU of one library, as each has its
    own current stream."""
    if x.device != other.device:
        raise ValueError(
            f"operands of one call on two devices: {x} on {name_of(x.device)}, {other} on "
            f"{name_of(other.device)}"
        )
    if x.device != CPU and x.framework is not other.framework:
        raise ValueError(
            "operands of one call on a GPU must be of one library: each has its own current stream"
        )


def walk(x: Array) -> tuple[int, list[tuple[int, int]]]:
    """Where the elements are, in order: equal for equal elements whatever the strides of size 1."""
    strides = x.strides or _contiguous_strides(x.shape, x.itemsize)
    return x.address, [(n, s) for n, s in zip(x.shape, strides, strict=True) if n > 1]


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _overlaps_itself(x: Array) -> bool:
    """Whether two elements share a byte."""
    steps = sorted((abs(stride), extent) for extent, stride in walk(x)[1])
    if steps and steps[0][0] == 0:
        return True
    reach = x.itemsize  # bytes that the dimensions so far span
    for stride, extent in steps:
        if stride < reach:
            return _offsets_collide(steps, x.itemsize)
        reach += stride * (extent - 1)
    return False


def _offsets_collide(steps: list[tuple[int, int]], itemsize: int) -> bool:
    """By the offset of each element: for rare strides that interleave, yet may be disjoint."""
    offsets = np.zeros(1, np.int64)
    for stride, extent in steps:
        offsets = np.add.outer(offsets, stride * np.arange(extent)).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < itemsize).any())


def _bounds(x: Array) -> tuple[int, int]:
    """The half-open range of addresses that the elements lie in."""
    if 0 in x.shape:
        return x.address, x.address
    steps = [s * (n - 1) for n, s in walk(x)[1]]
    begin = x.address + sum(step for step in steps if step < 0)
    return begin, x.address + sum(step for step in steps if step > 0) + x.itemsize


def _raw_view(x: Array) -> np.ndarray:
    """The same memory as an array of opaque items, for numpy's overlap test; not to be read."""
    interface = {
        "version": 3,
        "data": (x.address, True),
        "shape": tuple(x.shape),
        "strides": x.strides,
        "typestr": f"|V{x.itemsize}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
