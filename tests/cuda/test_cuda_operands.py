"""Operands on a GPU: strided, grouped, asynchronous, symmetric; of torch, of cupy; streams."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import ringreduce as rr
from ringreduce import tensors
from ringreduce.testing import run_threads

pytestmark = pytest.mark.cuda

SLEEP_CYCLES = 800_000_000  # of the GPU: a third of a second or more


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.arange(count, device="cuda").remainder(97).to(dtype).view(shape)


def test_strided_operands():
    def run(comm):
        total, factor = ramp(6, 10) * 6, comm.rank + 1
        wide = torch.full((6, 20), -1.0, device="cuda")
        columns = (ramp(6, 10) * factor).t().contiguous().t()
        stepped = wide[:, ::2]
        stepped.copy_(ramp(6, 10) * factor)
        for x in (columns, stepped, ramp(6, 10) * factor):
            assert torch.equal(comm.allreduce(x), total)
            assert torch.equal(comm.reduce_scatter(x), total[comm.rank * 2 :][:2])
            assert torch.equal(comm.allgather(x)[6:12], ramp(6, 10) * 2)
            out = torch.empty(10, 6, device="cuda").t()
            assert comm.allreduce(x, out=out) is out and torch.equal(out, total)
            assert torch.equal(comm.broadcast(x, 1), ramp(6, 10) * 2)
        assert comm.allreduce(columns).stride() == columns.stride()
        comm.allreduce_(stepped)
        assert torch.equal(stepped, total) and bool((wide[:, 1::2] == -1).all())
        work = comm.allreduce_(wide[:, 1::2], async_op=True)
        assert bool((work.wait() == -3).all()) and torch.equal(stepped, total)

    run_threads(3, run)


@pytest.mark.parametrize("async_op", [False, True])
def test_grouped(async_op):
    def run(comm):
        def mine():
            return [
                ramp(3, 5) * (comm.rank + 1),
                ramp(1000, dtype=torch.bfloat16),
                torch.full((7,), comm.rank, dtype=torch.int64, device="cuda"),
                torch.empty(0, device="cuda"),
                (ramp(4, 6) * (comm.rank + 1)).t(),
                torch.full((2,), float(comm.rank)),  # on the CPU
                torch.ones((), device="cuda"),
            ]

        for call in (comm.grouped_allreduce, comm.grouped_allreduce_):
            xs = mine()
            work = call(xs, async_op=async_op)
            results = work.wait() if async_op else work
            assert torch.equal(results[0], ramp(3, 5) * 6)
            assert torch.equal(results[1], comm.allreduce(mine()[1]))
            assert results[2].tolist() == [3] * 7 and results[3].numel() == 0
            assert torch.equal(results[4], (ramp(4, 6) * 6).t())
            assert results[5].tolist() == [3.0, 3.0] and not results[5].is_cuda
            assert results[6].item() == 3.0
            assert (results[0] is xs[0]) == (call == comm.grouped_allreduce_)
        xs = mine()
        comm.grouped_broadcast_(xs, 2)
        assert torch.equal(xs[0], ramp(3, 5) * 3) and xs[2].tolist() == [2] * 7

    run_threads(3, run)


def test_asynchronous_calls_in_order():
    def run(comm):
        xs = [torch.full((1000 * i + 1,), float(comm.rank + i), device="cuda") for i in range(20)]
        works = [comm.allreduce_(x, async_op=True) for x in xs]
        gathered = comm.allgather(torch.full((comm.rank + 1,), comm.rank).cuda(), async_op=True)
        for i, (x, work) in enumerate(zip(xs, works, strict=True)):
            assert work.wait() is x and bool((x == 3 + 3 * i).all())
        assert gathered.wait().tolist() == [0, 1, 1, 2, 2, 2]
        torch.cuda.current_stream().synchronize()
        assert all(work.done() for work in works)

    run_threads(3, run)


def test_the_host_does_not_wait_for_the_device():
    """Nor do results come before the operands are there."""

    def run(comm):
        comm.allreduce_(torch.ones(1000, device="cuda"))  # the first call sets things up
        torch.cuda.current_stream().synchronize()
        x = torch.zeros(100_000, device="cuda")
        torch.cuda._sleep(SLEEP_CYCLES)
        x.fill_(comm.rank + 1)
        after = torch.cuda.Event()
        comm.allreduce_(x)
        after.record()
        assert not after.query(), "the call has waited for the device"
        assert bool((x == 3).all())
        torch.cuda._sleep(SLEEP_CYCLES)
        x.fill_(comm.rank + 1)
        work = comm.allreduce_(x, async_op=True)
        assert not work.done()
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            work.wait()
            y = x * 2  # on a stream that knows nothing of the first one
        assert not work.done()
        torch.cuda.current_stream().wait_stream(other)
        assert bool((y == 6).all()) and work.done()
        torch.cuda._sleep(SLEEP_CYCLES)
        work = comm.allreduce_(x, async_op=True)
        with pytest.raises(TimeoutError):
            work.wait(0.01)
        work.wait(60.0)
        assert work.done()

    run_threads(2, run)


def test_a_stream_is_found_by_its_address():
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        device = stream.device_index
        assert tensors.torch_stream(stream.cuda_stream, device).cuda_stream == stream.cuda_stream


def test_symmetric_tensors():
    def run(comm):
        x = comm.empty((1000, 30), torch.float32, device="cuda")
        assert x.is_cuda and comm.core.is_symmetric(x.data_ptr(), x.nbytes)
        for offset in (0, 1, 4):  # elements; another one on each rank
            part = x.view(-1)[offset + comm.rank :][:20_001]
            part.copy_(ramp(20_001) * (comm.rank + 1))
            comm.allreduce_(part)
            assert torch.equal(part, ramp(20_001) * 6)
        mixed = x.view(-1)[:5000] if comm.rank else torch.empty(5000, device="cuda")
        mixed.copy_(ramp(5000))
        assert torch.equal(comm.allreduce(mixed), ramp(5000) * 3)
        assert comm.empty((0, 2), torch.float32, "cuda").shape == (0, 2)
        sizes = []
        for _ in range(20):  # given back, and used again
            y = comm.empty(1 << 20, torch.uint8, f"cuda:{torch.cuda.current_device()}")
            y.fill_(1)
            comm.allreduce_(y)
            assert bool((y == 3).all())
            del y
            gc.collect()
            sizes.append(comm.core.gpu_info()["symmetric_bytes"])
        assert sizes[3] == sizes[-1]

    run_threads(3, run)


def test_wrong_use_is_said_before_anything_is_sent():
    def run(comm):
        x = torch.ones(4, device="cuda")
        with pytest.raises(ValueError, match="the CPU"):
            comm.allreduce(x, out=torch.ones(4))
        with pytest.raises(ValueError, match="share memory"):
            comm.allreduce_(torch.ones(1, device="cuda").expand(3))
        default = torch.cuda.default_stream()
        with torch.cuda.stream(default), pytest.raises(ValueError, match="default stream"):
            comm.allreduce_(x)
        assert comm.allreduce(x).tolist() == [2.0] * 4

    run_threads(2, run)


def test_mismatches_are_told_to_all_and_forgotten():
    def run(comm):
        r = comm.rank
        x = torch.ones(10, device="cuda")
        for call in (
            lambda: comm.allreduce(x[: 10 - r]),
            lambda: comm.allreduce(x, ("sum", "max")[r]),
            lambda: comm.allreduce(x.double() if r else x),
            lambda: comm.allreduce(x.cpu() if r else x),
            lambda: comm.broadcast(x, r),
            lambda: (comm.allreduce, comm.broadcast)[r](x),
            lambda: comm.allgather(x.view(5, 2) if r else x.view(2, 5)),
            lambda: comm.grouped_allreduce([x, x] if r else [x, x.double()]),
            lambda: comm.allreduce_(x.clone() if r else x[:5].clone(), async_op=True).wait(),
        ):
            with pytest.raises(rr.MismatchError, match="rank"):
                call()
        assert comm.allreduce(x).tolist() == [2.0] * 10
        comm.check()

    run_threads(2, run)


def test_cupy():
    cupy = pytest.importorskip("cupy")

    def run(comm):
        x = cupy.arange(1001, dtype="float32") * (comm.rank + 1)
        total = np.arange(1001, dtype="float32") * 6
        assert (cupy.asnumpy(comm.allreduce(x)) == total).all()
        assert (cupy.asnumpy(comm.allreduce(x[::3])) == total[::3]).all()
        assert cupy.asnumpy(comm.allgather(x[: comm.rank])).tolist() == [0.0, 0.0, 3.0]
        assert (cupy.asnumpy(comm.reduce_scatter(x)) == np.array_split(total, 3)[comm.rank]).all()
        work = comm.grouped_allreduce_([x, x[:0], cupy.ones((2, 3), "int32").T], async_op=True)
        assert (cupy.asnumpy(work.wait()[0]) == total).all()
        y = comm.empty((4, 5), "float64", device="cuda")
        assert isinstance(y, cupy.ndarray) and y.flags.c_contiguous
        y.fill(comm.rank)
        assert (cupy.asnumpy(comm.allreduce_(y)) == 3).all()
        with pytest.raises(ValueError, match="one library"):
            comm.grouped_allreduce([x, torch.ones(3, device="cuda")])

    run_threads(3, run)
