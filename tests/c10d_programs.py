"""What the ranks of test_c10d.py run, each text a program: the launchers there start it as it is.

Most of the time of a job goes into its imports, so several of them make one job. Starts nothing.
"""

COLLECTIVES = """
import datetime, os, torch, ringreduce, ringreduce.c10d, torch.distributed as dist
import torch.distributed._functional_collectives as functional

def listening():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    own = {os.readlink(link)[8:-1] for link in links if os.path.islink(link)}
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}")]
    return sorted(line[9] for line in lines if line[3] == "0A" and line[9] in own)

listening_before = listening()  # those of MPI
ringreduce.c10d.init_process_group()
r, n = dist.get_rank(), dist.get_world_size()
assert dist.get_backend() == "ringreduce" and n == 3
group = dist.group.WORLD
core = group._main.core

def full(value, *shape, dtype=torch.float32):
    return torch.full(shape or (3,), value, dtype=dtype)

# The first calls are ranges, too.
with torch.autograd.profiler.profile() as profile:
    dist.all_reduce(full(r))
    dist.all_to_all_single(torch.empty(n), torch.ones(n))
ranges = {event.name for event in profile.function_events}
assert {"ringreduce:all_reduce", "ringreduce::allreduce", "ringreduce:all_to_all"} <= ranges, ranges

for op, expected in (("SUM", 9), ("AVG", 3), ("PRODUCT", 24), ("MIN", 2), ("MAX", 4)):
    x = full(r + 2)
    before = core.sequence
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    assert core.sequence == before + 1 and (x == expected).all(), op
x = full(r + 1).to(torch.complex64) * 1j
dist.all_reduce(x)
assert (x == 6j).all()
x = full(r + 1)
dist.all_reduce(x, dist._make_nccl_premul_sum(0.5))
assert (x == 3).all()
def raises(error, text, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as found:
        assert text in str(found), found
    else:
        raise AssertionError(f"no {error.__name__}: {text}")

mine = torch.tensor([r + 1, 3 * r, 6])
for op, bits in (("BAND", [0, 0, 6]), ("BOR", [3, 7, 6]), ("BXOR", [0, 5, 6])):
    op = getattr(dist.ReduceOp, op)
    dist.all_reduce(x := mine.clone(), op)
    assert x.tolist() == bits, op
    dist.reduce(x := mine.clone(), 1, op)
    assert x.tolist() == (bits if r == 1 else mine.tolist())
    dist.reduce_scatter_tensor(x := mine[:1].clone(), mine, op)
    assert x.tolist() == bits[r : r + 1]
    truths = torch.tensor([bool(r), True])
    dist.all_reduce(truths, op)
    assert truths.tolist() == [op != dist.ReduceOp.BAND and op == dist.ReduceOp.BOR, True]
raises(TypeError, "band", dist.all_reduce, torch.ones(2), dist.ReduceOp.BAND)
odd = dist.ReduceOp.BOR if r else dist.ReduceOp.BXOR
raises(ringreduce.MismatchError, "rank 0", dist.all_reduce, mine.clone(), odd)
xs = [full(r), full(r, 2, dtype=torch.int64)]
group.allreduce_coalesced([*xs, xs[0]]).wait()
assert all((x == 3).all() for x in xs)
x = torch.full((4, 5), float(r)).t()[1:4]
dist.broadcast(x, 2)
assert (x == 2).all()
x = torch.tensor([float(r)]).to(torch.float8_e5m2)
dist.broadcast(x, 1)
assert x.float().item() == 1

outputs = [torch.empty(2, i + 1) for i in range(n)]
dist.all_gather(outputs, full(r, 2, r + 1))
assert [x.unique().tolist() for x in outputs] == [[0], [1], [2]]
for shape in ((2 * n, 3), (n, 2, 3)):
    whole = torch.empty(shape)
    dist.all_gather_into_tensor(whole, full(r, 2, 3))
    assert torch.equal(whole.view(n, 6), torch.arange(3.0)[:, None].expand(n, 6))
part = torch.empty(2)
dist.reduce_scatter_tensor(part, torch.arange(6.0))
assert part.tolist() == [n * 2 * r, n * (2 * r + 1)]
dist.reduce_scatter(part, list(torch.arange(6.0).split(2)), dist.ReduceOp.AVG)
assert part.tolist() == [2 * r, 2 * r + 1]
part = torch.empty(r)
dist.reduce_scatter(part, [full(i, i) for i in range(n)])
assert (part == n * r).all()
x = full(r + 1)
dist.reduce(x, 1)
assert (x == (6 if r == 1 else r + 1)).all()

gathered = [torch.empty(2) for _ in range(n)] if r == 2 else None
dist.gather(full(r, 2), gathered, 2)
assert r != 2 or [x[0].item() for x in gathered] == [0, 1, 2]
x = torch.empty(2)
dist.scatter(x, [full(i, 2) for i in range(n)] if r == 1 else None, 1)
assert (x == r).all()
x = torch.empty(n)
dist.all_to_all_single(x, torch.arange(float(n)) + 10 * r)
assert x.tolist() == [10 * i + r for i in range(n)]
raises(ValueError, "split sizes", dist.all_to_all_single, x, x.clone(), [1] * n, [2] * n)
raises(ValueError, "6 elements", dist.all_gather_into_tensor, torch.empty(7), torch.ones(2))
raises(TypeError, "float64", dist.reduce_scatter_tensor, torch.ones(1).double(), torch.ones(n))
raises(ValueError, "no other rank", dist.send, x, 17)
x = torch.empty(n * (r + 1))
dist.all_to_all_single(x, full(r, 6), [r + 1] * n, [1, 2, 3])
assert x.tolist() == [i for i in range(n) for _ in range(r + 1)]
objects = [None] * n
dist.all_gather_object(objects, {"rank": r})
assert objects == [{"rank": i} for i in range(n)]
objects = [{"rank": r}]
dist.broadcast_object_list(objects, 1)
assert objects == [{"rank": 1}]

x, y = torch.empty(4), torch.empty(2, 2).t()
works = [dist.isend(full(10 * r + tag, 4), (r + 1) % n, tag=tag) for tag in (0, 1)]
works.append(dist.irecv(y, (r - 1) % n, tag=1))  # tags may be received in any order
works.append(dist.irecv(x, (r - 1) % n))
[work.wait() for work in works]
assert (x == 10 * ((r - 1) % n)).all() and (y == 10 * ((r - 1) % n) + 1).all()
if r == 0:  # from any source: each message to the earliest recv that it suits
    xs = [torch.empty(2) for _ in range(5)]
    works = [dist.irecv(xs[0], 2, tag=7)] + [dist.irecv(x, tag=7) for x in xs[1:4]]
    sources = [work.wait() and work._source_rank() for work in works]
    assert sources[0] == 2 and sorted(sources) == [1, 1, 2, 2]
    received = list(zip(sources, (x.tolist() for x in xs), strict=False))
    assert all([x for s, x in received if s == i] == [[i, 0], [i, 1]] for i in (1, 2))
    dist.send(torch.ones(2), 1)
    assert dist.recv(xs[4]) == 1 and (xs[4] == 9).all()
else:
    [dist.send(torch.tensor([1.0 * r, i]), 0, tag=7) for i in range(2)]
    if r == 1:
        assert dist.recv(z := torch.empty(2)) == 0 and (z == 1).all()
        dist.send(torch.full((2,), 9.0), 0)

limited = dist.new_group(timeout=datetime.timedelta(seconds=40))
assert limited._channels._timeout_s == 40.0

# Who has not come is named to all that have, and nothing is lost.
second = datetime.timedelta(seconds=1)
dist.monitored_barrier(timeout=20 * second)
if r != 1:
    text = "Ranks 1 failed to pass"
    raises(ringreduce.CollectiveTimeout, text, group.monitored_barrier, second / 50, True)
if r == 0:
    raises(RuntimeError, "timed out after 0.02 s", dist.barrier, timeout=second / 50)
    dist.send(full(0), 1)
elif r == 1:
    dist.recv(full(0), 0)
    text = "Rank 1 successfully reached monitoredBarrier, but received errors"
    raises(ringreduce.CollectiveTimeout, text, dist.monitored_barrier, timeout=0.02)
if r:
    dist.barrier()
raises(NotImplementedError, "new_group", group.split_group, [0, 1])
raises(TypeError, "pg_options", dist.new_group, pg_options=object())

work = dist.all_reduce(full(r), async_op=True)
assert work.get_future_result().wait() == 0 and work.wait()
works = [dist.all_reduce(full(i, 1000), async_op=True) for i in range(5)]
assert [work.result()[0][0].item() for work in works[::-1]] == [12, 9, 6, 3, 0]
assert all(work.is_completed() and work.is_success() for work in works)
# Callbacks call collectives themselves, while the program goes on with its own.
def again(future):
    return dist.all_reduce(future.value()[0], async_op=True).get_future().wait()[0]
futures = [dist.all_reduce(full(i), async_op=True).get_future().then(again) for i in range(9)]
assert [future.wait()[0].item() for future in futures] == [9.0 * i for i in range(9)]
assert functional.all_reduce(full(r), "sum", group).tolist() == [3, 3, 3]

even, odd = dist.new_group([0, 2]), dist.new_group([1])
mine = odd if r == 1 else even
x = full(r)
dist.all_reduce(x, group=mine)
assert (x == (1 if r == 1 else 2)).all()
x = full(r)
if r != 1:
    dist.broadcast(x, 2, group=even)
    assert (x == 2).all()
dist.destroy_process_group(mine)
local = dist.new_group([0, 1], use_local_synchronization=True)
if r < 2:
    dist.all_reduce(x, group=local)
dist.barrier()
assert listening() == listening_before
dist.destroy_process_group()
for turn in range(2):  # again, then with torch's own store
    dist.init_process_group("ringreduce") if turn else ringreduce.c10d.init_process_group()
    assert (len(listening()) > len(listening_before)) == (turn == 1 and r == 0)
    dist.all_reduce(x := full(1))
    assert (x == n).all()
    if turn == 0:  # the last one is open until the end of the process
        dist.destroy_process_group()
print("well", flush=True)
"""
# A DDP script as it is: nothing of ringreduce but the import and the name of the backend.
DDP_SCRIPT = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
import ringreduce.c10d

dist.init_process_group("ringreduce")
rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
torch.manual_seed(0)
data = TensorDataset(torch.randn(48, 8, dtype=torch.float64), torch.randn(48, 4).double())
sampler = DistributedSampler(data, shuffle=False)
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
model = DDP(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(data, batch_size=4, sampler=sampler):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
if rank == 0:
    torch.save(net.state_dict(), os.environ["RESULT"])
dist.barrier()
dist.destroy_process_group()
"""

# DDP with all that comes with it.
DDP_VARIANTS = """
import copy, torch, ringreduce.c10d, torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
ringreduce.c10d.init_process_group()
r, n = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
start = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
data = torch.randn(5, 4 * n, 8, dtype=torch.float64)

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

def train(model, make_optimizer=sgd, rows=slice(r, None, n)):
    optimizer = make_optimizer(model.parameters())
    for x in data:
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()
    return optimizer

alone = copy.deepcopy(start)
train(alone, rows=slice(None))

def check(model, tolerance=1e-12):
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance

tiny = {"bucket_cap_mb": 1e-4}
for options in ({"static_graph": True}, {"gradient_as_bucket_view": True}, tiny):
    train(model := DDP(copy.deepcopy(start), **options))
    check(model)
powers = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
for hook, state, tolerance in (
    (default_hooks.allreduce_hook, None, 1e-12),
    (default_hooks.fp16_compress_hook, None, 1e-3),
    (powerSGD_hook.powerSGD_hook, powers, 1.0),
):
    model = DDP(copy.deepcopy(start), **tiny)
    model.register_comm_hook(state, hook)
    train(model)
    check(model, tolerance)
    sums = torch.stack([x.sum() for x in model.parameters()])
    gathered = [torch.empty_like(sums) for _ in range(n)]
    dist.all_gather(gathered, sums)
    assert torch.equal(gathered[0], gathered[-1]), hook  # the same model everywhere
for view in (False, True):
    model = DDP(copy.deepcopy(start))
    shards = train(model, lambda parameters: ZeroRedundancyOptimizer(
        parameters, torch.optim.SGD, lr=0.1, parameters_as_bucket_view=view))
    check(model)
shards.consolidate_state_dict(0)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)
    def forward(self, x):
        return (self.b if r else self.a)(x)

model = DDP(Branches(), find_unused_parameters=True)
model(torch.ones(1, 8)).sum().backward()
assert (model.module.a.weight.grad == 1 / n).all() and (model.module.b.weight.grad == 0.5).all()
model = DDP(nn.Embedding(4, 3, sparse=True))
model(torch.tensor([r, 2])).sum().backward()
assert model.module.weight.grad.to_dense()[:, 0].tolist() == [0.5, 0.5, 1, 0]
model = DDP(copy.deepcopy(start))
with model.no_sync():
    model(data[0, r::n]).square().mean().backward()
model(data[1, r::n]).square().mean().backward()
lone = copy.deepcopy(start)
(lone(data[0]).square().mean() + lone(data[1]).square().mean()).backward()
assert (model.module[0].weight.grad - lone[0].weight.grad).abs().max() <= 1e-12
with model.join():
    for x in data[: 2 + r]:
        model(x[:2]).sum().backward()
model.zero_grad()
with model.join(divide_by_initial_world_size=False):  # averages over those that have data
    for _ in range(2 + r):
        model.zero_grad()
        model(data[0, :2]).sum().backward()
lone.load_state_dict(model.module.state_dict())
expected = torch.autograd.grad(lone(data[0, :2]).sum(), lone[0].bias)[0]
assert (model.module[0].bias.grad - expected).abs().max() <= 1e-12

compiled = torch.compile(DDP(copy.deepcopy(start)), backend="eager")
train(compiled)
check(compiled)
print("well", flush=True)
"""
# What torch builds on process groups: nothing of it may go through another backend.
ABOVE = """
import copy, os, tempfile, torch, ringreduce.c10d, torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _coalescing_manager, _world
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
ringreduce.c10d.init_process_group()
r, n = dist.get_rank(), dist.get_world_size()
sequence = lambda: dist.group.WORLD._main.core.sequence
mesh = init_device_mesh("cpu", (n,))
whole = torch.arange(12.0).view(4, 3)
before = sequence()
sharded = distribute_tensor(whole, mesh, [Shard(0)])
assert torch.equal(sharded.redistribute(mesh, [Replicate()]).to_local(), whole)
assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
assert sharded.sum().full_tensor() == whole.sum()
assert sequence() > before

path = [tempfile.mkdtemp() if r == 0 else None]
dist.broadcast_object_list(path, 0)
checkpoint.save({"w": sharded, "epoch": 3}, checkpoint_id=path[0])
state = {"w": distribute_tensor(torch.zeros(4, 3), mesh, [Shard(1)]), "epoch": 0}
checkpoint.load(state, checkpoint_id=path[0])
assert torch.equal(state["w"].full_tensor(), whole) and state["epoch"] == 3
model = ringreduce.DistributedModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
adam = torch.optim.Adam(model.parameters())
model(torch.ones(4, 2)).sum().backward()
adam.step()
parameters, moments = get_state_dict(model, adam)
assert parameters.keys() == model.state_dict().keys()
set_state_dict(model, adam, model_state_dict=parameters, optim_state_dict=moments)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3)).double()
alone = copy.deepcopy(net)
[fully_shard(part, mesh=mesh) for part in (net[0], net[2], net)]
optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (net, alone)]
before = sequence()
for x in torch.randn(3, 2 * n, 7, dtype=torch.float64):
    for model, optimizer, rows in zip((net, alone), optimizers, (x[r::n], x), strict=True):
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()
for a, b in zip(net.parameters(), alone.parameters(), strict=True):
    assert (a.full_tensor() - b).abs().max() <= 1e-12
assert sequence() - before >= 3 * 3

for device in None, torch.device("cpu"):
    xs = [torch.full((3,), float(r)) for _ in range(3)]
    with _coalescing_manager(device=device, async_ops=True) as coalesced:
        for x in xs:
            dist.all_reduce(x)
    coalesced.wait()
    assert all((x == n * (n - 1) / 2).all() for x in xs)
f = torch.compile(lambda x: functional.all_reduce(2 * x, "sum", dist.group.WORLD), backend="eager")
assert (f(torch.ones(3)) == 2 * n).all()
found = [None] * n if r == 0 else None
dist.gather_object({"rank": r}, found, 0)
assert r or found == [{"rank": i} for i in range(n)]
mine = [None]
dist.scatter_object_list(mine, list(range(n)) if r == 1 else None, 1)
assert mine == [r]
x, y = torch.full((4,), float(r)), torch.empty(4)
swaps = [dist.P2POp(dist.isend, x, 1 - r), dist.P2POp(dist.irecv, y, 1 - r)]
[work.wait() for work in dist.batch_isend_irecv(swaps)]
assert (y == 1 - r).all()
assert {type(group).__name__ for group in _world.pg_map} == {"ProcessGroup"}
assert all(type(group).__module__ == "ringreduce.c10d_group" for group in _world.pg_map)
dist.destroy_process_group()
dist.init_process_group("cpu:ringreduce,cuda:ringreduce")
dist.all_reduce(x := torch.ones(2))
assert (x == n).all()
print("well", flush=True)
"""
# Which Bootstrap a rank of torchrun gets.
STORE = """
import os
from ringreduce.launch import from_environment
for message in (b"first", b"second"):
    bootstrap = from_environment(None, 20)
    assert bootstrap.exchange(message) == [message] * 2
line = f"{type(bootstrap).__name__} {bootstrap.rank} {bootstrap.size}"
os.write(1, f"{line}\\n".encode())  # whole, whatever the other rank writes
"""
# Errors come out of backward, and end the job.
ERRORS = """
import torch, ringreduce as rr, ringreduce.c10d, torch.distributed as dist
ringreduce.c10d.init_process_group()
r = dist.get_rank()
work = dist.all_reduce(torch.ones(2 + r), async_op=True)
for _ in range(2):
    try:
        work.wait()
    except rr.MismatchError:
        print("mismatch", flush=True)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
loss = model(torch.ones(1, 2)).sum()
try:
    loss.backward() if r == 0 else dist.all_reduce(torch.ones(7))
except rr.MismatchError:
    print("mismatch", flush=True)
if r == 1:
    raise KeyError("nobody catches this")
dist.all_reduce(torch.ones(1))
"""
# Collectives within what torch.compile compiles: they run as they are, between compiled parts.
COMPILED = """
import sys
import torch, ringreduce as rr
assert "torch._dynamo" not in sys.modules  # so the first call below is the first that it can see

def step(x, w):
    y = rr.allreduce(2 * x) + w
    work = rr.allreduce_(y + rr.rank(), "avg", async_op=True)
    z, _ = rr.grouped_allreduce([y * x, w], "max")
    rr.barrier()
    z = rr.world().broadcast(z, 1) / rr.size()
    return rr.allgather(y), work.wait() - w, z, rr.reduce_scatter(y)

compiled = torch.compile(step, backend="eager")
for i in range(3):
    x, w = torch.arange(4.0) + rr.rank() + i, torch.ones(4)
    assert all(map(torch.equal, compiled(x, w), step(x, w)))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4

net = torch.nn.Linear(3, 1)
torch.compile(net, backend="eager")(torch.ones(1, 3))
handle = rr.attach(net)  # after it was compiled
torch.compile(net, backend="eager")(torch.full((1, 3), float(rr.rank()))).sum().backward()
assert handle.stats()["backwards"] == 1 and (net.weight.grad == 0.5).all()
norm = torch.compile(rr.SyncBatchNorm(3).eval(), backend="eager", fullgraph=True)
assert norm(torch.ones(2, 3)).shape == (2, 3)
print("well", flush=True)
"""
