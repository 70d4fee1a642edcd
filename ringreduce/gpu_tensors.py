"""Arrays of cupy, and the streams of threads that are ranks.

cupy is imported where it is needed only, torch never: where nobody did, no tensor is one of torch.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ringreduce.arrays import (
    CPU,
    Array,
    checked,
    cuda_unavailable,
    index_of,
    refuse_device,
)


def is_cupy(x: Any) -> bool:
    return "cupy" in sys.modules and isinstance(x, sys.modules["cupy"].ndarray)


def cupy() -> Cupy:
    """Raises TypeError where there is no cupy."""
    if not _known:
        try:
            _known.append(Cupy(importlib.import_module("cupy")))
        except ImportError as error:
            raise TypeError(
                f"an array of numpy's dtypes on a GPU is one of cupy, which is missing ({error}): "
                "give a torch dtype, or install cupy"
            ) from None
    return _known[0]


class Cupy:
    """Arrays of cupy."""

    def __init__(self, module: Any) -> None:
        self._cupy = module
        self._dtypes: dict[np.dtype, int] = {}  # filled as dtypes are met

    def describe(self, x: Any, writable: bool) -> Array:
        dtype = self._dtypes.get(x.dtype)
        if dtype is None:
            dtype = self._dtypes[x.dtype] = index_of(x.dtype)
        address, device = int(x.data.ptr), int(x.device.id)
        if cuda_unavailable():
            raise TypeError(refuse_device(f"cuda:{device}"))
        if x.flags.c_contiguous and address and address % x.itemsize == 0:
            return Array(address, x.shape, None, dtype, x.itemsize, x, self, device)
        array = Array(address, x.shape, x.strides, dtype, x.itemsize, x, self, device)
        return checked(array, writable)

    def gpu(self, number: str) -> int:
        """The GPU of that number; of none, the current one."""
        return int(number) if number else int(self._cupy.cuda.Device().id)

    def empty(self, shape: Sequence[int], dtype: Any, device: int = CPU) -> Any:
        with self._cupy.cuda.Device(device):
            return self._cupy.empty(tuple(shape), dtype)

    def empty_like(self, x: Any) -> Any:
        with x.device:
            return self._cupy.empty_like(x)

    def copy(self, x: Any) -> Any:
        with x.device:
            return self._cupy.array(x, order="K")

    def view(self, buffer: Any, shape: Sequence[int], dtype: Any) -> Any:
        return self._cupy.from_dlpack(buffer).view(dtype).reshape(tuple(shape))

    def mark_written(self, x: Any) -> None:
        """cupy keeps no version."""

    def stream(self, device: int) -> int:
        with self._cupy.cuda.Device(device):
            return int(self._cupy.cuda.get_current_stream().ptr)

    def event(self, device: int) -> Callable[[int], None]:
        cuda = self._cupy.cuda
        with cuda.Device(device):
            event = cuda.get_current_stream().record(cuda.Event(disable_timing=True))

        def hold_back(stream: int) -> None:
            with cuda.Device(device):
                cuda.ExternalStream(stream).wait_event(event)

        return hold_back

    def flatten(self, xs: Sequence[Any]) -> Any:
        with xs[0].device:
            return self._cupy.concatenate([x.ravel() for x in xs])

    def split(self, flat: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        parts, end = [], 0
        for shape in shapes:
            begin, end = end, end + math.prod(shape)
            parts.append(flat[begin:end].reshape(shape))
        return parts

    def assign(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        for target, source in zip(targets, sources, strict=True):
            with target.device:
                target[...] = source


_known: list[Cupy] = []


def separate_thread() -> None:
    """Gives the calling thread, a rank among threads of one process, GPU streams of its own.

    Kernels of ranks wait for each other. So they must not lie behind one another in one stream, nor
    in one of the device's queues; and backward must not run on the one thread that torch has for
    each device. Does nothing where neither torch nor cupy is in use, or no GPU there.
    """
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is None and cupy is None:
        return
    # Read when CUDA starts: the device's queues, and that kernels are loaded before the first runs.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    if cuda_unavailable():
        return
    streams: dict[int, Any] = {}  # of torch, by device
    if torch is not None and torch.cuda.is_available():
        torch.autograd.set_multithreading_enabled(False)
        current = torch.cuda.current_device()
        for device in range(torch.cuda.device_count()):
            streams[device] = torch.cuda.Stream(device)
            torch.cuda.set_stream(streams[device])
        torch.cuda.set_device(current)
    if cupy is not None and cupy.cuda.is_available():
        for device in range(cupy.cuda.runtime.getDeviceCount()):
            with cupy.cuda.Device(device):
                if device in streams:
                    cupy.cuda.ExternalStream(streams[device].cuda_stream).use()
                else:
                    cupy.cuda.Stream(non_blocking=True).use()
