"""What tensors.py tells the core about memory, and the arrays it makes. No ranks, no communication.

Where memory is strided, the truth is brute force: every element's bytes, one by one.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringreduce import tensors
from ringreduce._core import DTYPES
from ringreduce.tensors import Array, check_apart, describe

torch = pytest.importorskip("torch")

NUMPY_DTYPES = [name for name in DTYPES if name != "bfloat16"]
FRAMEWORKS = ["numpy", "torch"]


def make(framework: str, shape: tuple[int, ...], dtype: str = "float32"):
    """0, 1, 2 ... in logical order."""
    count = int(np.prod(shape))
    if framework == "numpy":
        return np.arange(count).astype(dtype).reshape(shape)
    return torch.arange(count).to(getattr(torch, dtype)).reshape(shape)


def offsets(x: Array) -> list[int]:
    """Each element's first byte, in logical order, from x.address."""
    strides = x.strides
    if strides is None:
        strides = tuple(x.itemsize * int(np.prod(x.shape[i + 1 :])) for i in range(len(x.shape)))
    walks = [[i * stride for i in range(n)] for n, stride in zip(x.shape, strides, strict=True)]
    return [sum(steps) for steps in itertools.product(*walks)]


def values(x: Array, dtype: str) -> list:
    """The elements as the core would read them."""
    read = [ctypes.string_at(x.address + offset, x.itemsize) for offset in offsets(x)]
    return np.frombuffer(b"".join(read), dtype).tolist()


def raw(shape, strides, itemsize: int, memory=None, offset: int = 0) -> np.ndarray:
    """A writable view with any strides in bytes, of either sign, from the middle of 8 KB."""
    memory = np.zeros(8192, np.uint8) if memory is None else memory
    dtype = {1: np.uint8, 2: np.int16, 4: np.float32}[itemsize]
    return np.ndarray(shape, dtype, memory, 4096 + offset, strides)


# ---- What describe says.


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_contiguous_numpy(dtype):
    x = make("numpy", (2, 3), dtype)
    array = describe(x, writable=True)
    assert array[:5] == (x.__array_interface__["data"][0], (2, 3), None, DTYPES[dtype], x.itemsize)
    assert array.owner is x


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_torch(dtype):
    x = make("torch", (2, 3), dtype)
    array = describe(x, writable=True)
    assert array[:5] == (x.data_ptr(), (2, 3), None, DTYPES[dtype], x.element_size())
    assert array.owner is x


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2],
        lambda x: x[1:, 1::2],
        lambda x: x[:, :1],
        lambda x: x.T[1:][::2],
        lambda x: x[1:2, 2:3],
        lambda x: x[3:, 5:],
    ],
)
def test_views_are_read_in_logical_order(framework, view):
    x = view(make(framework, (4, 6)))
    array = describe(x, writable=True)
    assert array.shape == tuple(x.shape)
    assert values(array, "float32") == x.reshape(-1).tolist()


def test_negative_strides():
    x = make("numpy", (4, 6))[::-1, ::-2]
    array = describe(x, writable=True)
    assert array.strides == (-24, -8)
    assert values(array, "float32") == x.ravel().tolist()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_dimensions_and_no_elements(framework):
    scalar = describe(make(framework, (1,)).reshape(()), writable=True)
    assert (scalar.shape, scalar.strides) == ((), None)
    for shape in [(0,), (3, 0), (0, 3)]:
        empty = describe(make(framework, shape), writable=True)
        assert (empty.shape, empty.strides) == (shape, None)
    transposed = make(framework, (3, 0, 2)).swapaxes(0, 2)
    assert describe(transposed, writable=True).strides is None


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_misaligned_memory_has_strides(framework):
    memory = np.zeros(33, np.uint8)
    first = 1 - memory.ctypes.data % 2
    if framework == "numpy":
        x = memory[first : first + 32].view(np.float64)
    else:
        x = torch.frombuffer(memory, dtype=torch.float64, count=4, offset=first)
    array = describe(x, writable=True)
    assert array.address % 8 != 0 and array.strides == (8,)


def test_numpy_dtype_of_another_c_type_is_the_same():
    assert describe(np.zeros(1, np.longlong)).dtype == DTYPES["int64"]


def test_bfloat16_of_numpy():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = describe(np.zeros(3, ml_dtypes.bfloat16))
    assert (array.dtype, array.itemsize) == (DTYPES["bfloat16"], 2)


def test_torch_is_not_imported():
    script = (
        "import sys, numpy; from ringreduce import tensors; tensors.describe(numpy.ones(3))\n"
        "tensors.blank(3, 'float32')\n"
        "try: tensors.describe([1.0])\n"
        "except TypeError: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- What it refuses.


@pytest.mark.parametrize("x", [1.0, [1.0], (1, 2), None, "x", np.float32(1), b"123"])
def test_other_types(x):
    with pytest.raises(TypeError, match=f"not {type(x).__name__}: make one with torch.tensor"):
        describe(x)


@pytest.mark.parametrize(
    "dtype", ["uint16", "uint32", "uint64", "longdouble", "object", "U3", "datetime64[s]", "i4,f4"]
)
def test_other_numpy_dtypes(dtype):
    with pytest.raises(TypeError, match=", ".join(DTYPES)):
        describe(np.zeros(2, dtype))


def test_foreign_byte_order():
    with pytest.raises(TypeError, match="byte order"):
        describe(np.zeros(2, np.dtype("f4").newbyteorder()))


def test_masked_array():
    with pytest.raises(TypeError, match="mask"):
        describe(np.ma.masked_array([1.0, 2.0], [True, False]))


def test_other_torch_dtypes():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(TypeError, match=", ".join(DTYPES)):
            describe(torch.zeros(2).to(dtype))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_that_are_not_plain_memory():
    quantized = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)
    for x, problem in [
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.eye(2).to_sparse_csr(), "sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (quantized, "quint8"),
        (torch.ones(2, device="meta"), r"device meta.* CPU memory only .*CUDA.*x\.cpu\(\)"),
    ]:
        with pytest.raises(TypeError, match=problem):
            describe(x)


def test_uninitialised_parameter():
    with pytest.raises(ValueError, match="uninitialized"):
        describe(torch.nn.UninitializedParameter())


class Wrapper(torch.Tensor):
    """Has a shape, but its values are elsewhere."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("not to be asked")


def test_wrapper_subclass():
    with pytest.raises(TypeError, match="Wrapper"):
        describe(Wrapper((2,)))


def test_tensor_whose_storage_is_gone():
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        describe(x)


def test_read_only_array():
    x = np.ones(3)
    x.flags.writeable = False
    describe(x)
    with pytest.raises(ValueError, match="read-only"):
        describe(x, writable=True)


def test_expanded_memory_is_read_but_not_written():
    for x in (torch.ones(3, 1).expand(3, 4), torch.ones(1).expand(2), raw((3, 4), (4, 0), 4)):
        assert values(describe(x), "float32") == x.reshape(-1).tolist()
    for x in (torch.ones(3, 1).expand(3, 4), torch.ones(1).expand(10**12), raw((2,), (0,), 4)):
        with pytest.raises(ValueError, match="share memory"):
            describe(x, writable=True)


def test_interleaved_strides():
    assert describe(raw((2, 3), (12, 8), 4), writable=True).strides == (12, 8)
    assert describe(raw((1, 3), (0, 8), 4), writable=True).strides == (0, 8)
    with pytest.raises(ValueError, match="share memory"):
        describe(raw((3, 3), (16, 8), 4), writable=True)


def test_lazy_views_are_resolved_or_refused():
    x = torch.tensor([1 + 2j, 3 - 4j])
    for view in (x.conj(), x.conj().imag, x.conj()[:1]):
        array = describe(view)
        assert not array.owner.is_conj() and not array.owner.is_neg()
        assert torch.equal(array.owner, view) and array.address == array.owner.data_ptr()
        with pytest.raises(ValueError, match="resolve_conj"):
            describe(view, writable=True)
    assert describe(x.imag, writable=True).strides == (8,)


def test_list_says_which_one():
    with pytest.raises(TypeError, match=r"^b: expected a torch tensor"):
        tensors.describe_all([("a", np.ones(1)), ("b", 3)])
    with pytest.raises(ValueError, match=r"^a: .* share memory"):
        tensors.describe_all([("a", torch.ones(1).expand(2))], writable=True)
    arrays = tensors.describe_all([("a", np.ones(1)), ("b", torch.ones(2))])
    assert [array.shape for array in arrays] == [(1,), (2,)]


# ---- Autograd and subclasses.


def test_tensors_that_require_grad():
    leaf = torch.nn.Parameter(torch.ones(2, 3))
    for x in (leaf, leaf * 2, leaf.T):
        array = describe(x, writable=True)
        result = tensors.empty_like(array)
        assert array.address == x.data_ptr()
        assert type(result) is torch.Tensor and not result.requires_grad
        assert not tensors.empty_rows(array, 1).requires_grad
        assert not tensors.copy_of(array).requires_grad


def test_mark_written_counts_the_version_up():
    for x in (torch.ones(2), torch.nn.Parameter(torch.ones(2))):
        before = x._version
        tensors.mark_written(describe(x, writable=True))
        assert x._version == before + 1
    saved = torch.nn.Parameter(torch.ones(2))
    loss = (saved * saved).sum()
    tensors.mark_written(describe(saved, writable=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        tensors.mark_written(describe(torch.ones(2), writable=True))
    tensors.mark_written(describe(np.ones(2), writable=True))


class Named(torch.Tensor):
    """An ordinary subclass."""


def test_ordinary_subclasses():
    x = torch.ones(2).as_subclass(Named)
    assert describe(x, writable=True).address == x.data_ptr()
    recarray = np.ones(2).view(np.recarray)
    assert type(tensors.empty_like(describe(recarray))) is np.ndarray


# ---- New arrays.


def test_empty_like_keeps_the_memory_format():
    image = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert tensors.empty_like(describe(image)).stride() == image.stride()
    fortran = np.asfortranarray(np.ones((2, 3)))
    assert tensors.empty_like(describe(fortran)).strides == fortran.strides
    for sparse in (torch.ones(4, 6)[:, ::2], torch.ones(4, 1).expand(4, 3), raw((4, 3), (0, 4), 4)):
        result = tensors.empty_like(describe(sparse))
        assert tuple(result.shape) == (4, 3) and result.dtype == sparse.dtype
        describe(result, writable=True)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_copy_of(framework):
    x = make(framework, (2, 3)).T
    copy = tensors.copy_of(describe(x))
    assert copy.tolist() == x.tolist() and type(copy) is type(x) and copy.dtype == x.dtype
    assert describe(copy, writable=True).address != describe(x).address
    assert describe(copy).strides == (4, 12)
    expanded = torch.ones(3, 1).expand(3, 4)
    describe(tensors.copy_of(describe(expanded)), writable=True)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_empty_rows(framework, rows):
    x = make(framework, (4, 2, 3), "int16")
    result = tensors.empty_rows(describe(x.swapaxes(1, 2)), rows)
    assert tuple(result.shape) == (rows, 3, 2) and result.dtype == x.dtype
    assert describe(result, writable=True).strides is None


@pytest.mark.parametrize(
    ("framework", "dtype"),
    [("torch", name) for name in DTYPES] + [("numpy", name) for name in NUMPY_DTYPES],
)
def test_gathered_is_a_view_of_the_bytes(framework, dtype):
    x = make(framework, (2, 3), dtype)
    buffer = np.arange(12 * describe(x).itemsize, dtype=np.uint8) % 2
    address, content = buffer.ctypes.data, buffer.tobytes()
    result = tensors.gathered(describe(x), buffer, 4)
    assert tuple(result.shape) == (4, 3) and result.dtype == x.dtype and type(result) is type(x)
    assert describe(result, writable=True)[:3] == (address, (4, 3), None)
    del buffer
    gc.collect()
    assert ctypes.string_at(address, len(content)) == content


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gathered_without_elements_and_of_no_dimensions(framework):
    nothing = np.empty(0, np.uint8)
    assert tuple(tensors.gathered(describe(make(framework, (2, 0))), nothing, 4).shape) == (4, 0)
    assert tuple(tensors.gathered(describe(make(framework, (0, 3))), nothing, 0).shape) == (0, 3)
    scalar = make(framework, (1,)).reshape(())
    four = np.ones(4, np.float32).view(np.uint8)
    assert tensors.gathered(describe(scalar), four, 4).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_from_bytes():
    array = tensors.from_bytes(b"abc")
    assert (array.shape, array.dtype) == ((3,), DTYPES["uint8"])
    assert bytes(values(array, "u1")) == b"abc"
    assert tensors.from_bytes(b"").shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "kind", "itemsize"),
    [
        ("float32", np.ndarray, 4),
        (np.int8, np.ndarray, 1),
        (np.dtype("complex128"), np.ndarray, 16),
        (float, np.ndarray, 8),
        (torch.bfloat16, torch.Tensor, 2),
        (torch.bool, torch.Tensor, 1),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size((2, 3)), 6, (), (0, 2)])
def test_blank(dtype, kind, itemsize, shape):
    blank = tensors.blank(shape, dtype, "cpu")
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    assert blank.size_bytes == itemsize * int(np.prod(extents))
    buffer = np.zeros(blank.size_bytes, np.uint8)
    for x in (blank.on(buffer), blank.allocate()):
        array = describe(x, writable=True)
        assert type(x) is kind and (array.shape, array.itemsize) == (extents, itemsize)
    if blank.size_bytes:
        assert describe(blank.on(buffer)).address == buffer.ctypes.data


@pytest.mark.parametrize("dtype", [None, "float31", np.uint16, torch.float8_e5m2, ">f4", "O", 3])
def test_blank_of_another_dtype(dtype):
    with pytest.raises(TypeError):
        tensors.blank((2,), dtype)


def test_blank_of_an_impossible_shape_or_place():
    with pytest.raises(ValueError, match="negative"):
        tensors.blank((2, -1), "float32")
    with pytest.raises(TypeError):
        tensors.blank(2.5, "float32")
    for device in ("cuda", torch.device("cuda:0")):
        with pytest.raises(TypeError, match="CPU memory only"):
            tensors.blank((2,), torch.float32, device)


# ---- Operands that share memory.


def test_out_may_be_x_or_apart_from_it():
    x = np.zeros((3, 4), np.float32)
    for out in (x, x[:], torch.from_numpy(x), np.zeros((3, 4), np.float32, order="F")):
        assert tensors.describe_out(out, describe(x)).owner is out
    even, odd = np.zeros(8)[::2], np.zeros(8)[1::2]
    assert tensors.describe_out(odd, describe(even)).owner is odd
    row = x.T[:1]
    assert tensors.describe_out(row[:, ::1], describe(row)).shape == (1, 3)


def test_out_must_fit():
    x = describe(np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match="dtype"):
        tensors.describe_out(np.zeros((2, 3)), x)
    with pytest.raises(ValueError, match="shape"):
        tensors.describe_out(np.zeros((3, 2), np.float32), x)
    with pytest.raises(ValueError, match="read-only"):
        tensors.describe_out(np.broadcast_to(np.zeros(3, np.float32), (2, 3)), x)


@pytest.mark.parametrize(
    ("x_of", "out_of"),
    [
        (lambda m: m[:4], lambda m: m[1:5]),
        (lambda m: m[:4], lambda m: m[3::-1]),
        (lambda m: m[:8:2], lambda m: m[:4]),
        (lambda m: m[:4].reshape(2, 2), lambda m: m[:4].reshape(2, 2).T),
    ],
)
def test_out_that_overlaps_x(x_of, out_of):
    memory = np.zeros(10)
    with pytest.raises(ValueError, match="share memory"):
        tensors.describe_out(out_of(memory), describe(x_of(memory)))


def test_check_apart_finds_what_a_long_one_covers():
    memory = np.zeros(100)
    apart = [memory[::10], memory[1:3], memory[5:10], memory[:0], memory[95:95]]
    check_apart([describe(x) for x in apart])
    with pytest.raises(ValueError, match="share memory"):
        check_apart([describe(x) for x in [*apart, memory[49:51]]])


# ---- Against brute force.

LAYOUTS = st.lists(st.tuples(st.integers(0, 4), st.integers(-12, 12)), max_size=3)
ITEMSIZES = st.sampled_from([1, 2, 4])


def touched(x: np.ndarray) -> list[int]:
    array = describe(x)
    starts = [array.address + offset for offset in offsets(array)]
    return [byte for start in starts for byte in range(start, start + array.itemsize)]


@given(layout=LAYOUTS, itemsize=ITEMSIZES)
def test_overlap_with_itself(layout, itemsize):
    x = raw([n for n, _ in layout], [stride for _, stride in layout], itemsize)
    every = touched(x)
    overlaps = len(set(every)) < len(every)
    try:
        describe(x, writable=True)
    except ValueError:
        assert overlaps
    else:
        assert not overlaps


@given(data=st.data(), itemsize=ITEMSIZES)
def test_overlap_with_each_other(data, itemsize):
    memory = np.zeros(8192, np.uint8)
    views = []
    for _ in range(data.draw(st.integers(2, 4))):
        layout, offset = data.draw(LAYOUTS), data.draw(st.integers(-40, 40))
        shape, strides = [n for n, _ in layout], [stride for _, stride in layout]
        views.append(raw(shape, strides, itemsize, memory, offset))
    sets = [set(touched(view)) for view in views]
    overlap = any(a & b for a, b in itertools.combinations(sets, 2))
    try:
        check_apart([describe(view) for view in views])
    except ValueError:
        assert overlap
    else:
        assert not overlap
