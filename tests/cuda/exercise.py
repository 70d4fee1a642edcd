"""Every kernel a few times on few elements, checked: a program for compute-sanitizer, and no test.

    compute-sanitizer --tool memcheck python tests/cuda/exercise.py

Ranks are threads of this process. Tensors begin off any alignment and lie between elements that
must stay as they are: torch's allocator hides from memcheck what is written just beyond an end.
"""

import sys

import torch

from ringreduce import _core
from ringreduce.bench_data import Job, count_wrong, expected_data, input_data
from ringreduce.testing import run_threads

RANKS = 3
COUNTS = (1, 1001, 40_003)  # one_shot's size, and more than it takes
DTYPES = ("float32", "bfloat16", "int8")
COLLECTIVES = ("allreduce_", "broadcast_", "reduce_scatter", "allgather")
GUARD = 5  # elements


def wrong_elements(comm, name, job, count, symmetric):
    size_bytes = job.count(count * job.item_bytes) * job.item_bytes
    data = torch.from_numpy(input_data(job, size_bytes, comm.rank, 0))
    guard = GUARD * job.item_bytes
    shape = (len(data) + 2 * guard,)
    if symmetric:
        memory = comm.empty(shape, torch.uint8, device="cuda")
    else:
        memory = torch.empty(shape, dtype=torch.uint8, device="cuda")
    memory.fill_(7)
    inside = memory[guard:-guard]
    inside.copy_(data)
    got = getattr(comm, name)(inside.view(getattr(torch, job.dtype)))
    got = got.contiguous().view(torch.uint8).cpu().numpy()
    wrong = count_wrong(got, expected_data(job, size_bytes, comm.rank, 0), job.item_bytes)
    edges = torch.cat([memory[:guard], memory[-guard:]]).cpu()
    comm.check()
    return wrong + int((edges != 7).sum())


def rank(comm):
    wrong = 0
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in COLLECTIVES:
            for dtype in DTYPES:
                job = Job(name.rstrip("_"), "sum", dtype, comm.size)
                for count in COUNTS:
                    for symmetric in (True, False):
                        wrong += wrong_elements(comm, name, job, count, symmetric)
        torch.cuda.current_stream().synchronize()
    return wrong


def main():
    wrong = 0
    for algorithm in _core.ALGORITHMS:
        found = sum(run_threads(RANKS, rank, timeout_s=100, algorithm=algorithm))
        print(f"{algorithm}: {found} wrong elements", flush=True)
        wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
