"""Random programs of collectives, against a model of what they do: any mixture of kinds, dtypes,
layouts, memory, blocking and asynchronous calls, waited for in another order on each rank."""

import random
import time

import numpy as np
import pytest
import torch
from expected import (
    ALGORITHMS,
    DTYPES,
    assert_equal,
    bits_of,
    exact_values,
    frameworks_of,
    make,
    ops_of,
    reduced,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringreduce import MismatchError, testing

SETTINGS = settings(
    deadline=None,  # each run of ranks has a hard time limit instead
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TIME_LIMIT_S = 30

KINDS = (
    *(
        "allreduce",
        "allreduce out",
        "allreduce in place",
        "grouped",
        "grouped in place",
        "symmetric",
    ),
    *(
        "reduce_scatter",
        "allgather",
        "broadcast",
        "broadcast in place",
        "reduce",
        "barrier",
        "mismatch",
    ),
)
LAYOUTS = ("contiguous", "transposed", "stepped", "reversed", "offset")


@st.composite
def shapes(draw, size, kind):
    counts = st.one_of(
        st.sampled_from([0, 1, size - 1, size, size + 1, 127, 1021]),
        st.integers(0, 70),
        st.sampled_from([2**14 - 1, 2**14 + 1, 2**16, 100_003]),
    )
    first = draw(counts)
    rest = tuple(draw(st.lists(st.integers(0, 4), max_size=2))) if first < 2000 else ()
    if kind != "reduce_scatter" and first == 1 and draw(st.booleans()):
        return ()
    return (first, *rest)


@st.composite
def calls(draw, size):
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from(DTYPES))
    call = {
        "kind": kind,
        "dtype": dtype,
        "op": draw(st.sampled_from(ops_of(dtype))),
        "framework": draw(st.sampled_from(frameworks_of(dtype))),
        "shape": draw(shapes(size, kind)),
        "root": draw(st.integers(0, size - 1)),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=size, max_size=size)),
        "asynchronous": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }
    if kind == "allgather" and call["shape"]:
        call["rows"] = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    return call


@st.composite
def programs(draw):
    size = draw(st.sampled_from((1, 2, 3, 4, 5, 8)))
    return {
        "size": size,
        "algorithm": draw(st.sampled_from(ALGORITHMS)),
        "delays": draw(st.booleans()),
        "calls": draw(st.lists(calls(size), min_size=1, max_size=10)),
    }


def lay_out(framework, values, dtype, layout):
    """The values in new memory of this layout."""
    x = make(framework, values, dtype)
    if layout == "contiguous" or values.ndim == 0:
        return x
    if layout == "transposed":
        back = tuple(range(values.ndim))[::-1]
        y = (
            np.ascontiguousarray(x.transpose())
            if framework == "numpy"
            else x.permute(back).contiguous()
        )
        return y.transpose() if framework == "numpy" else y.permute(back)
    rows, rest = values.shape[0], values.shape[1:]
    memory = make(framework, np.zeros((2 * rows + 3, *rest)), dtype)
    if layout == "stepped":
        view = memory[1 : 2 * rows + 1 : 2]
    elif layout == "reversed" and framework == "numpy":
        view = memory[rows:0:-1] if rows else memory[:0]
    else:
        view = memory[3 : rows + 3]
    view[...] = x
    return view


class Step:
    """One call of a program on all ranks: its inputs, and what each rank must get."""

    def __init__(self, call, size):
        self.call, self.size = call, size
        self.shapes = [call["shape"]] * size
        if "rows" in call:
            self.shapes = [(rows, *call["shape"][1:]) for rows in call["rows"]]
        self.inputs = [self.values(rank, 0) for rank in range(size)]
        kind, dtype, op = call["kind"], call["dtype"], call["op"]
        if kind == "allgather":
            whole = np.concatenate([np.atleast_1d(x) for x in self.inputs])
        elif "broadcast" in kind:
            whole = self.inputs[call["root"]]
        else:
            whole = reduced(self.inputs, op, dtype)
        self.results = [whole] * size
        if kind == "reduce_scatter":
            self.results = np.array_split(whole, size)
        self.second = None
        if "grouped" in kind:
            self.second = reduced([self.values(rank, 1) for rank in range(size)], op, dtype)

    def values(self, rank, number):
        seed = (rank, self.call["seed"], number)
        return exact_values(self.shapes[rank], self.call["dtype"], self.call["op"], seed)

    def operand(self, comm, number=0):
        call = self.call
        values = self.values(comm.rank, number)
        layout = call["layouts"][comm.rank]
        return lay_out(call["framework"], values, call["dtype"], layout)

    def issue(self, comm):
        """Makes the call; returns a function that checks its result."""
        call, kind = self.call, self.call["kind"]
        options = {"async_op": call["asynchronous"]}
        op, root = call["op"], call["root"]
        if kind == "barrier":
            return self.checker(comm.barrier(**options), None, lambda result: result is None)
        if kind == "mismatch":
            return self.mismatch(comm)
        x = self.operand(comm)
        before = bits_of(x)
        others = [x]
        if kind == "allreduce":
            returned = comm.allreduce(x, op, **options)
        elif kind == "allreduce out":
            out = self.operand(comm)
            returned = comm.allreduce(x, op, out=out, **options)
        elif kind == "allreduce in place":
            returned, others = comm.allreduce_(x, op, **options), []
        elif kind == "grouped":
            y = self.operand(comm, 1)
            returned = comm.grouped_allreduce([x, y, x], op, **options)
        elif kind == "grouped in place":
            y = self.operand(comm, 1)
            returned, others = comm.grouped_allreduce_([x, y], op, **options), []
        elif kind == "symmetric":
            numpy_or_torch = x.dtype
            s = comm.empty(call["shape"], numpy_or_torch)
            s[...] = x
            del x
            returned, others = comm.allreduce_(s, op, **options), []
        elif kind == "reduce_scatter":
            returned = comm.reduce_scatter(x, op, **options)
        elif kind == "allgather":
            returned = comm.allgather(x, **options)
        elif kind == "broadcast":
            returned = comm.broadcast(x, root, **options)
        elif kind == "broadcast in place":
            returned, others = comm.broadcast_(x, root, **options), []
        else:
            returned = comm.reduce(x, op, root, **options)
        return self.checker(returned, others, lambda result: self.right(comm, result), before)

    def right(self, comm, result):
        call = self.call
        if call["kind"] == "reduce" and comm.rank != call["root"]:
            return result is None
        if "grouped" in call["kind"]:
            assert_equal(result[1], self.second, call)
            result = result[0]
        assert_equal(result, self.results[comm.rank], call)
        return True

    def checker(self, returned, untouched, right, before=b""):
        def check():
            result = returned.wait() if self.call["asynchronous"] else returned
            assert right(result), self.call
            assert all(bits_of(x) == before for x in untouched or ()), self.call

        return check

    def mismatch(self, comm):
        if comm.size == 1:
            return lambda: None
        count = 10 + (comm.rank == self.call["root"])
        x = np.ones(count, np.int16)
        if not self.call["asynchronous"]:
            with pytest.raises(MismatchError):
                comm.allreduce_(x)
            return lambda: None
        work = comm.allreduce_(x, async_op=True)

        def check():
            with pytest.raises(MismatchError):
                work.wait()
            assert (x == 1).all()

        # Before the next call, which would raise it in this one's place.
        check()
        return lambda: None


def run_program(runner, program):
    steps = [Step(call, program["size"]) for call in program["calls"]]

    def rank(comm):
        order = random.Random(comm.rank)
        open_checks = []
        for step in steps:
            if program["delays"]:
                time.sleep(order.random() * 1e-3)
            open_checks.append(step.issue(comm))
            while order.random() < 0.4 and open_checks:
                open_checks.pop(order.randrange(len(open_checks)))()
        order.shuffle(open_checks)
        for check in open_checks:
            check()

    runner(program["size"], rank, algorithm=program["algorithm"], timeout_s=TIME_LIMIT_S)


@given(programs())
@settings(SETTINGS, max_examples=150)
def test_programs_of_threads(program):
    run_program(testing.run_threads, program)


@given(programs())
@settings(SETTINGS, max_examples=40)
def test_programs_of_forks(program):
    run_program(testing.run_forks, program)


@given(
    st.sampled_from((2, 3, 5)),
    st.lists(st.integers(0, 3) | st.none(), min_size=5, max_size=5),
    st.lists(st.integers(-2, 2), min_size=5, max_size=5),
)
@settings(SETTINGS, max_examples=40)
def test_splits(size, colors, keys):
    def rank(comm):
        color = colors[comm.rank]
        part = comm.split(color, keys[comm.rank])
        members = [r for r in range(size) if colors[r] == color]
        if color is None:
            assert part is None
        else:
            members.sort(key=lambda r: (keys[r], r))
            assert part.size == len(members) and members[part.rank] == comm.rank
            assert part.allgather(np.array([comm.rank])).tolist() == members
        comm.barrier()

    testing.run_threads(size, rank, timeout_s=TIME_LIMIT_S)


@given(
    st.lists(st.tuples(st.integers(1, 400_000), st.integers(0, 7)), min_size=1, max_size=25),
    st.integers(0, 2**16),
)
@settings(SETTINGS, max_examples=60)
def test_symmetric_memory_is_never_given_twice(requests, seed):
    """(bytes, how many to keep) in turn; each rank drops others of those that it holds."""

    def rank(comm):
        order = random.Random(seed + comm.rank)
        held = []
        for number, (size_bytes, keep) in enumerate(requests):
            x = comm.empty(size_bytes, torch.uint8)
            x.fill_(number * 3 + comm.rank)
            held.append((number, x))
            del x
            while len(held) > keep:
                number, x = held.pop(order.randrange(len(held)))
                assert (x == number * 3 + comm.rank).all()
                del x
        for number, x in held:
            assert (x == number * 3 + comm.rank).all()

    testing.run_threads(3, rank, timeout_s=TIME_LIMIT_S)
