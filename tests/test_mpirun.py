"""The public functions in a world of any size. In the suite: of one, and with more by real mpirun.

`mpirun -np N python -m pytest -m world` runs the tests that are marked "world" on every rank.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from expected import (
    DTYPES,
    FRAMEWORKS,
    assert_equal,
    bits_of,
    exact_values,
    frameworks_of,
    make,
    ops_of,
    reduced,
)
from torch import nn

import ringreduce as rr

TESTS = Path(__file__).parent


def hosts_of_ranks():
    return (os.environ.get("HOSTS_OF_RANKS") or "one " * rr.size()).split()


@pytest.fixture
def world():
    """The world, as its first use opens it."""
    yield rr.world()
    if rr.size() == 1:  # under mpirun it stays open for the next test
        rr.shutdown()
        rr.init()


@pytest.fixture(scope="module", autouse=True)
def leave_no_world():
    rr.init()
    yield
    if rr.size() == 1:
        rr.shutdown()


def operands(dtype, op, shape):
    inputs = [exact_values(shape, dtype, op, rank) for rank in range(rr.size())]
    return inputs[rr.rank()], reduced(inputs, op, dtype)


@pytest.mark.world
def test_world_is_what_mpirun_started(world):
    assert rr.size() == int(os.environ.get("EXPECTED_SIZE", rr.size()))
    assert 0 <= rr.rank() < rr.size() and rr.is_initialized()
    hosts = hosts_of_ranks()
    mine = hosts[rr.rank()]
    assert (rr.local_rank(), rr.local_size()) == (hosts[: rr.rank()].count(mine), hosts.count(mine))
    assert (world.rank, world.size) == (rr.rank(), rr.size()) and rr.world() is world
    assert rr.allgather(np.array([rr.rank()])).tolist() == list(range(rr.size()))


@pytest.mark.world
@pytest.mark.parametrize("dtype", DTYPES)
def test_world_collectives(world, dtype):
    for framework, shape in (
        (f, s) for f in frameworks_of(dtype) for s in ((), (0,), (5, 3), (30_011,))
    ):
        for op in ops_of(dtype):
            mine, total = operands(dtype, op, shape)
            x = make(framework, mine, dtype)
            assert_equal(rr.allreduce(x, op), total, (dtype, op, shape))
            assert_equal(rr.grouped_allreduce([x, x], op)[1], total, (dtype, op, shape))
            if shape:
                part = np.array_split(total, rr.size())[rr.rank()]
                assert_equal(rr.reduce_scatter(x, op), part, (dtype, op, shape))
            root = rr.size() - 1
            rooted = rr.reduce(x, op, root)
            if rr.rank() == root:
                assert_equal(rooted, total, (dtype, op, shape))
            else:
                assert rooted is None
            y = make(framework, mine, dtype)
            assert rr.allreduce_(y, op) is y
            assert_equal(y, total, (dtype, op, shape))
            assert_equal(rr.grouped_allreduce_([x], op)[0], total, (dtype, op, shape))
        mine, _ = operands(dtype, "sum", shape)
        first = exact_values(shape, dtype, "sum", 0)
        assert_equal(rr.broadcast(make(framework, mine, dtype)), first, shape)
        assert_equal(rr.broadcast_(make(framework, mine, dtype)), first, shape)
        everyone = [np.atleast_1d(exact_values(shape, dtype, "sum", r)) for r in range(rr.size())]
        assert_equal(rr.allgather(make(framework, mine, dtype)), np.concatenate(everyone), shape)
    assert rr.barrier() is None


@pytest.mark.world
def test_world_asynchronous(world):
    works = [rr.allreduce(torch.full((n,), 1.0), async_op=True) for n in (1, 1000, 50_000)]
    works.append(rr.barrier(async_op=True))
    works.append(rr.allgather(np.ones(rr.rank()), async_op=True))
    assert len(works[4].wait()) == sum(range(rr.size()))
    assert works[3].wait() is None
    assert all((work.wait() == rr.size()).all() for work in works[:3])


@pytest.mark.world
def test_world_symmetric(world):
    x = rr.empty((100, 400), torch.float32)
    y = rr.empty(40_000, np.float64)
    x[:], y[:] = rr.rank(), 1
    total = sum(range(rr.size()))
    assert (rr.allreduce_(x) == total).all() and (rr.allreduce_(y, "avg") == 1).all()
    assert (rr.allreduce(x[3:5], "max") == total).all()


@pytest.mark.world
def test_world_unequal_and_strided(world):
    rows = np.arange((rr.rank() + 1) * 2.0).reshape(-1, 2)
    gathered = rr.allgather(rows)
    assert gathered.shape == (rr.size() * (rr.size() + 1) // 2, 2)
    x = (
        torch.arange(12.0).view(3, 4).t()
        if rr.rank() % 2
        else torch.arange(12.0).view(3, 4).t().contiguous()
    )
    assert torch.equal(rr.allreduce(x), rr.size() * torch.arange(12.0).view(3, 4).t())


@pytest.mark.world
def test_world_split(world):
    part = world.split(rr.rank() % 2, key=-rr.rank())
    members = [r for r in range(rr.size()) if r % 2 == rr.rank() % 2][::-1]
    assert rr.allgather(np.array([rr.rank()]), comm=part).tolist() == members
    assert rr.allreduce(np.ones(3), comm=part).tolist() == [len(members)] * 3
    nobody = world.split(None if rr.rank() else 1)
    assert (nobody is None) == (rr.rank() > 0)
    part.close()
    with pytest.raises(rr.NotInitialized):
        rr.barrier(comm=part)
    rr.barrier()


@pytest.mark.world
def test_world_mismatch(world):
    if rr.size() == 1:
        pytest.skip("one rank agrees with itself")
    odd = rr.size() - 1
    with pytest.raises(rr.MismatchError, match=rf"rank {odd} calls .*\(3,\)"):
        rr.allreduce(np.ones(3 if rr.rank() == odd else 2))
    assert rr.allreduce(np.ones(1)).item() == rr.size()


@pytest.mark.world
def test_world_refuses_before_anything_is_sent(world):
    if rr.rank() == 0:
        for wrong in (
            lambda: rr.allreduce([1]),
            lambda: rr.allreduce(np.ones(1), "mean"),
            lambda: rr.broadcast(np.ones(1), rr.size()),
            lambda: rr.barrier(comm=5),
        ):
            with pytest.raises((TypeError, ValueError)):
                wrong()
    rr.barrier()


@pytest.mark.world
def test_world_models_and_objects(world):
    torch.manual_seed(rr.rank())
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    root = rr.size() - 1
    rr.broadcast_parameters(model, root)
    bits = [bits_of(x) for x in (*model.parameters(), *model.buffers())]
    assert rr.broadcast_object(bits, root) == bits


@pytest.mark.world
def test_world_bits_are_the_same_everywhere(world):
    for framework in FRAMEWORKS:
        values = np.random.default_rng(rr.rank()).standard_normal(70_001).astype(np.float32)
        bits = bits_of(rr.allreduce(make(framework, values, "float32")))
        assert rr.broadcast_object(bits) == bits


# By ranks of one job, since most of the time of a job goes into its imports: members, algorithm,
# hosts, file. Ranks that take themselves to be on several hosts: all but the network is real.
WORLDS = [
    ((0, 1, 2, 3, 4), "auto", "", "test_mpirun.py"),
    ((0, 1, 2, 3, 4), "auto", "a b a c c", "test_mpirun.py"),
    ((0, 1), "tree", "", "test_mpirun.py"),
    ((2, 3, 4), "ring", "a b b", "test_mpirun.py"),
    ((2, 3, 4), "auto", "", "test_training.py"),
]
IN_EACH_WORLD = f"""
import os
import pytest
from mpi4py import MPI
import ringreduce as rr

worlds, me = {WORLDS}, MPI.COMM_WORLD.rank
parts = [MPI.COMM_WORLD.Split(0 if me in members else MPI.UNDEFINED) for members, *_ in worlds]
for number, (part, (members, algorithm, hosts, file)) in enumerate(zip(parts, worlds)):
    if me not in members:
        continue
    os.environ["EXPECTED_SIZE"] = str(len(members))
    os.environ["HOSTS_OF_RANKS"] = hosts
    os.environ["RINGREDUCE_HOST"] = hosts.split()[part.rank] if hosts else ""
    os.environ["RINGREDUCE_ALGORITHM"] = algorithm
    rr.init(part)
    tests = os.path.join({str(TESTS)!r}, file)
    status = pytest.main(["-q", "-m", "world", "-p", "no:cacheprovider", tests])
    # Whole, whatever the other ranks write.
    os.write(1, f"<world {{number}} ended with {{int(status)}}>\\n".encode())
    rr.shutdown()
"""


@pytest.mark.core
def test_under_mpirun(mpirun):
    """Every rank runs the tests above and those of test_training.py, and says that it has."""
    done = mpirun(5, IN_EACH_WORLD, timeout_s=150, env={"RINGREDUCE_TIMEOUT": "40"})
    assert done.returncode == 0, done.stdout + done.stderr
    for number, (members, *_) in enumerate(WORLDS):
        assert done.stdout.count(f"<world {number} ended with 0>") == len(members), done.stdout
    assert done.stdout.count(" passed") == sum(len(members) for members, *_ in WORLDS), done.stdout
    assert "failed" not in done.stdout


@pytest.mark.core
def test_the_users_mpi_goes_on_beside_it(mpirun):
    done = mpirun(
        3,
        """
import numpy as np
from mpi4py import MPI
import ringreduce as rr

comm = MPI.COMM_WORLD
for turn in range(20):
    x = np.full(1000, comm.rank + 1.0)
    y = np.empty_like(x)
    request = comm.Iallreduce(x, y)
    work = rr.allreduce(x, async_op=True)
    comm.Barrier()
    assert (work.wait() == 6).all()
    request.Wait()
    assert (y == 6).all() and comm.bcast(turn) == turn
assert (rr.rank(), rr.size()) == (comm.rank, comm.size)
rr.shutdown()
assert comm.allreduce(1) == 3
print("well", flush=True)
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("well") == 3


@pytest.mark.core
def test_the_example_of_the_first_page(mpirun):
    """Two lines, no init, no shutdown, whatever is still under way at the end."""
    done = mpirun(
        4,
        """
import torch
import ringreduce as rr
total = rr.allreduce(torch.tensor([1.0, rr.rank()]))
print(total.tolist(), flush=True)
rr.allreduce_(torch.ones(100_000), async_op=True)
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[4.0, 6.0]") == 4
    assert done.stderr.strip() == ""
