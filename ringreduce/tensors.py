"""What a tensor is: with gpu_tensors.py the only module that knows torch, numpy and cupy.

Turns an operand into an address, a shape and strides, and makes new arrays of the operand's own
kind. Copies nothing but torch's lazy views. Never imports torch: where nobody did, no operand can
be a torch tensor.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ringreduce import _core, gpu_tensors, profiling
from ringreduce.arrays import (
    CPU,
    Array,
    Framework,
    check_apart,
    check_together,
    checked,
    cuda_unavailable,
    index_of,
    refuse_device,
    unsupported,
    walk,
    what_moves,
)


def describe(x: Any, writable: bool = False) -> Array:
    """Where x lies. writable: x will be overwritten.

    Raises TypeError for what is no tensor of one of the twelve dtypes in memory of the CPU or of a
    GPU, ValueError for memory that cannot be written as asked. `owner` differs from x only for a
    lazy (conjugate, negative) view.
    """
    framework = _framework_by_type.get(type(x))
    if framework is None:
        framework = _find_framework(x)
    return framework.describe(x, writable)


def describe_all(named: Iterable[tuple[str, Any]], writable: bool = False) -> list[Array]:
    """describe, for many: an error says which one it was."""
    arrays = []
    for name, x in named:
        try:
            arrays.append(describe(x, writable))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return arrays


def is_tensor(x: Any) -> bool:
    """Whether x is of a type that describe takes, whatever its dtype and device."""
    return isinstance(x, np.ndarray) or _is_torch(x) or gpu_tensors.is_cupy(x)


def describe_out(out: Any, x: Array) -> Array:
    """Checks that out can take a result of x's shape and dtype: apart from x, or exactly x."""
    target = describe(out, True)
    if target.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x: x is {x}, out is {target}")
    if target.shape != x.shape:
        raise ValueError(f"out must have the shape of x: x is {x}, out is {target}")
    check_together(x, target)
    if walk(target) != walk(x):
        check_apart([x, target])
    return target


def copy_of(x: Array) -> Any:
    return x.framework.copy(x.owner)


def empty_like(x: Array) -> Any:
    return x.framework.empty_like(x.owner)


def empty_rows(x: Array, rows: int) -> Any:
    """A new array like x with another number of rows."""
    return x.framework.empty((rows, *x.shape[1:]), x.owner.dtype, x.device)


def gathered(x: Array, buffer: np.ndarray, rows: int) -> Any:
    """The result of an allgather of x, on the bytes that the core has put together."""
    return x.framework.view(buffer, (rows, *x.shape[1:]), x.owner.dtype)


def mark_written(x: Array) -> None:
    x.framework.mark_written(x.owner)


def torch_stream(stream: int, device: int) -> Any:
    """torch's object of a cudaStream_t."""
    cuda = sys.modules["torch"].cuda
    # Of the default stream's 0, ExternalStream makes another stream.
    return cuda.ExternalStream(stream, device=device) if stream else cuda.default_stream(device)


def from_bytes(message: bytes) -> Array:
    """A read-only array over the bytes."""
    return describe(np.frombuffer(message, np.uint8))


MOST_BYTES = 2**47  # that a process can address


class Blank(NamedTuple):
    """A C-contiguous array that does not exist yet."""

    shape: tuple[int, ...]
    dtype: Any
    framework: Framework
    device: int = CPU

    @property
    def size_bytes(self) -> int:
        """Raises ValueError for more than any machine has."""
        size_bytes = math.prod(self.shape) * int(self.dtype.itemsize)
        if size_bytes > MOST_BYTES:
            raise ValueError(f"shape {self.shape} of {self.dtype} is too large: {size_bytes} bytes")
        return size_bytes

    def allocate(self) -> Any:
        return self.framework.empty(self.shape, self.dtype, self.device)

    def on(self, buffer: Any) -> Any:
        """The array on memory of size_bytes bytes, which it keeps alive."""
        if self.size_bytes == 0:
            return self.allocate()
        return self.framework.view(buffer, self.shape, self.dtype)


def blank(shape: int | Sequence[int], dtype: Any, device: Any = None) -> Blank:
    """A torch dtype makes a torch tensor; anything that numpy takes for a dtype a numpy array, on
    a GPU one of cupy.

    device: None is the CPU; "cuda" the caller's current GPU. Raises TypeError for a device whose
    memory cannot be sent, ValueError for a GPU that is no number.
    """
    extents = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    if any(extent < 0 for extent in extents):
        raise ValueError(f"negative extent in shape {extents}")
    kind, _, number = ("cpu" if device is None else str(device)).partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and cuda_unavailable()):
        raise TypeError(f"no tensor can be on device {device}, since {what_moves()}")
    if number and not number.isdecimal():
        raise ValueError(f"device {device!r} names no GPU: write 'cuda', or 'cuda:1'")
    if "torch" in sys.modules and isinstance(dtype, sys.modules["torch"].dtype):
        torch = _torch_framework()
        torch.index_of(dtype)
        return Blank(extents, dtype, torch, CPU if kind == "cpu" else torch.gpu(number))
    try:
        numpy_dtype = np.dtype("None" if dtype is None else dtype)  # numpy takes None for float64
    except TypeError:
        raise TypeError(unsupported(f"dtype {dtype!r}, which numpy does not know,")) from None
    _numpy.index_of(numpy_dtype)
    if kind == "cpu":
        return Blank(extents, numpy_dtype, _numpy)
    cupy = gpu_tensors.cupy()
    return Blank(extents, numpy_dtype, cupy, cupy.gpu(number))


class _Numpy:
    def __init__(self) -> None:
        self._dtypes: dict[np.dtype, int] = {}  # filled as dtypes are met
        _core.learn_type(np.ndarray, None, None, None)

    def describe(self, x: np.ndarray, writable: bool) -> Array:
        dtype = self._dtypes.get(x.dtype)
        if dtype is None:
            dtype = self.index_of(x.dtype)
        flags = x.flags
        if writable and not flags.writeable:
            raise ValueError("the array is read-only, and this call writes to it")
        address = x.ctypes.data
        if flags.c_contiguous and flags.aligned:
            return Array(address, x.shape, None, dtype, x.itemsize, x, self)
        return checked(Array(address, x.shape, x.strides, dtype, x.itemsize, x, self), writable)

    def index_of(self, dtype: np.dtype) -> int:
        index = index_of(dtype)
        self._dtypes[dtype] = index
        return index

    def empty(self, shape: Sequence[int], dtype: Any, device: int = CPU) -> np.ndarray:
        return np.empty(shape, dtype)

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        return np.empty_like(x, subok=False)

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x, order="K")

    def view(self, buffer: np.ndarray, shape: Sequence[int], dtype: Any) -> np.ndarray:
        return buffer.view(dtype).reshape(shape)

    def mark_written(self, x: np.ndarray) -> None:
        """numpy keeps no version."""


class _Torch:
    def __init__(self, torch: Any) -> None:
        profiling.learn_torch()
        self._torch = torch
        self._strided = torch.strided
        # The public function checks again what is known here, at twice a small call's cost.
        self._increment_version = getattr(
            torch._C, "_increment_version", torch.autograd.graph.increment_version
        )
        try:
            self._increment_version([])
        except RuntimeError:  # of an older torch, which takes one tensor, and no list
            increment_one = self._increment_version
            self._increment_version = lambda tensors: increment_one(tensors[0])
        self._dtypes = {
            getattr(torch, name): (index, getattr(torch, name).itemsize)
            for name, index in _core.DTYPES.items()
        }
        table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
        if table is not None:
            for known in (torch.Tensor, torch.nn.Parameter):
                _core.learn_type(known, table, torch.Tensor.is_neg, self._increment_version)

    def describe(self, x: Any, writable: bool) -> Array:
        dtype = self._dtypes.get(x.dtype)
        device = CPU
        if dtype is None or x.layout is not self._strided or not x.is_cpu or x.is_nested:
            device = self._gpu_of(x)
            assert dtype is not None  # or that has raised
        if x.is_neg() or x.is_conj():
            if writable:
                raise ValueError(
                    "the tensor is a lazy conjugate or negative view, and this call writes to it: "
                    "use x.resolve_conj().resolve_neg()"
                )
            x = x.detach().resolve_conj().resolve_neg()
        index, itemsize = dtype
        address = x.data_ptr()
        if x.is_contiguous() and address and address % itemsize == 0:
            return Array(address, x.shape, None, index, itemsize, x, self, device)
        strides = tuple(stride * itemsize for stride in x.stride())
        array = Array(address, x.shape, strides, index, itemsize, x, self, device)
        return checked(array, writable)

    def index_of(self, dtype: Any) -> int:
        if dtype not in self._dtypes:
            raise TypeError(unsupported(str(dtype)))
        return self._dtypes[dtype][0]

    def _gpu_of(self, x: Any) -> int:
        """The number of its GPU. Raises TypeError for what is not plain memory of one."""
        if x.layout is not self._strided or x.is_nested:
            layout = "nested" if x.is_nested else str(x.layout)
            raise TypeError(
                f"only dense tensors can be sent, this one is {layout}: use x.to_dense()"
            )
        if x.dtype not in self._dtypes:
            raise TypeError(unsupported(str(x.dtype)))
        if not x.is_cuda or cuda_unavailable():
            raise TypeError(refuse_device(x.device))
        return int(x.get_device())

    def gpu(self, number: str) -> int:
        """The GPU of that number; of none, the current one."""
        return int(number) if number else int(self._torch.cuda.current_device())

    def empty(self, shape: Sequence[int], dtype: Any, device: int = CPU) -> Any:
        place = "cpu" if device == CPU else self._torch.device("cuda", device)
        return self._torch.empty(tuple(shape), dtype=dtype, device=place)

    def empty_like(self, x: Any) -> Any:
        return self._torch.empty_like(x, requires_grad=False)

    def copy(self, x: Any) -> Any:
        return x.detach().clone()

    def view(self, buffer: Any, shape: Sequence[int], dtype: Any) -> Any:
        if 0 in shape:  # torch cannot reinterpret an empty tensor
            return self.empty(shape, dtype)
        on_cpu = isinstance(buffer, np.ndarray)
        flat = (self._torch.from_numpy if on_cpu else self._torch.from_dlpack)(buffer)
        return flat.view(dtype).view(tuple(shape))

    def mark_written(self, x: Any) -> None:
        self._increment_version([x])

    def stream(self, device: int) -> int:
        return int(self._torch._C._cuda_getCurrentRawStream(device))

    def event(self, device: int) -> Callable[[int], None]:
        event = self._torch.cuda.current_stream(device).record_event()
        return lambda stream: torch_stream(stream, device).wait_event(event)

    def flatten(self, xs: Sequence[Any]) -> Any:
        return self._torch.cat([x.detach().reshape(-1) for x in xs])

    def split(self, flat: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def assign(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        with self._torch.no_grad():
            self._torch._foreach_copy_([x.detach() for x in targets], list(sources))


_numpy = _Numpy()
# By exact type: a call does one look-up, and what the type alone decides is checked only once.
_framework_by_type: dict[type, Framework] = {np.ndarray: _numpy}


def _find_framework(x: Any) -> Framework:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("a masked array would be sent without its mask: use x.filled(...)")
    if isinstance(x, np.ndarray):
        framework: Framework = _numpy
    elif gpu_tensors.is_cupy(x):
        framework = gpu_tensors.cupy()
    elif _is_torch(x):
        tensor = sys.modules["torch"].Tensor
        if type(x).__torch_dispatch__ is not tensor.__torch_dispatch__:
            raise TypeError(
                f"a {type(x).__name__} is not plain memory: send the tensors that it is made of"
            )
        framework = _torch_framework()
    else:
        raise TypeError(
            f"expected a torch tensor or a numpy or cupy array, not {type(x).__name__}: "
            "make one with torch.tensor(x) or numpy.array(x)"
        )
    return _framework_by_type.setdefault(type(x), framework)


def _is_torch(x: Any) -> bool:
    return "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)


def _torch_framework() -> _Torch:
    tensor = sys.modules["torch"].Tensor
    framework = _framework_by_type.get(tensor)
    if not isinstance(framework, _Torch):
        framework = _framework_by_type[tensor] = _Torch(sys.modules["torch"])
    return framework
