"""Ranks that are processes and share the GPU: through host memory. And what dies, or comes late."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.cuda

EVERYTHING = """
import numpy as np, torch
import ringreduce as rr
from expected import DTYPES, exact_values, make, ops_of, reduced, values_of
world = rr.world()
wrong = cases = 0
for dtype in DTYPES:
    for op in ops_of(dtype):
        for count in (1, 1001, 70_001):
            inputs = [exact_values((count,), dtype, op, rank) for rank in range(world.size)]
            total = reduced(inputs, op, dtype)
            x = make("torch", inputs[world.rank], dtype).cuda()
            found = [
                (rr.allreduce(x, op), total),
                (rr.reduce_scatter(x, op), np.array_split(total, world.size)[world.rank]),
                (rr.allgather(x[: world.rank + 1]),
                 np.concatenate([y[: i + 1] for i, y in enumerate(inputs)])),
                (rr.broadcast(x, 1), inputs[1]),
                (rr.allreduce_(x, op, async_op=True).wait(), total),
            ]
            for result, values in found:
                cases += 1
                wrong += not np.array_equal(values_of(result.cpu()), values)
large = torch.full((30_000_001,), 1.0 + world.rank, device="cuda")
wrong += not bool((rr.allreduce_(large) == sum(range(1, world.size + 1))).all())
symmetric = rr.empty(1_000_003, torch.float32, device="cuda").fill_(world.rank)
wrong += not bool((rr.allreduce_(symmetric) == sum(range(world.size))).all())
rr.world().check()
print(f"{world.core.gpu_info()['path']}: {cases} cases, {wrong} wrong", flush=True)
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_that_share_the_gpu(mpirun, ranks, tests_path):
    done = mpirun(ranks, EVERYTHING, timeout_s=150.0, env=tests_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == ranks and len(set(lines)) == 1, done.stdout
    assert lines[0].startswith("host: ") and lines[0].endswith(" 0 wrong")


GRAPH = """
import torch, ringreduce as rr
x = torch.ones(1000, device="cuda")
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    rr.allreduce_(x)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            rr.allreduce_(x)
    except ValueError as error:
        print("refused:", error, flush=True)
print(rr.allreduce(torch.ones(1, device="cuda")).item(), flush=True)
"""


def test_the_way_through_the_host_cannot_be_recorded(mpirun):
    done = mpirun(2, GRAPH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 2 and done.stdout.count("host memory") >= 2
    assert done.stdout.splitlines().count("2.0") == 2


KILLED = """
import os, signal, sys, torch
import ringreduce as rr
rr.init(timeout=30.0)
x = torch.ones(1_000_000, device="cuda")
rr.allreduce_(x)
if rr.rank() == 1:
    torch.cuda.synchronize()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        if rr.rank() == 0:
            rr.allreduce_(x)
        else:
            rr.allreduce_(x, async_op=True).wait()
except rr.PeerFailed as error:
    print(f"rank {rr.rank()} says: {error}", file=sys.stderr, flush=True)
    raise
"""


def test_a_killed_rank_is_named(mpirun, mpi_name):
    if mpi_name != "Open MPI":
        pytest.skip("this launcher ends all ranks at once")
    done = mpirun(3, KILLED)
    assert done.returncode != 0
    assert "PeerFailed" in done.stderr and "rank 1" in done.stderr, done.stderr


LATE = """
import time, torch
import ringreduce as rr
rr.init(timeout=3.0)
x = torch.ones(1000, device="cuda")
rr.allreduce_(x)
if rr.rank() == 1:
    time.sleep(60)
rr.allreduce_(x)
"""


def test_a_late_rank_is_named(mpirun):
    done = mpirun(2, LATE)
    assert done.returncode != 0
    assert "CollectiveTimeout" in done.stderr and "rank 1" in done.stderr, done.stderr


TORCH = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import ringreduce.c10d as backend
backend.init_process_group()
rank, size = dist.get_rank(), dist.get_world_size()
def cuda(*values): return torch.tensor(values, device="cuda", dtype=torch.float64)
x = cuda(1.0, rank)
work = dist.all_reduce(x, async_op=True)
torch.cuda._sleep(50_000_000)
work.wait()
assert x.tolist() == [size, sum(range(size))], x
rows = [torch.empty(2, device="cuda", dtype=torch.float64) for _ in range(size)]
dist.all_gather(rows, cuda(rank, 7))
assert [row.tolist() for row in rows] == [[r, 7] for r in range(size)]
flat = torch.empty(size, device="cuda", dtype=torch.float64)
dist.all_gather_into_tensor(flat, cuda(rank))
assert flat.tolist() == list(range(size))
part = torch.empty(1, device="cuda", dtype=torch.float64)
dist.reduce_scatter_tensor(part, cuda(*range(size)))
assert part.item() == rank * size
y = cuda(rank)
dist.broadcast(y, 1)
assert y.item() == 1
future = dist.all_reduce(cuda(rank), async_op=True).get_future().then(lambda f: f.value()[0] * 2)
assert future.wait().item() == 2 * sum(range(size))
z = cuda(0, 0)
if rank == 0:
    dist.send(cuda(5, 6), 1)
    assert dist.recv(z) == 1 and z.tolist() == [7, 8]  # from any source
if rank == 1:
    dist.recv(z, 0)
    assert z.tolist() == [5, 6]
    dist.send(cuda(7, 8), 0)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double().cuda()
data = torch.randn(size * 8, 16, dtype=torch.float64).cuda()
alone = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).double().cuda()
alone.load_state_dict(model.state_dict())
alone(data).square().mean().backward()
for options in ({}, {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}):
    model.zero_grad()
    ddp = DistributedDataParallel(model, device_ids=[0], **options)
    for _ in range(2):
        ddp.zero_grad()
        ddp(data[rank * 8 :][:8]).square().mean().backward()
    for a, b in zip(model.parameters(), alone.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-12
print("good", flush=True)
dist.destroy_process_group()
"""


def test_torch_distributed(mpirun):
    done = mpirun(2, TORCH, timeout_s=120.0)
    assert done.returncode == 0 and done.stdout.count("good") == 2, done.stderr


HOROVOD = """
import torch
import ringreduce.compat.horovod as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
x = torch.full((5,), float(rank), device="cuda")
assert hvd.allreduce(x, op=hvd.Sum).tolist() == [sum(range(size))] * 5
handles = [hvd.allreduce_async_(torch.full((3,), float(i), device="cuda"), name=str(i))
           for i in (range(4) if rank else reversed(range(4)))]  # each rank in another order
found = sorted(hvd.synchronize(handle)[0].item() for handle in handles)
assert found == [0.0, 1.0, 2.0, 3.0], found
assert hvd.allgather(x[: rank + 1]).tolist() == [0.0, 1.0, 1.0]
output, received = hvd.alltoall(torch.arange(4, device="cuda"), splits=[1, 3])
assert received.tolist() == ([1, 1], [3, 3])[rank] and output.is_cuda
model = torch.nn.Linear(8, 2).cuda()
hvd.broadcast_parameters(model.state_dict(), 0)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                     named_parameters=model.named_parameters())
model(torch.full((4, 8), rank + 1.0, device="cuda")).sum().backward()
optimizer.step()
assert torch.allclose(model.weight.grad, torch.full((2, 8), 6.0, device="cuda"))
if rank == 1:
    assert hvd.allreduce(x, name="more", op=hvd.Sum).tolist() == [1.0] * 5  # rank 0 has joined
hvd.join()
print("good", flush=True)
"""


def test_horovod(mpirun):
    done = mpirun(2, HOROVOD, timeout_s=120.0)
    assert done.returncode == 0 and done.stdout.count("good") == 2, done.stderr
