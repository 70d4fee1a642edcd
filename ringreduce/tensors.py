"""What a tensor is: the only module that knows torch and numpy.

Turns an operand into an address, a shape and strides, and makes new arrays of the operand's own
kind. Copies nothing but torch's lazy views. Never imports torch: where nobody did, no operand can
be a torch tensor.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ringreduce import _core, profiling

DTYPE_NAMES = tuple(sorted(_core.DTYPES, key=_core.DTYPES.__getitem__))


class Array(NamedTuple):
    """A tensor as the core sees it. Whoever submits the address keeps the owner alive."""

    address: int  # 0 only where there are no elements
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # bytes, may be negative; None: C-contiguous and aligned
    dtype: int  # index into _core.DTYPES
    itemsize: int  # bytes
    owner: Any  # the tensor itself
    framework: Framework

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]} {tuple(self.shape)}"


class Framework(Protocol):
    """What each library of tensors can do. A dtype is the library's own object, as in x.dtype."""

    def describe(self, x: Any, writable: bool) -> Array: ...

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Uninitialised and C-contiguous."""

    def empty_like(self, x: Any) -> Any:
        """Uninitialised, detached, with the strides of x where x is dense."""

    def copy(self, x: Any) -> Any:
        """As empty_like, with the values of x."""

    def view(self, buffer: np.ndarray, shape: Sequence[int], dtype: Any) -> Any:
        """A uint8 array of the right size, seen as shape and dtype. Keeps the buffer alive."""

    def mark_written(self, x: Any) -> None:
        """Tells the library that the values of x change behind its back."""


def describe(x: Any, writable: bool = False) -> Array:
    """Where x lies. writable: x will be overwritten.

    Raises TypeError for what is no tensor in CPU memory of one of the twelve dtypes, ValueError for
    memory that cannot be written as asked. `owner` differs from x only for a lazy (conjugate,
    negative) view.
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
    return isinstance(x, np.ndarray) or (
        "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor)
    )


def describe_out(out: Any, x: Array) -> Array:
    """Checks that out can take a result of x's shape and dtype: apart from x, or exactly x."""
    target = describe(out, True)
    if target.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x: x is {x}, out is {target}")
    if target.shape != x.shape:
        raise ValueError(f"out must have the shape of x: x is {x}, out is {target}")
    if _walk(target) != _walk(x):
        check_apart([x, target])
    return target


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


def copy_of(x: Array) -> Any:
    return x.framework.copy(x.owner)


def empty_like(x: Array) -> Any:
    return x.framework.empty_like(x.owner)


def empty_rows(x: Array, rows: int) -> Any:
    """A new array like x with another number of rows."""
    return x.framework.empty((rows, *x.shape[1:]), x.owner.dtype)


def gathered(x: Array, buffer: np.ndarray, rows: int) -> Any:
    """The result of an allgather of x, on the bytes that the core has put together."""
    return x.framework.view(buffer, (rows, *x.shape[1:]), x.owner.dtype)


def mark_written(x: Array) -> None:
    x.framework.mark_written(x.owner)


def from_bytes(message: bytes) -> Array:
    """A read-only array over the bytes."""
    return describe(np.frombuffer(message, np.uint8))


class Blank(NamedTuple):
    """A C-contiguous array that does not exist yet."""

    shape: tuple[int, ...]
    dtype: Any
    framework: Framework

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def allocate(self) -> Any:
        return self.framework.empty(self.shape, self.dtype)

    def on(self, buffer: np.ndarray) -> Any:
        """The array on memory of size_bytes bytes, which it keeps alive."""
        return self.framework.view(buffer, self.shape, self.dtype)


def blank(shape: int | Sequence[int], dtype: Any, device: Any = None) -> Blank:
    """A torch dtype makes a torch tensor, anything that numpy takes for a dtype a numpy array."""
    extents = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    if any(extent < 0 for extent in extents):
        raise ValueError(f"negative extent in shape {extents}")
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise TypeError(_no_device(device))
    if "torch" in sys.modules and isinstance(dtype, sys.modules["torch"].dtype):
        torch = _torch_framework()
        torch.index_of(dtype)
        return Blank(extents, dtype, torch)
    try:
        numpy_dtype = np.dtype("None" if dtype is None else dtype)  # numpy takes None for float64
    except TypeError:
        raise TypeError(_unsupported(f"dtype {dtype!r}, which numpy does not know,")) from None
    _numpy.index_of(numpy_dtype)
    return Blank(extents, numpy_dtype, _numpy)


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
        return _checked(Array(address, x.shape, x.strides, dtype, x.itemsize, x, self), writable)

    def index_of(self, dtype: np.dtype) -> int:
        if not dtype.isnative:
            raise TypeError(
                f"dtype {dtype.str} is not in this machine's byte order: "
                "use x.astype(x.dtype.newbyteorder('='))"
            )
        # By name: bfloat16 is not numpy's own, ml_dtypes registers it.
        index = _core.DTYPES.get(dtype.name)
        if index is None:
            raise TypeError(_unsupported(f"numpy dtype {dtype}"))
        self._dtypes[dtype] = index
        return index

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
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
        if dtype is None or x.layout is not self._strided or not x.is_cpu or x.is_nested:
            raise TypeError(self._what_is_wrong(x))
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
            return Array(address, x.shape, None, index, itemsize, x, self)
        strides = tuple(stride * itemsize for stride in x.stride())
        return _checked(Array(address, x.shape, strides, index, itemsize, x, self), writable)

    def index_of(self, dtype: Any) -> int:
        if dtype not in self._dtypes:
            raise TypeError(_unsupported(str(dtype)))
        return self._dtypes[dtype][0]

    def _what_is_wrong(self, x: Any) -> str:
        if x.layout is not self._strided or x.is_nested:
            layout = "nested" if x.is_nested else str(x.layout)
            return f"only dense tensors can be sent, this one is {layout}: use x.to_dense()"
        if x.dtype not in self._dtypes:
            return _unsupported(str(x.dtype))
        return _no_device(x.device)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def empty_like(self, x: Any) -> Any:
        return self._torch.empty_like(x, requires_grad=False)

    def copy(self, x: Any) -> Any:
        return x.detach().clone()

    def view(self, buffer: np.ndarray, shape: Sequence[int], dtype: Any) -> Any:
        if buffer.size == 0:  # torch cannot reinterpret an empty tensor
            return self.empty(shape, dtype)
        return self._torch.from_numpy(buffer).view(dtype).view(tuple(shape))

    def mark_written(self, x: Any) -> None:
        self._increment_version([x])


_numpy = _Numpy()
# By exact type: a call does one look-up, and what the type alone decides is checked only once.
_framework_by_type: dict[type, Framework] = {np.ndarray: _numpy}


def _find_framework(x: Any) -> Framework:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("a masked array would be sent without its mask: use x.filled(...)")
    if isinstance(x, np.ndarray):
        framework: Framework = _numpy
    elif is_tensor(x):
        tensor = sys.modules["torch"].Tensor
        if type(x).__torch_dispatch__ is not tensor.__torch_dispatch__:
            raise TypeError(
                f"a {type(x).__name__} is not plain memory: send the tensors that it is made of"
            )
        framework = _torch_framework()
    else:
        raise TypeError(
            f"expected a torch tensor or a numpy array, not {type(x).__name__}: "
            "make one with torch.tensor(x) or numpy.array(x)"
        )
    return _framework_by_type.setdefault(type(x), framework)


def _torch_framework() -> _Torch:
    tensor = sys.modules["torch"].Tensor
    framework = _framework_by_type.get(tensor)
    if not isinstance(framework, _Torch):
        framework = _framework_by_type[tensor] = _Torch(sys.modules["torch"])
    return framework


def _checked(x: Array, writable: bool) -> Array:
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


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _overlaps_itself(x: Array) -> bool:
    """Whether two elements share a byte."""
    walk = sorted((abs(stride), extent) for extent, stride in _walk(x)[1])
    if walk and walk[0][0] == 0:
        return True
    reach = x.itemsize  # bytes that the dimensions so far span
    for stride, extent in walk:
        if stride < reach:
            return _offsets_collide(walk, x.itemsize)
        reach += stride * (extent - 1)
    return False


def _offsets_collide(walk: list[tuple[int, int]], itemsize: int) -> bool:
    """By the offset of each element: for rare strides that interleave, yet may be disjoint."""
    offsets = np.zeros(1, np.int64)
    for stride, extent in walk:
        offsets = np.add.outer(offsets, stride * np.arange(extent)).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < itemsize).any())


def _walk(x: Array) -> tuple[int, list[tuple[int, int]]]:
    """Where the elements are, in order: equal for equal elements whatever the strides of size 1."""
    strides = x.strides or _contiguous_strides(x.shape, x.itemsize)
    return x.address, [(n, s) for n, s in zip(x.shape, strides, strict=True) if n > 1]


def _bounds(x: Array) -> tuple[int, int]:
    """The half-open range of addresses that the elements lie in."""
    if 0 in x.shape:
        return x.address, x.address
    steps = [s * (n - 1) for n, s in _walk(x)[1]]
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


def _unsupported(what: str) -> str:
    return f"{what} is not supported: use one of {', '.join(DTYPE_NAMES)}"


def _no_device(device: Any) -> str:
    return (
        f"the tensor is on device {device}, but this build of ringreduce moves CPU memory only "
        f"(CUDA: {_core.build_info().get('cuda', 'unavailable')}): use x.cpu()"
    )
