"""The operands of collectives: any memory layout, in and out of place, with gradients; and what is
refused, before anything is sent."""

import itertools

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    assert_equal,
    bits_of,
    exact_values,
    make,
    reduced,
    values_of,
    with_each,
)
from torch import nn

from ringreduce import tensors

SHAPE = (4, 6, 5)


def numpy_layouts(values):
    """The same values in memory of every kind, by name."""
    item = values.dtype.itemsize
    yield "contiguous", values.copy()
    yield "fortran", np.asfortranarray(values)
    yield "transposed", np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
    yield "reversed", np.ascontiguousarray(values[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    yield "reversed in the middle", np.ascontiguousarray(values[:, ::-1])[:, ::-1]
    wide = np.zeros((9, 13, 21), values.dtype)
    yield "stepped", put(wide[1::2, 12:0:-2, 3:18:3], values)
    shifted = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    yield "misaligned", put(shifted, values)
    record = np.zeros(
        values.shape, [("before", np.uint8), ("x", values.dtype), ("after", np.uint16)]
    )
    yield "field of a record", put(record["x"], values)
    # Dimension 0 steps by less than dimension 2 reaches: woven together, without a collision.
    base = np.zeros(224, values.dtype)
    woven = np.lib.stride_tricks.as_strided(base, values.shape, (5 * item, 40 * item, 2 * item))
    yield "interleaved", put(woven, values)


def torch_layouts(values, dtype):
    x = make("torch", values, dtype)
    yield "contiguous", x.clone()
    yield "transposed", x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield "all reversed", x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.zeros((9, 13, 21), dtype=x.dtype)
    yield "stepped", wide[1::2, 1::2, 3:18:3].copy_(x)
    yield "offset", torch.zeros(3 + x.numel(), dtype=x.dtype)[3:].view(x.shape).copy_(x)
    yield "narrow", torch.zeros((4, 6, 9), dtype=x.dtype).narrow(2, 2, 5).copy_(x)
    memory = bytearray(x.numel() * x.element_size() + 1)
    shifted = torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)
    yield "misaligned", shifted.copy_(x)
    yield "interleaved", torch.zeros(224, dtype=x.dtype).as_strided(x.shape, (5, 40, 2)).copy_(x)


def put(array, values):
    array[...] = values
    return array


def layouts(framework, values, dtype):
    return list(numpy_layouts(values) if framework == "numpy" else torch_layouts(values, dtype))


@pytest.mark.parametrize(
    ("framework", "dtype"),
    [
        *(("numpy", d) for d in ("int8", "float16", "float32", "float64", "complex128")),
        *(("torch", d) for d in ("bool", "bfloat16", "int32", "complex64", "complex128")),
    ],
)
def test_any_layout_on_any_rank(ranks, framework, dtype):
    """Each rank has another layout: elements meet in logical order."""
    size = 3
    inputs = [exact_values(SHAPE, dtype, "sum", rank) for rank in range(size)]
    total = reduced(inputs, "sum", dtype)
    parts = np.array_split(total, size)
    number = len(layouts(framework, inputs[0], dtype))

    def check(comm, _):
        for turn in range(number):

            def mine(turn=turn):
                return layouts(framework, inputs[comm.rank], dtype)[(turn + comm.rank) % number]

            name, x = mine()
            before = bits_of(x)
            assert_equal(comm.allreduce(x), total, name)
            assert_equal(comm.reduce_scatter(x), parts[comm.rank], name)
            assert_equal(comm.allgather(x), np.concatenate(inputs), name)
            assert_equal(comm.broadcast(x, 1), inputs[1], name)
            rooted = comm.reduce(x, root=2)
            assert rooted is None if comm.rank != 2 else values_of(rooted).shape == total.shape
            assert_equal(comm.grouped_allreduce([x, x])[1], total, name)
            assert bits_of(x) == before, name
            _, out = mine()
            assert comm.allreduce(x, out=out) is out
            assert_equal(out, total, name)
            assert bits_of(x) == before, name
            assert comm.allreduce_(x) is x
            assert_equal(x, total, name)
            _, x = mine()
            comm.allreduce(x, out=x)
            assert_equal(x, total, name)
            _, x = mine()
            comm.broadcast_(x, 2)
            assert_equal(x, inputs[2], name)
            (_, x), (_, y) = mine(), mine()
            comm.grouped_allreduce_([x, y])
            assert_equal(y, total, name)

    ranks(size, with_each(ALGORITHMS, check))


def test_what_lies_between_the_elements_is_not_written(ranks):
    def check(comm):
        for count, step in itertools.product((10, 3000), (2, 3, -2)):
            memory = np.full(count * 3, 7, np.int16)
            x = memory[::step][:count]
            x[:] = comm.rank
            comm.allreduce_(x)
            assert (x == 1).all()
            x[:] = 7
            assert (memory == 7).all()
            row = torch.full((count, 3), 7, dtype=torch.int16)
            row[:, 1] = comm.rank
            comm.broadcast_(row[:, 1], 1)
            assert (row[:, 1] == 1).all() and (row[:, ::2] == 7).all()

    ranks(2, check)


def test_memory_format_of_the_result(ranks):
    def check(comm):
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        for result in (comm.allreduce(x), comm.broadcast(x), comm.grouped_allreduce([x])[0]):
            assert result.stride() == x.stride()
        assert torch.equal(comm.broadcast(x, 1), comm.allgather(x)[2:])
        if comm.rank:  # the other rank's in another format: still the same elements
            x = x.contiguous()
        assert torch.equal(comm.allreduce(x), comm.allgather(x).view(2, 2, 3, 4, 5).sum(0))
        f = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        assert comm.allreduce(f).flags.f_contiguous
        assert comm.allreduce(f[:, ::2]).tolist() == [[0, 4], [6, 10]]

    ranks(2, check)


def test_inputs_may_be_read_only_and_repeat_themselves(ranks):
    def check(comm):
        x = np.arange(3.0)
        x.flags.writeable = False
        assert comm.allreduce(x).tolist() == [0, 2, 4]
        assert comm.broadcast(x).tolist() == [0, 1, 2]
        assert comm.allgather(np.broadcast_to(x, (2, 3))).tolist() == [[0, 1, 2]] * 4
        assert comm.allreduce(torch.tensor([2.0]).expand(2, 3)).tolist() == [[4] * 3] * 2
        windows = np.lib.stride_tricks.sliding_window_view(np.arange(5), 3)
        assert comm.allreduce(windows).tolist() == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]
        assert comm.reduce_scatter(np.frombuffer(b"\1\2\3", np.uint8)).tolist() in ([2, 4], [6])
        conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
        assert comm.allreduce(conjugate).tolist() == [2 - 4j, 6 + 2j]
        assert comm.allreduce(torch.tensor([1j]).conj().imag).tolist() == [-2]
        assert comm.allreduce(conjugate, async_op=True).wait().tolist() == [2 - 4j, 6 + 2j]

    ranks(2, check)


def test_gradients(ranks):
    def check(comm):
        parameter = nn.Parameter(torch.ones(3))
        for result in (
            comm.allreduce(parameter),
            comm.broadcast(parameter),
            comm.allgather(parameter),
            comm.reduce_scatter(parameter),
            comm.grouped_allreduce([parameter])[0],
            comm.allreduce(parameter * 2),
            comm.allreduce(parameter, async_op=True).wait(),
        ):
            assert type(result) is torch.Tensor
            assert not result.requires_grad and result.grad_fn is None
        assert parameter.requires_grad and parameter.tolist() == [1] * 3

        for in_place in (
            lambda x: comm.allreduce_(x),
            lambda x: comm.allreduce(torch.ones(3), out=x),
            lambda x: comm.grouped_allreduce_([x])[0],
            lambda x: comm.allreduce_(x, async_op=True).wait(),
        ):
            x = torch.ones(3)
            version = x._version
            in_place(x)
            assert x._version == version + 1
            y = nn.Parameter(torch.ones(3))
            assert in_place(y) is y and y.requires_grad and y.is_leaf
        for send in (comm.broadcast_, lambda x, root: comm.grouped_broadcast_([x], root)[0]):
            x = nn.Parameter(torch.ones(3))
            version = x._version
            assert send(x, 1) is x and x.requires_grad and x.is_leaf
            assert x._version == version + (comm.rank != 1)  # the root's stays as it is
        saved = torch.ones(3, requires_grad=True)
        product = (saved * saved).sum()
        comm.allreduce_(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        x = torch.ones(3)
        version = x._version
        comm.allreduce(x)
        assert x._version == version

    ranks(2, check)


def test_a_result_made_in_place_is_not_also_made_elsewhere(ranks):
    def check(comm):
        x = np.full((3, 4), comm.rank + 1.0)
        assert comm.allreduce(x, out=x) is x
        assert (x == 3).all()
        y = x[:]  # another object, exactly the same memory
        assert comm.allreduce(x, out=y) is y
        assert (x == 6).all()
        t = torch.from_numpy(x)  # and even of another library
        assert comm.allreduce(x, out=t) is t
        assert (x == 12).all()

    ranks(2, check)


class Refused:
    """Calls that are wrong on their own: (call, exception, part of the message)."""

    x = np.ones(6)
    t = torch.ones(6)
    read_only = np.frombuffer(bytes(48), np.float64)

    def __init__(self, comm):
        every = [comm.allreduce, comm.allreduce_, comm.broadcast, comm.broadcast_, comm.allgather]
        every += [comm.reduce, comm.reduce_scatter]
        one = [
            *every,
            lambda x: comm.grouped_allreduce([x]),
            lambda x: comm.grouped_allreduce_([self.x, x]),
        ]
        one += [lambda x: comm.allreduce(self.x, out=0 if x is None else x)]
        writing = [
            comm.allreduce_,
            comm.broadcast_,
            lambda x: comm.grouped_allreduce_([x]),
            self.out(comm),
        ]
        reducing = [comm.allreduce, comm.allreduce_, comm.reduce, comm.reduce_scatter]
        self.calls = [
            *self.of(
                one,
                [1.5, [1, 2], None, "text", b"bytes", np.float64(1), object()],
                TypeError,
                "expected",
            ),
            *self.of(
                one,
                [np.ones(6, d) for d in ("u2", "u4", "u8", "S1", "O", "M8[s]")],
                TypeError,
                "float64",
            ),
            *self.of(one, [np.ones(6, ">f8")], TypeError, "byte order"),
            *self.of(
                one, [torch.ones(6, device="meta"), torch.ones(6).to_sparse()], TypeError, "use x"
            ),
            *self.of(one, [torch.ones(6).to(torch.float8_e4m3fn)], TypeError, "bfloat16"),
            *self.of(
                writing, [np.broadcast_to(np.ones(1), 6), self.read_only], ValueError, "read-only"
            ),
            *self.of(
                writing, [torch.ones(1, dtype=torch.float64).expand(6)], ValueError, "share memory"
            ),
            *self.of(writing, [torch.ones(6, dtype=torch.complex64).conj()], ValueError, "lazy"),
            # A negative view of one element, which looks contiguous.
            *self.of(writing, [torch.tensor([1 + 2j]).conj().imag], ValueError, "lazy"),
            *self.of(
                [lambda op, f=f: f(self.x, op) for f in reducing],
                ["mean", "SUM", "", None, 0],
                ValueError,
                "sum",
            ),
            *self.of(
                [lambda x, f=f: f(x, "avg") for f in reducing], [self.x > 0], TypeError, "bool"
            ),
            *self.of(
                [lambda op, f=f: f(self.x + 1j, op) for f in reducing],
                ["min", "max"],
                TypeError,
                "complex128",
            ),
            *self.of(
                [
                    lambda root: comm.broadcast(self.x, root),
                    lambda root: comm.broadcast_(self.x, root),
                    lambda root: comm.reduce(self.x, "sum", root),
                    lambda root: comm.broadcast_object(1, root),
                    lambda root: comm.broadcast_parameters({"x": self.t}, root),
                ],
                [-1, comm.size, 2**40],
                ValueError,
                "root",
            ),
            *self.singles(comm),
        ]

    def singles(self, comm):
        return [
            (lambda: comm.broadcast(self.x, 0.5), TypeError, ""),
            (lambda: comm.reduce_scatter(np.array(1.0)), ValueError, "0-d"),
            (lambda: comm.grouped_allreduce(self.x), TypeError, "list"),
            (lambda: comm.grouped_allreduce_([self.x, self.x]), ValueError, "share memory"),
            (lambda: comm.grouped_allreduce_([self.x, self.x[:1]]), ValueError, "share memory"),
            (lambda: comm.grouped_allreduce([self.x, self.x], "mean"), ValueError, "sum"),
            (lambda: comm.grouped_allreduce([self.x, self.x > 0], "avg"), TypeError, "bool"),
            (lambda: comm.allreduce(self.x, out=np.ones(5)), ValueError, "shape"),
            (lambda: comm.allreduce(self.x, out=np.ones((6, 1))), ValueError, "shape"),
            (lambda: comm.allreduce(self.x, out=np.ones(6, np.float32)), TypeError, "dtype"),
            (lambda: comm.allreduce(self.x[:5], out=self.x[1:]), ValueError, "share memory"),
            (lambda: comm.allreduce(self.x, out=self.x[::-1]), ValueError, "share memory"),
            (
                lambda: comm.allreduce(self.t[:4].view(2, 2), out=self.t[:4].view(2, 2).t()),
                ValueError,
                "share",
            ),
            (lambda: comm.empty((2, -1), np.float32), ValueError, "negative"),
            (lambda: comm.empty(3, np.uint16), TypeError, "uint16"),
            (lambda: comm.empty(3, torch.float32, "cuda:0"), TypeError, "cuda"),
            (lambda: comm.empty(2.5, np.float32), TypeError, ""),
            (lambda: comm.split(2**63), ValueError, "64"),
            (lambda: comm.split(0.5), TypeError, ""),
            (lambda: comm.split("red"), TypeError, ""),
        ]

    def out(self, comm):
        def call(out):
            x = (
                torch.ones(out.shape, dtype=out.dtype)
                if isinstance(out, torch.Tensor)
                else np.ones(6)
            )
            return comm.allreduce(x, out=out)

        return call

    @staticmethod
    def of(functions, values, exception, message):
        for function, value in itertools.product(functions, values):
            yield lambda function=function, value=value: function(value), exception, message


def complaint(name, call, exception, message):
    """What is not as it should be about the refusal; None if all is well."""
    try:
        return f"{name} was not refused: {call()!r}"
    except Exception as error:
        if isinstance(error, exception) and message in str(error):
            return None
        return f"{name} raised {type(error).__name__}, {error}"


def test_what_is_wrong_here_is_refused_before_anything_is_sent(ranks):
    def check(comm):
        calls = Refused(comm).calls
        assert len(calls) > 200
        sequence = comm.core.sequence
        complaints = [what for i, call in enumerate(calls) if (what := complaint(i, *call))]
        assert not complaints, "\n".join(complaints)
        assert comm.core.sequence == sequence
        assert (Refused.x == 1).all() and (Refused.t == 1).all()

    ranks(1, check)


def test_the_others_notice_nothing_of_a_refused_call(ranks):
    def check(comm):
        if comm.rank == 1:
            for call, exception, _ in Refused(comm).calls[::11]:
                with pytest.raises(exception):
                    call()
        assert comm.allreduce(np.ones(1)).tolist() == [3]

    ranks(3, check)


def test_counts_the_version_up_where_torch_takes_no_list(monkeypatch):
    of_this_torch = torch._C._increment_version

    def increment_one(x):
        if not isinstance(x, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")
        of_this_torch([x])

    monkeypatch.setattr(torch._C, "_increment_version", increment_one)
    monkeypatch.setattr(tensors._core, "learn_type", lambda *types: None)
    x = torch.ones(2)
    tensors._Torch(torch).mark_written(x)
    assert x._version == 1
