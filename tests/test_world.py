"""init, shutdown and the implicit world: what repeats, what is refused, forks and threads."""

import inspect
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import ringreduce as rr
from ringreduce.bootstrap import SelfBootstrap
from ringreduce.world import _share_cores

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def closed_world():
    rr.shutdown()
    yield
    rr.shutdown()


def run_python(source, **environment):
    """In a process of its own, without a launcher. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_first_use_opens_the_world():
    out, _ = run_python(
        "import ringreduce as rr\n"
        "print(rr.is_initialized(), rr.rank(), rr.size(), rr.local_rank(), rr.local_size(), "
        "rr.is_initialized())"
    )
    assert out == "False 0 1 0 1 True\n"


def test_importing_it_starts_nothing():
    out, _ = run_python(
        "import sys, ringreduce\n"
        "print([name for name in ('torch', 'mpi4py', 'cupy') if name in sys.modules], "
        "ringreduce.is_initialized())"
    )
    assert out == "[] False\n"
    run_python("import ringreduce", PYTHONOPTIMIZE="2")  # there are no docstrings then


def test_the_function_with_a_shortcut_is_like_the_one_behind_it():
    rr.init()
    x = np.ones(3)
    assert all(y is x for y in (rr.allreduce_(x), rr.allreduce_(x, "avg"), rr.allreduce_(x=x)))
    assert rr.allreduce_(x, op="max") is x and rr.allreduce_(x, op="max", comm=rr.world()) is x
    assert rr.allreduce_(x, async_op=True).wait() is x
    for arguments, names in (((), {}), ((x, "sum", 1), {}), ((x,), {"root": 0})):
        with pytest.raises(TypeError, match=r"^allreduce_\(\)"):
            rr.allreduce_(*arguments, **names)
    with pytest.raises(ValueError, match="op must be one of"):
        rr.allreduce_(x, "median")
    assert pickle.loads(pickle.dumps(rr.allreduce_)) is rr.allreduce_
    method = inspect.signature(rr.Communicator.allreduce_).parameters.values()
    shown = inspect.signature(rr.allreduce_).parameters.values()
    assert [(p.name, p.kind, p.default) for p in shown] == [
        *((p.name, p.kind, p.default) for p in method if p.name != "self"),
        ("comm", inspect.Parameter.KEYWORD_ONLY, None),
    ]
    assert rr.allreduce_.__doc__.startswith("`allreduce` in place")


def test_use_after_shutdown_is_refused_until_init():
    rr.init()
    rr.allreduce_(np.ones(1))  # the short way knows such arrays now
    rr.shutdown()
    rr.shutdown()  # does nothing
    for call in (rr.rank, rr.world, rr.barrier, lambda: rr.allreduce_(np.ones(1))):
        with pytest.raises(rr.NotInitialized, match=r"call init\(\)"):
            call()
    assert not rr.is_initialized()
    rr.init()
    assert rr.size() == 1


def test_a_communicator_is_closed_by_shutdown():
    rr.init()
    world = rr.world()
    part = world.split(0)
    rr.shutdown()
    for comm in (world, part):
        with pytest.raises(rr.NotInitialized):
            comm.barrier()


def test_a_second_init_with_equal_arguments_does_nothing():
    rr.init(timeout=50, algorithm="ring")
    world = rr.world()
    rr.init()
    rr.init(timeout=50.0)
    rr.init(algorithm="RING", warn_after=30)
    assert rr.world() is world


@pytest.mark.parametrize(
    "other", [{"timeout": 51}, {"algorithm": "tree"}, {"warn_after": 1}, {"comm": SelfBootstrap()}]
)
def test_a_second_init_with_other_arguments_is_refused(other):
    rr.init(timeout=50)
    world = rr.world()
    with pytest.raises(rr.RingReduceError, match=r"shutdown\(\) first"):
        rr.init(**other)
    assert rr.world() is world  # unharmed
    rr.barrier()


def test_a_bad_argument_is_refused_and_leaves_nothing_open():
    with pytest.raises(ValueError, match=r"init\(timeout=\.\.\.\) must be .*, not -1"):
        rr.init(timeout=-1)
    assert not rr.is_initialized()
    with pytest.raises(TypeError, match="comm must be an mpi4py communicator, not str"):
        rr.init("world")
    assert "mpi4py.MPI" not in sys.modules  # not even started
    rr.init(timeout=1)


def test_variables_count():
    source = "import ringreduce as rr; rr.init(); print(rr.world().bootstrap.settings)"
    out, _ = run_python(source, RINGREDUCE_TIMEOUT="12", RINGREDUCE_ALGORITHM="tree")
    assert "timeout_s=12.0" in out
    assert "algorithm='tree'" in out


def test_an_unknown_variable_warns_once():
    source = "import ringreduce as rr; rr.init(); rr.shutdown(); rr.init(); rr.barrier()"
    _, err = run_python(source, RINGREDUCE_TIMEOUTS="12")
    assert err.count("did you mean RINGREDUCE_TIMEOUT?") == 1


def test_init_from_many_threads_opens_one_world():
    rr.init()
    rr.shutdown()
    worlds = []
    start = threading.Barrier(8)

    def use():
        start.wait()
        rr.init()
        worlds.append(rr.world())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(worlds) == 8
    assert len({id(world) for world in worlds}) == 1


def test_a_forked_child_is_refused_with_the_way_out():
    rr.init()
    world = rr.world()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        for call in (rr.init, rr.barrier, rr.world, world.barrier):
            try:
                call()
                os.write(write_end, b"no error\n")
            except rr.NotInitialized as error:
                os.write(write_end, f"{error}\n".encode())
        world.core.abort("not the child's to say")
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(pid, 0)
    assert len(lines) == 4
    for line in lines:
        assert "forked" in line
    rr.barrier()  # the parent's is unharmed


SETTINGS_SCRIPT = """
import os, sys
from mpi4py import MPI
import ringreduce as rr
rank = MPI.COMM_WORLD.rank
{prepare}
try:
    rr.init({arguments})
except {error} as error:
    os.write(1, f"{{rank}}: {{error}}\\n".encode())
"""


@pytest.mark.parametrize(
    ("prepare", "arguments"),
    [
        ("", "timeout=10 + rank // 2"),
        ("os.environ['RINGREDUCE_TIMEOUT'] = str(10 + rank // 2)", ""),
    ],
)
def test_settings_that_differ_are_a_mismatch_on_every_rank(mpirun, prepare, arguments):
    script = SETTINGS_SCRIPT.format(prepare=prepare, arguments=arguments, error="rr.MismatchError")
    done = mpirun(3, script)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 3, done.stdout
    for rank, line in enumerate(lines):
        assert line.startswith(f"{rank}: rank {rank}: RINGREDUCE_TIMEOUT / init(timeout=...) is ")
        assert "is 10.0 on rank 0 but 11.0 on rank 2" in line


def test_a_bad_value_on_one_rank_keeps_nobody_waiting(mpirun):
    script = SETTINGS_SCRIPT.format(
        prepare="", arguments="timeout=-1 if rank == 1 else 30", error="Exception"
    )
    done = mpirun(3, script, timeout_s=25)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines[1].startswith("1: init(timeout=...) must be a positive number of seconds, not -1")
    assert "rank 1 could not start: ValueError" in lines[0]
    assert "rank 1 could not start: ValueError" in lines[2]


def test_the_world_may_be_a_part_of_mpis(mpirun):
    script = """
import os
from mpi4py import MPI
import ringreduce as rr
half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2, -MPI.COMM_WORLD.rank)
rr.init(half)
rr.init(half)
os.write(1, f"{MPI.COMM_WORLD.rank}: {rr.rank()} {rr.size()}\\n".encode())
try:
    rr.init(MPI.COMM_WORLD)
except rr.RingReduceError as error:
    assert "another communicator" in str(error)
else:
    raise AssertionError("not refused")
rr.barrier()
"""
    done = mpirun(4, script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0: 1 2", "1: 1 2", "2: 0 2", "3: 0 2"]


def test_an_operation_for_which_no_thread_starts_is_not_left_behind():
    """Its caller has an error, and what it would have used may be gone."""
    script = """
import resource
import numpy as np, ringreduce as rr

rr.init()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))  # no room for a stack
try:
    rr.allreduce(np.ones(3), async_op=True)
except rr.ResourceError as error:
    print("refused:", str(error).partition(":")[0])
resource.setrlimit(resource.RLIMIT_AS, before)
assert rr.allreduce(np.ones(3)).sum() == 3
assert rr.allreduce(np.ones(3), async_op=True).wait().sum() == 3
"""
    assert run_python(script)[0] == "refused: cannot start a thread\n"


class FakeTorch:
    """Notes what it is told."""

    def set_num_threads(self, threads):
        self.threads = threads


@pytest.mark.parametrize(
    ("cores", "local_size", "threads"), [(8, 2, 4), (8, 3, 2), (2, 8, 1), (8, 1, None)]
)
def test_each_rank_gets_its_share_of_the_cores(monkeypatch, cores, local_size, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())
    _share_cores(cores, 0, local_size)
    assert getattr(sys.modules["torch"], "threads", None) == threads
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_chosen_number_of_threads_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())
    _share_cores(8, 0, 2)
    assert not hasattr(sys.modules["torch"], "threads")


def test_torch_gets_its_share_if_it_is_imported_after_init(mpirun, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = """
import ringreduce as rr
rr.init()
import torch
cores = rr.world().core.window_info()["cores"]
assert torch.get_num_threads() == max(1, cores // 2), torch.get_num_threads()
"""
    done = mpirun(2, script)
    assert done.returncode == 0, done.stderr
