"""scripts/cluster.sh: its hosts differ in name and memory, share a network, and leave nothing."""

import subprocess
import time

import pytest
from cluster import SCRIPT
from jobs import run_to_end

# Each rank says where it is; all of them exchange 4 MB.
TALK = """
import os, socket, sys, time
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
node = world.Split_type(MPI.COMM_TYPE_SHARED)
x = np.full(1_000_000, world.rank + 1, np.float32)
world.Barrier()
start = time.monotonic()
world.Allreduce(MPI.IN_PLACE, x)
seconds = time.monotonic() - start
sys.stdout.write(f"{socket.gethostname()} {node.size} {int(x[0])} {seconds}\\n")
"""
WAIT = """
import time
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
print("ready", flush=True)
time.sleep(60)
"""


def namespaces():
    listing = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return listing.stdout


def test_ranks_of_two_hosts_talk_at_the_rate_of_the_network(cluster):
    hosts = cluster(2, rate="400mbit")
    done = run_to_end(hosts.command("-c", TALK, layout="2,1"), hosts.environment, 30)
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[:3] for line in lines] == [
        ["host1", "2", "6"],
        ["host1", "2", "6"],
        ["host2", "1", "6"],
    ]
    # 4 MB into host 2 and out of it: 80 ms at 400 Mbit/s, were all of it sent at once.
    assert 0.05 < float(lines[0][3]) < 10


def test_a_failed_host_ends_the_job_and_nothing_is_left(cluster):
    hosts = cluster(2)
    job = subprocess.Popen(
        hosts.command("-c", WAIT), env=hosts.environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        hosts.fail(2)
        job.wait(20)  # with a return code that tells nothing: mpirun's own
    finally:
        job.kill()
        job.communicate()
    hosts.down()
    assert hosts.environment["CLUSTER_NAME"] not in namespaces()


def test_an_interrupted_run_leaves_no_hosts(cluster):
    environment = cluster(1).environment | {"CLUSTER_NAME": "tinterrupted"}
    command = [str(SCRIPT), "run", "--hosts", "2", "--", "sh", "-c", "echo ready; exec sleep 60"]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.terminate()
    job.communicate(timeout=20)
    assert job.returncode == 143
    assert "tinterrupted" not in namespaces()


@pytest.mark.parametrize(
    "arguments",
    [["fail", "7"], ["up", "--rate", "fast"], ["run", "--unequal", "1,x", "--", "true"]],
)
def test_wrong_use_is_told(cluster, arguments):
    cluster(1)
    done = subprocess.run(
        [str(SCRIPT), arguments[0], "--name", "twrong", *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1 and "cluster.sh: " in done.stderr
    assert "twrong" not in namespaces()


REDUCE = """
import sys
import numpy as np
import ringreduce as rr
for count in (3, 1000, 700_001):
    x = np.random.default_rng(rr.rank()).integers(-9, 9, count).astype(np.float32)
    everyone = rr.allgather(x).reshape(rr.size(), count)
    assert (rr.allreduce(x) == everyone.sum(axis=0)).all()
sys.stdout.write(f"{rr.local_rank()} of {rr.local_size()}\\n")
"""
UNTIL_CUT = """
import os, time
import numpy as np
import ringreduce as rr
def note(name, text):
    path = os.path.join(os.environ["NOTES"], f"{name}{rr.rank()}")
    with open(path + ".part", "w") as file:
        file.write(text)
    os.rename(path + ".part", path)
x = np.ones(300_000, np.float32)
rr.allreduce(x)
note("ready", "")
try:
    while True:
        rr.allreduce(x)
except rr.PeerFailed as error:
    note("error", f"{time.monotonic()} {error}")
    raise
"""


def test_collectives_across_hosts(cluster):
    hosts = cluster(2)
    done = run_to_end(hosts.command("-c", REDUCE, layout="2,1"), hosts.environment, 40)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 1", "0 of 2", "1 of 2"]


def test_a_cut_network_is_named_on_both_sides_within_three_seconds(cluster, tmp_path):
    hosts = cluster(3)
    job = subprocess.Popen(
        hosts.command("-c", UNTIL_CUT, layout="2,2,1", mpirun="--runtime-options recoverable"),
        env=hosts.environment | {"NOTES": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("ready?"))) == 5)
        cut_s = time.monotonic()
        hosts.cut(2)
        wait_for(lambda: len(list(tmp_path.glob("error?"))) == 5)
    finally:
        hosts.down()  # mpirun cannot reach what is behind the cut
        job.kill()
        job.wait(20)
    for rank in range(5):
        at_s, text = (tmp_path / f"error{rank}").read_text().split(" ", 1)
        assert float(at_s) - cut_s < 3, text
        if rank in (2, 3):  # on the host that is cut off: to it, the others are
            assert "(host host1) is out of reach" in text or "(host host3) is out" in text, text
        else:
            assert "rank 2 (host host2) is out of reach" in text, text


def wait_for(condition):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)
