"""Collectives within what torch.compile compiles: they run as they are, between compiled parts."""

import pytest

pytest.importorskip("torch")

SCRIPT = """
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


def test_collectives_in_compiled_functions(mpirun):
    done = mpirun(2, SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("well") == 2
