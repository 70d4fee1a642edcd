"""Operands on GPUs, as far as Python goes: devices, streams, packing. Memory and GPUs are fakes."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from expected import DTYPES, exact_values, make, ops_of, reduced
from fake_gpu import FakeCuda, cuda, plain

from ringreduce import _core, arrays, gpu_tensors, runs, tensors
from ringreduce.testing import run_threads


def on_gpu(values, dtype="float32", device=0):
    return cuda(make("torch", values, dtype), device)


def check(x, values, dtype="float32"):
    assert isinstance(x, FakeCuda)
    assert torch.equal(plain(x), make("torch", values, dtype))


def names(log):
    return [entry[0] for entry in log.take()]


# ---- What an operand may be.


def test_device_of_an_operand(fake_gpu):
    x = tensors.describe(on_gpu(np.ones((2, 3)), device=1))
    assert (x.device, x.strides, x.shape) == (1, None, (2, 3)) and str(x) == "cuda float32 (2, 3)"
    assert tensors.describe(torch.ones(2)).device == tensors.describe(np.ones(2)).device == -1


def test_without_cuda_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(_core, "cuda_info", lambda: {"unavailable": "the driver is too old"})
    arrays.cuda_unavailable.cache_clear()
    try:
        for device in ("cuda:1", "cuda"):
            match = rf"no tensor .*{device},.*CPU memory only.*driver is too old"
            with pytest.raises(TypeError, match=match):
                tensors.blank(3, torch.float32, device)
        with pytest.raises(TypeError, match=r"cuda:0,.*driver is too old.*x\.cpu\(\)"):
            tensors.describe(cuda(torch.ones(2)))
    finally:
        arrays.cuda_unavailable.cache_clear()


def test_other_devices_stay_refused(fake_gpu, monkeypatch):
    monkeypatch.setattr(arrays, "cuda_unavailable", lambda: "")
    with pytest.raises(TypeError, match=r"device meta, .*of the CPU and of CUDA only"):
        tensors.describe(torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="device mps"):
        tensors.blank(2, torch.float32, "mps")
    with pytest.raises(ValueError, match="'cuda:x' names no GPU"):
        tensors.blank(2, torch.float32, "cuda:x")


def test_operands_on_two_devices(fake_gpu):
    def run(comm):
        x = on_gpu(np.ones(3))
        for out, where in ((torch.ones(3), "the CPU"), (on_gpu(np.ones(3), device=1), "cuda:1")):
            with pytest.raises(ValueError, match=f"cuda:0, .*on {where}"):
                comm.allreduce(x, out=out)
        assert not fake_gpu.take() and comm.core.sequence == 0  # nothing was sent

    run_threads(2, run)


def test_default_stream_of_threads(fake_gpu):
    def run(comm):
        for stream in (0, 1, 2):
            fake_gpu.stream = stream
            for call in (comm.allreduce_, comm.allreduce, comm.broadcast, comm.reduce_scatter):
                with pytest.raises(ValueError, match="default stream"):
                    call(on_gpu(np.ones(3)))
            with pytest.raises(ValueError, match="default stream"):
                comm.grouped_allreduce_([on_gpu(np.ones(3)), on_gpu(np.ones(3))])
            with pytest.raises(ValueError, match="default stream"):
                comm.allgather(on_gpu(np.ones(3)))
        assert comm.core.sequence == 0
        assert torch.equal(comm.allreduce(torch.ones(2)), torch.full((2,), 2.0))

    run_threads(2, run)


def test_default_stream_of_processes_and_of_one_rank(fake_gpu):
    def run(comm):
        comm.bootstrap.in_process = False
        fake_gpu.stream = 0
        check(comm.allreduce(on_gpu(np.ones(3))), np.full(3, comm.size))

    run_threads(2, run)

    def run_alone(comm):
        fake_gpu.stream = 0
        check(comm.allreduce(on_gpu(np.ones(3))), np.ones(3))

    run_threads(1, run_alone)


# ---- Each collective.


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_collective(fake_gpu, dtype):
    size, shape = 3, (7, 2)
    for op in ops_of(dtype):
        inputs = [exact_values(shape, dtype, op, rank) for rank in range(size)]
        total = reduced(inputs, op, dtype)
        parts = np.array_split(total, size)

        def run(comm, op=op, inputs=inputs, total=total, parts=parts):
            x = on_gpu(inputs[comm.rank], dtype)
            check(comm.allreduce(x, op), total, dtype)
            check(comm.reduce_scatter(x, op), parts[comm.rank], dtype)
            check(
                comm.allgather(x[: comm.rank]),
                np.concatenate([inputs[1][:1], inputs[2][:2]]),
                dtype,
            )
            check(comm.allgather(x[0, 0]), np.array([y[0, 0] for y in inputs]), dtype)
            check(comm.broadcast(x, 2), inputs[2], dtype)
            rooted = comm.reduce(x, op, 1)
            assert (rooted is not None) == (comm.rank == 1)
            if rooted is not None:
                check(rooted, total, dtype)
            check(x, inputs[comm.rank], dtype)
            y = x.clone()
            assert comm.allreduce(x, op, out=y) is y
            check(y, total, dtype)
            assert comm.allreduce_(x, op) is x
            check(x, total, dtype)

        run_threads(size, run)


def test_a_plain_operand_is_not_copied(fake_gpu):
    def run(comm):
        x = on_gpu(np.ones((3, 4)))
        version = x._version
        comm.allreduce_(x)
        assert x._version > version
        comm.allreduce(x)
        comm.broadcast_(x)
        comm.reduce_scatter(x)
        assert names(fake_gpu) == ["allreduce", "allreduce", "broadcast", "reduce_scatter"]
        comm.grouped_allreduce_([x])
        assert names(fake_gpu) == ["allreduce"]

    run_threads(2, run)


def test_strided_operands_are_packed_and_unpacked(fake_gpu):
    values = np.arange(24.0).reshape(4, 6)

    def run(comm):
        wide = on_gpu(np.zeros((4, 12)))
        x = wide[:, ::2]
        x.copy_(on_gpu(values * (comm.rank + 1)))
        columns = on_gpu(np.ascontiguousarray(values.T) * (comm.rank + 1)).t()
        check(comm.allreduce(x), values * 3)  # contiguous: x is not dense
        assert names(fake_gpu) == ["flatten", "allreduce"]
        check(comm.allreduce(columns).contiguous(), values * 3)  # the result has such strides, too
        assert names(fake_gpu) == ["flatten", "allreduce", "assign", "record"]
        check(comm.reduce_scatter(x), values[comm.rank * 2 :][:2] * 3)
        check(comm.allgather(x), np.concatenate([values, values * 2]))
        fake_gpu.take()
        y = on_gpu(values * (comm.rank + 1))
        out = wide[:, 1::2]
        assert comm.allreduce(y, out=out) is out
        assert names(fake_gpu) == ["allreduce", "assign", "record"]
        check(out.contiguous(), values * 3)
        assert comm.allreduce_(x) is x
        check(x.contiguous(), values * 3)
        check(wide[:, 1::2].contiguous(), values * 3)  # what lies between has not changed
        comm.allreduce(x, out=x)
        check(x.contiguous(), values * 6)
        comm.broadcast_(x[:, :2])
        check(x.contiguous(), values * 6)

    run_threads(2, run)


def test_groups_travel_in_one_piece_of_memory_for_each_dtype_and_device(fake_gpu):
    def run(comm):
        xs = [
            on_gpu(np.full((2, 3), 1.0 + comm.rank)),
            on_gpu(np.full(4, 2 + comm.rank), "int64"),
            on_gpu(np.zeros((3, 0))),
            on_gpu(np.full((5, 2), 3.0 + comm.rank))[:, 1],
            torch.full((2,), 4.0 + comm.rank),
            on_gpu(np.full((), 5.0 + comm.rank)),
        ]
        values = [3.0, 5, 0.0, 7.0, 9.0, 11.0]
        for call in (comm.grouped_allreduce, comm.grouped_allreduce_):
            results = call(xs)
            assert [type(x) for x in results] == [type(x) for x in xs]
            for x, result, value in zip(xs, results, values, strict=True):
                assert result.shape == x.shape and result.dtype == x.dtype
                assert (plain(result) == value).all()
                assert (result is x) == (call == comm.grouped_allreduce_)
            entries = fake_gpu.take()
            assert [entry[0] for entry in entries] == [
                *("flatten", "allreduce", "assign", "record", "allreduce")
            ]
            shapes = entries[1][3]
            assert shapes[:4] == [(2, 3), (3, 0), (5,), ()] and shapes[4][0] == 0  # and the stamp
        assert comm.grouped_allreduce([]) == []
        comm.grouped_broadcast_(xs, 1)
        assert (plain(xs[0]) == 3.0).all()

    run_threads(2, run)


def test_different_lists_are_a_mismatch(fake_gpu):
    from ringreduce.errors import MismatchError

    def run(comm):
        x, y = on_gpu(np.ones(3)), on_gpu(np.ones(2), "int64")
        with pytest.raises(MismatchError):
            comm.grouped_allreduce([x, y] if comm.rank else [y, x])
        with pytest.raises(MismatchError):
            comm.grouped_allreduce([x, y] if comm.rank else [torch.ones(3), y])
        with pytest.raises(MismatchError):
            comm.allgather(on_gpu(np.ones((2, 2 + comm.rank))))
        check(comm.allreduce(x), np.full(3, 2))

    run_threads(2, run)


def test_allgather_meets_before_it_allocates(fake_gpu):
    def run(comm):
        fake_gpu.take()
        work = comm.allgather(on_gpu(np.full((comm.rank, 2), comm.rank)), async_op=True)
        assert [entry[0] for entry in fake_gpu.take()] == ["allgather"]
        check(work.wait(), np.array([[1, 1], [2, 2], [2, 2]]))
        result, rows = comm.gather_rows(on_gpu(np.full((comm.rank, 2), comm.rank))).wait()
        assert rows == [0, 1, 2] and result.shape == (3, 2)
        result, rows = comm.gather_rows(torch.ones(comm.rank, 2)).wait()
        assert rows == [0, 1, 2] and result.shape == (3, 2)

    run_threads(3, run)


# ---- Streams.


def test_calls_are_on_the_current_stream(fake_gpu):
    def run(comm):
        own = fake_gpu.stream
        assert own >= 100
        comm.allreduce_(on_gpu(np.ones(3)))
        fake_gpu.stream = 7 + comm.rank
        comm.allreduce_(on_gpu(np.ones(3)))
        assert [entry[1] for entry in fake_gpu.take()] == [own, 7 + comm.rank]
        return own

    assert len(set(run_threads(3, run))) == 3


def test_wait_is_for_the_stream_of_who_waits(fake_gpu):
    def run(comm):
        own = fake_gpu.stream
        x = on_gpu(np.ones(3))
        work = comm.allreduce_(x, async_op=True)
        fake_gpu.take()
        fake_gpu.stream = 7
        assert work.wait() is x and work.wait() is x
        assert fake_gpu.take() == [("wait", 7, 7)] * 2
        fake_gpu.stream = own
        work.wait(10.0)
        assert fake_gpu.take() == [("wait", own, own)]
        check(x, np.full(3, 2))
        assert work.done() and work.times_ns()[0] <= work.times_ns()[1]

    run_threads(2, run)


def test_asynchronous_results_are_unpacked_once_by_who_waits_first(fake_gpu):
    def run(comm):
        own = fake_gpu.stream
        xs = [on_gpu(np.ones((3, 2)))[:, 1], on_gpu(np.ones(4))]
        work = comm.grouped_allreduce(xs, async_op=True)
        assert names(fake_gpu) == ["flatten", "allreduce"]
        fake_gpu.stream = 7
        results = work.wait()
        # What was packed came from `own`, which must not use its memory again before.
        expected = [("wait", 7, 7), ("assign", 7), ("record", 7), ("hold back", 7, own, 7)]
        assert fake_gpu.take() == expected
        results[0].zero_()
        work.wait()
        assert fake_gpu.take() == [("wait", 7, 7)]
        fake_gpu.stream = 8
        assert work.wait() is results
        assert fake_gpu.take() == [("wait", 8, 8), ("hold back", 8, 8, 7)]
        assert (plain(results[0]) == 0).all() and (plain(results[1]) == 2).all()

    run_threads(2, run)


def test_the_default_stream_waits_too(monkeypatch):
    """torch makes a new stream of its address, which is 0."""
    waits = []

    class Stream:
        def __init__(self, address):
            assert address != 0
            self.address = address

        def record_event(self):
            return f"event on {self.address}"

        def wait_event(self, event):
            waits.append((self.address, event))

        def wait_stream(self, other):
            waits.append((self.address, other.address))

    default = Stream("default")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: Stream(address))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(7))
    framework = tensors._torch_framework()
    event = framework.event(0)
    event(0)
    event(8)
    assert waits == [("default", "event on 7"), (8, "event on 7")]
    waits.clear()
    current = 0
    monkeypatch.setattr(type(framework), "stream", lambda self, device: current)
    streams = runs._Streams(torch.ones(3))
    streams.note()
    current = 9
    with streams.joined():
        assert waits == [(9, "default")]
    assert waits == [(9, "default"), ("default", 9)]


def test_check_asks_the_core(fake_gpu):
    def run(comm):
        comm.check()
        assert names(fake_gpu) == ["check"]

    run_threads(1, run)


# ---- Symmetric tensors, and threads that are ranks.


def test_empty_on_a_gpu(fake_gpu):
    def run(comm):
        x = comm.empty((3, 2), torch.bfloat16, device="cuda")
        assert isinstance(x, FakeCuda) and x.shape == (3, 2) and x.dtype == torch.bfloat16
        assert comm.empty(4, torch.float32, torch.device("cuda:1")).device.index == 1
        assert comm.empty((2, 0), torch.float32, "cuda").shape == (2, 0)
        x.fill_(comm.rank)
        comm.allreduce_(x)
        assert (plain(x) == 1).all()
        assert comm.core.is_symmetric(x.data_ptr(), 12)

    run_threads(2, run)


def test_threads_get_streams_and_their_own_backward(monkeypatch):
    """Of a torch that has two GPUs: what it is asked for."""
    asked = []
    cuda_of_torch = types.SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 1,
        device_count=lambda: 2,
        Stream=lambda device: f"stream on {device}",
        set_stream=asked.append,
        set_device=asked.append,
    )
    monkeypatch.setattr(torch, "cuda", cuda_of_torch)
    monkeypatch.setattr(gpu_tensors, "cuda_unavailable", lambda: "")
    monkeypatch.setattr(
        torch.autograd, "set_multithreading_enabled", lambda on: asked.append(f"threads {on}")
    )
    gpu_tensors.separate_thread()
    assert asked == ["threads False", "stream on 0", "stream on 1", 1]


def test_cupy_is_missed_by_name(fake_gpu):
    if gpu_tensors._known:
        pytest.skip("there is a cupy")
    with pytest.raises(TypeError, match="cupy"):
        tensors.blank(3, "float32", "cuda")
