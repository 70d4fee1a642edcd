"""Every Bootstrap gives the same exchange, and an error when a rank does not come."""

import threading

import pytest

from ringreduce import testing
from ringreduce.bootstrap import MpiBootstrap, SelfBootstrap, StoreBootstrap
from ringreduce.errors import CollectiveTimeout, RingReduceError

pytestmark = pytest.mark.core

SIZES = [1, 2, 5]


def exercise(bootstrap):
    """Exchanges messages of many lengths, other ones on every rank. Returns what the last gave."""
    rank, size = bootstrap.rank, bootstrap.size
    for length in (0, 1, 7, 100_000):
        expected = [bytes([other]) * (length * other) for other in range(size)]
        assert bootstrap.exchange(bytes([rank]) * (length * rank)) == expected
    assert bootstrap.exchange(b"") == [b""] * size
    return bootstrap.exchange(f"rank {rank}".encode())


def expected_of(size):
    return [f"rank {rank}".encode() for rank in range(size)]


def exercise_on_threads(bootstraps):
    results = {}

    def run(bootstrap):
        results[bootstrap.rank] = exercise(bootstrap)

    threads = [threading.Thread(target=run, args=(boot,), daemon=True) for boot in bootstraps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    size = len(bootstraps)
    assert results == {rank: expected_of(size) for rank in range(size)}


def test_world_of_one():
    exercise_on_threads([SelfBootstrap()])


@pytest.mark.parametrize("size", SIZES)
def test_threads_and_forks(ranks, size):
    results = ranks(size, lambda comm: exercise(comm.bootstrap), timeout_s=30)
    assert results == [expected_of(size)] * size


def test_a_rank_that_ends_is_named_to_those_who_wait_for_it(ranks):
    def fn(comm):
        if comm.rank == 1:
            return None
        with pytest.raises(RingReduceError, match="rank 1 ended before exchange"):
            comm.bootstrap.exchange(b"")
        return True

    assert ranks(3, fn, timeout_s=20) == [True, None, True]


@pytest.mark.parametrize("size", SIZES)
def test_torch_store(size):
    store = pytest.importorskip("torch.distributed").HashStore()
    exercise_on_threads([StoreBootstrap(store, rank, size, timeout_s=20) for rank in range(size)])


def test_torch_store_keeps_only_the_last_round():
    store = pytest.importorskip("torch.distributed").HashStore()
    exercise(StoreBootstrap(store, 0, 1, timeout_s=20))
    assert store.num_keys() == 1


def test_torch_store_names_the_rank_that_does_not_come():
    store = pytest.importorskip("torch.distributed").HashStore()
    bootstrap = StoreBootstrap(store, 0, 2, timeout_s=0.1)
    with pytest.raises(CollectiveTimeout, match=r"rank 0 waited up to 0\.1 s in init for rank 1"):
        bootstrap.exchange(b"")


MPI_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from mpi4py import MPI
from ringreduce.bootstrap import MpiBootstrap
from test_bootstrap import exercise
world = MPI.COMM_WORLD
print(exercise(MpiBootstrap(world, 20)), flush=True)
half = MpiBootstrap(world.Split(world.rank % 2, -world.rank), 20)
assert half.size == (world.size + 1 - world.rank % 2) // 2
assert half.rank == (world.size - 1 - world.rank) // 2
exercise(half)
half.close()
"""

MPI_LATE_SCRIPT = """
import time
from mpi4py import MPI
from ringreduce.bootstrap import MpiBootstrap
from ringreduce.errors import CollectiveTimeout
rank = MPI.COMM_WORLD.rank
bootstrap = MpiBootstrap(MPI.COMM_WORLD, 0.3)
if rank == 0:
    start = time.monotonic()
    try:
        bootstrap.exchange(b"")
    except CollectiveTimeout as error:
        print(error, 0.3 <= time.monotonic() - start < 5, flush=True)
        MPI.COMM_WORLD.Abort(9)
MPI.COMM_WORLD.Recv(bytearray(1), 0)  # never comes
"""


MPI_LIBRARY_SCRIPT = """
import mpi4py, os, sys
if sys.argv[1] == "some" and int(os.environ.get("PMI_RANK", os.environ.get("PMIX_RANK"))) == 1:
    mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
from ringreduce.bootstrap import MpiBootstrap
from ringreduce.errors import RingReduceError
bootstrap = MpiBootstrap(MPI.COMM_WORLD, 20)
try:
    library = bootstrap.mpi_library()
    assert bootstrap.mpi_library() is library
    same = library.path == MPI.__file__
    sys.stdout.write(f"{same} {library.handle_bytes} {library.status_bytes}\\n")
except RingReduceError as error:
    print(error, flush=True)
"""
MPI_LIBRARY = ["-c", MPI_LIBRARY_SCRIPT]


@pytest.mark.parametrize("size", SIZES)
def test_mpi(mpirun, request, size):
    done = mpirun(size, MPI_SCRIPT.format(tests=str(request.path.parent)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(expected_of(size))) == size


def test_mpi_waits_no_longer_than_the_timeout(mpirun):
    done = mpirun(2, MPI_LATE_SCRIPT)
    assert done.returncode == 9, done.stderr
    assert "rank 0 waited 0.3 s in init for the other ranks" in done.stdout
    assert "True" in done.stdout


def test_mpi_library_is_what_mpi4py_has_loaded(mpirun, mpi_name):
    done = mpirun(2, [*MPI_LIBRARY, "all"])
    sizes = "8 24" if mpi_name == "Open MPI" else "4 20"
    assert (done.returncode, done.stdout) == (0, f"True {sizes}\n" * 2), done.stderr


def test_mpi_library_needs_every_rank_to_have_thread_multiple(mpirun):
    done = mpirun(2, [*MPI_LIBRARY, "some"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("needs MPI_THREAD_MULTIPLE, and MPI gives less on rank 1.") == 2


@pytest.mark.parametrize("bootstrap", [SelfBootstrap(), StoreBootstrap(None, 0, 2, timeout_s=1)])
def test_without_mpi_there_is_no_library(bootstrap):
    with pytest.raises(RingReduceError, match="on several hosts, which ringreduce connects by MPI"):
        bootstrap.mpi_library()


def test_mpi_refuses_what_is_not_a_communicator():
    def fn(_):  # in a process of its own: MPI is loaded, but not started
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        for wrong in ("world", MPI.Group()):
            with pytest.raises(TypeError, match="must be an mpi4py communicator, not "):
                MpiBootstrap(wrong, 1.0)
        with pytest.raises(ValueError, match="COMM_NULL"):
            MpiBootstrap(MPI.COMM_NULL, 1.0)
        return True

    pytest.importorskip("mpi4py")
    assert testing.run_forks(1, fn, timeout_s=30) == [True]
