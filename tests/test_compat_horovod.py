"""The names of horovod.torch: what the calls give, and a script that changes only its import."""

import pytest
from wrapped import assert_trained_as_one_process

# A script as Horovod's users write them, but for its first line.
SCRIPT = """
import ringreduce.compat.horovod as hvd
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

hvd.init()
torch.manual_seed(0)
data = TensorDataset(torch.randn(48, 8, dtype=torch.float64), torch.randn(48, 4).double())
sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False)
torch.manual_seed(hvd.rank())
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), op=hvd.Average
)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(data, batch_size=4, sampler=sampler):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    average = hvd.allreduce(loss.detach(), name="loss").item()
if hvd.rank() == 0:
    torch.save(model.state_dict(), os.environ["RESULT"])
hvd.join()
hvd.shutdown()
"""

CALLS = """
import torch
import ringreduce.compat.horovod as hvd
hvd.init(process_sets=[pair := hvd.ProcessSet([0, 2])])
r, n = hvd.rank(), hvd.size()
assert n == 3 and (hvd.cross_rank(), hvd.cross_size()) == (0, 1) and hvd.is_homogeneous()
assert (hvd.local_rank(), hvd.local_size()) == (r, n) and hvd.mpi_built() and not hvd.gloo_built()

def gradient(call, x, grad=None):
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(torch.ones_like(y) if grad is None else grad)
    return x.grad

x = torch.full((4,), r + 1.0)
assert (hvd.allreduce(x) == 2).all() and (x == r + 1).all()
assert (hvd.allreduce(x, average=False, name="sum") == 6).all()
assert (hvd.allreduce(x, op=hvd.Product) == 6).all()
assert (hvd.allreduce(x, op=hvd.Max, compression=hvd.Compression.fp16) == 3).all()
assert (hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0) == 12).all()
assert (hvd.allreduce(torch.full((2,), 2 * r - 3)) == -1).all()
assert (gradient(lambda x: hvd.allreduce(x, op=hvd.Sum), x) == 3).all()
assert (gradient(hvd.allreduce, x) == 1).all()
polls = []
for _ in range(5):
    polls.append(hvd.poll(handle := hvd.allreduce_async_(y := x.clone(), op=hvd.Sum)))
    hvd.synchronize(handle)
assert not all(polls)
assert hvd.synchronize(handle) is y and (y == 6).all() and hvd.poll(handle)
xs = hvd.grouped_allreduce([x, x.int()], op=hvd.Min)
assert xs[0].tolist() == xs[1].tolist() == [1] * 4
hvd.grouped_allreduce_([y, z := x.clone()], op=hvd.Sum)
assert (y == 18).all() and (z == 6).all()

rows = torch.full((r + 1, 2), float(r))
assert hvd.allgather(rows)[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
grad = gradient(hvd.allgather, rows, torch.arange(6.0)[:, None].expand(6, 2))
assert grad[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0][r * (r + 1) // 2 :][: r + 1]
assert (hvd.broadcast(x, 1) == 2).all() and (hvd.broadcast_(x.clone(), root_rank=2) == 3).all()
assert (gradient(lambda x: hvd.broadcast(x, 1), x) == (r == 1)).all()
assert hvd.reducescatter(torch.arange(5.0)).tolist() == [[0, 1], [2, 3], [4]][r]
assert (gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum), torch.ones(6)) == 3).all()
assert hvd.alltoall(torch.arange(3.0) + 10 * r).tolist() == [r, 10 + r, 20 + r]
y, received = hvd.alltoall(torch.full((6,), r), splits=torch.tensor([1, 2, 3]))
assert received.tolist() == [r + 1] * 3
assert y.tolist() == [i for i in range(3) for _ in range(r + 1)]
assert (gradient(hvd.alltoall, torch.ones(3)) == 1).all()

assert pair.included() == (r != 1) and pair.size() == 2
if pair.included():
    assert (hvd.allreduce(x, op=hvd.Sum, process_set=pair) == 4).all()
    assert hvd.broadcast_object(r, 2, process_set=pair) == 2
assert hvd.remove_process_set(pair) and not hvd.remove_process_set(pair)
assert hvd.allgather_object({"rank": r}) == [{"rank": i} for i in range(n)]
assert hvd.broadcast_object({"rank": r}, root_rank=1) == {"rank": 1}
assert hvd.join() in range(n)

def wrapped(model, **options):
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    return hvd.DistributedOptimizer(base, model.named_parameters(), **options)

for options in (
    {"gradient_predivide_factor": 2.0},
    {"compression": hvd.Compression.fp16, "backward_passes_per_step": 2},
):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(model.weight)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    optimizer = wrapped(model, **options)
    assert isinstance(optimizer, torch.optim.SGD)
    passes = options.get("backward_passes_per_step", 1)
    for _ in range(passes):
        model(torch.full((1, 2), float(r))).sum().backward()
    optimizer.step()
    assert (model.weight == -passes).all() and (model.unused.grad == 0).all()
model = torch.nn.Embedding(4, 2, sparse=True)
optimizer = wrapped(model, sparse_as_dense=True)
model(torch.tensor([r])).sum().backward()
optimizer.synchronize()
dense = model.weight.grad.to_dense()[:, 0]
assert model.weight.grad.is_sparse and torch.allclose(dense, torch.tensor([1, 1, 1, 0]) / 3)
for wrong in (
    lambda: hvd.allreduce(x, op=hvd.Adasum),
    lambda: hvd.allreduce(x, average=True, op=hvd.Sum),
    lambda: wrapped(model, op=hvd.Sum, gradient_predivide_factor=2.0),
    lambda: hvd.DistributedOptimizer(optimizer, [("a", x)]),
):
    try:
        wrong()
    except (ValueError, NotImplementedError):
        continue
    raise AssertionError("no error")
hvd.barrier()
hvd.shutdown()
assert not hvd.is_initialized()
print("well", flush=True)
"""

MEETING = """
import torch
import ringreduce.compat.horovod as hvd
from ringreduce import MismatchError, world
hvd.init()
r, n = hvd.rank(), hvd.size()

def x(value, size=3):
    return torch.full((size,), float(value))

def raises(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as found:
        return str(found)
    raise AssertionError(f"no {error.__name__}")

# Names decide, not order: not even where shapes are equal and several calls are under way.
for turn in range(3):
    names = [f"{i}" for i in range(4)]
    order = names[r:] + names[:r]
    handles = {name: hvd.allreduce_async(x(int(name)), name=name, op=hvd.Sum) for name in order}
    later = hvd.allreduce(x(r), op=hvd.Sum)
    assert (later == 3).all()
    for name in names if turn == 1 else order[::-1]:
        assert (hvd.synchronize(handles[name]) == n * int(name)).all(), name
early = hvd.broadcast_async_(y := x(r), 2, name="early") if r == 0 else None
hvd.barrier()
if r == 0:  # it waits for the others, who are not there yet
    assert "under way" in raises(ValueError, hvd.broadcast_async_, y, 2, name="early")
else:
    early = hvd.broadcast_async_(y := x(r), 2, name="early")
assert hvd.synchronize(early) is y and (y == 2).all()

# What cannot meet is an error on all ranks, and forgotten.
message = raises(MismatchError, hvd.allreduce if r else hvd.allgather, x(1))
assert "rank 0: allgather" in message and "rank 1: allreduce" in message, message
assert "root" not in raises(MismatchError, hvd.allreduce, x(1, 2 + r))
lost = hvd.allreduce_async(x(1, 2 + r), name="lost")
assert (hvd.allreduce(x(1), op=hvd.Sum) == 3).all()
raises(MismatchError, hvd.synchronize, lost)
raises(MismatchError, hvd.synchronize, lost)
raises(MismatchError, hvd.broadcast_object, r, r)
assert hvd.broadcast_object(r, 1) == 1 and not hvd.add_process_set([]).included()
raises(NotImplementedError, lambda: hvd.elastic.run)

# Uneven data: rank r has 2 + 2 r batches. Averages stay over all ranks.
def net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    return torch.nn.Sequential(*layers).double()

def loss_of(model, rank, i):
    torch.manual_seed(100 * rank + i)
    return model(torch.randn(2, 4, dtype=torch.float64)).square().mean()

def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

model = net()
optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
for i in range(2 + 2 * r):
    optimizer.zero_grad()
    loss = loss_of(model, r, i)
    loss.backward()
    if i % 2:
        hvd.allreduce_(loss.detach(), name="loss")
    optimizer.step()
    if i == 4:
        raises(MismatchError, hvd.allgather, x(1))  # which needs everybody
assert hvd.join() == n - 1
hvd.broadcast_parameters(model.state_dict(), n - 1)
alone = net()
reference = sgd(alone)
for i in range(2 * n):
    reference.zero_grad()
    sum(loss_of(alone, k, i) for k in range(n) if i < 2 + 2 * k).div(n).backward()
    reference.step()
for a, b in zip(model.parameters(), alone.parameters(), strict=True):
    assert (a - b).abs().max() <= 1e-12
assert hvd.join() in range(n) and (hvd.allreduce(x(r)) == 1).all()

# Gradients travel during backward: all but those of parameters that this rank leaves out.
for groups, sent in ((None, 1), (2, 2), ("weights", 3)):
    model = net()
    optimizer = hvd.DistributedOptimizer(
        sgd(model),
        model.named_parameters(),
        groups=[[model[0].weight, model[2].weight]] if groups == "weights" else groups,
        backward_passes_per_step=2,
    )
    before = world().core.sequence
    loss_of(model, r, 0).backward()
    assert world().core.sequence == before
    loss_of(model, r, 1).backward()
    hvd.barrier()
    assert world().core.sequence == before + sent + 1
    raises(ValueError, optimizer.zero_grad)
    raises(ValueError, loss_of(model, r, 2).backward)
    optimizer.step()
model = net()
optimizer = hvd.DistributedOptimizer(sgd(model), op=hvd.Sum, groups=4)
(model[2].bias if r else model(torch.ones(1, 4).double())).sum().backward()
assert (hvd.allreduce(x(r), op=hvd.Sum) == 3).all()
optimizer.synchronize()
assert model[2].bias.grad.item() == n and (model[0].bias.grad != 0).any()

layer, one = hvd.SyncBatchNorm(2), torch.nn.BatchNorm1d(2)
torch.manual_seed(1)
data = torch.randn(9, 2)
assert torch.allclose(layer(data[r::n]), one(data)[r::n], atol=1e-6)
assert torch.allclose(layer.running_var, one.running_var)
print("well", flush=True)
"""


@pytest.mark.core
def test_a_script_trains_as_one_process_and_calls_meet_by_name(mpirun, tmp_path):
    """One job for all scripts, with init() again after shutdown(): most of it is imports."""
    result = tmp_path / "model"
    done = mpirun(3, SCRIPT + CALLS + MEETING, env={"RESULT": str(result)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("well") == 6
    assert_trained_as_one_process(result, 3)
