"""The torch.distributed backend "ringreduce": importing this registers it.

    import ringreduce.c10d
    torch.distributed.init_process_group("ringreduce")

DistributedDataParallel, its communication hooks and ZeroRedundancyOptimizer then run unchanged over
our collectives; nothing goes through another backend. Under mpirun the import is collective: it
sets the variables of torch's env:// rendezvous where they are unset. Under torchrun ranks find each
other through torch's store, without MPI.

torch's own store listens on a TCP port; `ringreduce.c10d.init_process_group` on one host has none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from ringreduce.bootstrap import POLL_S, StoreBootstrap
from ringreduce.c10d_group import ProcessGroup
from ringreduce.communicator import Communicator
from ringreduce.launch import TORCHRUN_VARIABLES, mpi_launch
from ringreduce.profiling import learn_torch
from ringreduce.world import init, is_initialized, world

BACKEND = "ringreduce"

# How often a group of this name and these ranks was made: destroyed ones leave keys in the store.
_uses: dict[tuple[str, tuple[int, ...]], Iterator[int]] = defaultdict(itertools.count)
_store_memory: list[int] = []  # file descriptors, open as long as other ranks may open them


def init_process_group(timeout: timedelta | None = None) -> None:
    """`torch.distributed.init_process_group("ringreduce")` that opens no TCP port on one host.

    Collective. timeout: of every collective of the group; default: that of `ringreduce.init`.
    Under mpirun on one host the ranks share a store in rank 0's memory; otherwise, as under
    torchrun, it is torch's env:// rendezvous.
    """
    wait = timeout or default_pg_timeout
    by_hand = mpi_launch(os.environ) is None and not is_initialized()
    if by_hand and int(os.environ["WORLD_SIZE"]) > 1 or world().local_size < world().size:
        dist.init_process_group(BACKEND, timeout=wait)
        return
    comm = world()
    store = dist.HashStore() if comm.size == 1 else _store_on_one_host(comm)
    dist.init_process_group(
        BACKEND, store=store, rank=comm.rank, world_size=comm.size, timeout=wait
    )


def _store_on_one_host(comm: Communicator) -> dist.Store:
    """A file without a name: it goes when its last process does, however that ends."""
    path = ""
    if comm.rank == 0:
        _store_memory.append(os.memfd_create("ringreduce-store"))
        path = f"/proc/{os.getpid()}/fd/{_store_memory[-1]}"
    return dist.FileStore(comm.broadcast_object(path), comm.size)


def _fill_environment() -> None:
    """What torchrun would have set. Collective where an MPI launcher started several ranks."""
    if all(variable in os.environ for variable in TORCHRUN_VARIABLES):
        return
    own = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if mpi_launch(os.environ) is not None or is_initialized():
        comm = world()
        own = {
            "RANK": comm.rank,
            "WORLD_SIZE": comm.size,
            "LOCAL_RANK": comm.local_rank,
            "LOCAL_WORLD_SIZE": comm.local_size,
        }
        meeting_point = comm.broadcast_object(_meeting_point(comm.local_size < comm.size))
    elif {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return  # set by hand, as is the rest then
    else:
        meeting_point = _meeting_point(False)
    for variable, value in (own | meeting_point).items():
        os.environ.setdefault(variable, str(value))


def _meeting_point(several_hosts: bool) -> dict[str, str]:
    """Where torch's store of rank 0 will listen: a port that is free now."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    return {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR")
        or (socket.getfqdn() if several_hosts else "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


class _PolledStore:
    """What StoreBootstrap needs of a store, without torch's own wait.

    That keeps the connection locked, so one thread's wait, for what another rank sets only after a
    message from us, could keep another thread from sending it.
    """

    def __init__(self, store: dist.Store) -> None:
        self.set, self.get, self.delete_key = store.set, store.get, store.delete_key
        self.check = store.check

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        limit = time.monotonic() + timeout.total_seconds()
        nap_s = 1e-4
        while not self.check(keys):
            if time.monotonic() > limit:
                raise RuntimeError(f"{keys[0]} did not appear")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, POLL_S)


class _Counts:
    """In a store."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def write(self, name: str, count: int) -> None:
        self._store.set(f"{self._prefix}/{name}/sent", str(count))

    def read(self, name: str) -> int:
        key = f"{self._prefix}/{name}/sent"
        return int(self._store.get(key)) if self._store.check([key]) else 0


def _print_errors_at_once() -> None:
    """torch's excepthook shows what earlier ones print when they return. Ours ends the job."""
    earlier = sys.excepthook

    def uncaught(
        kind: type[BaseException], value: BaseException, trace: TracebackType | None
    ) -> None:
        stream = sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr
        with contextlib.redirect_stderr(stream):
            earlier(kind, value, trace)

    sys.excepthook = uncaught


def _create(options: Any, backend_options: Any) -> ProcessGroup:
    """Collective over the members of the group: what torch calls to make one."""
    if backend_options is not None:
        raise TypeError(f"ringreduce has no pg_options, but got {type(backend_options).__name__}")
    store: Any = _PolledStore(options.store)
    rank, size = options.group_rank, options.group_size
    ranks = tuple(options.global_ranks_in_group)
    prefix = f"ringreduce/{options.group_id}/{next(_uses[options.group_id, ranks])}"
    if not is_initialized():
        # Opened here, so that an exception on one rank ends the others, as everywhere.
        timeout_s = options.timeout.total_seconds()
        init(StoreBootstrap(store, rank, size, f"{prefix}/world", timeout_s=timeout_s))
    if not dist.is_initialized():
        _print_errors_at_once()
    bootstrap = world().bootstrap
    settings = bootstrap.settings
    if options.timeout != default_pg_timeout:
        settings = replace(settings, timeout_s=options.timeout.total_seconds())

    def open_communicator(part: str, rank: int, size: int) -> Communicator:
        meeting = StoreBootstrap(
            store, rank, size, f"{prefix}/{part}", timeout_s=settings.timeout_s
        )
        meeting.settings = settings
        core = meeting.open_core(f"torch group {options.group_id} {part}".rstrip())
        bootstrap.opened.append(core)
        return Communicator(core, bootstrap, f"torch group {options.group_id}")

    counts = _Counts(store, prefix)
    return ProcessGroup(rank, size, open_communicator, counts, settings.timeout_s)


def _let_groups_monitor_barriers() -> None:
    """torch's function refuses all groups but Gloo's. Ours have the method, too."""
    refusing = dist.monitored_barrier

    @functools.wraps(refusing)
    def monitored_barrier(
        group: Any = None, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        own = group if group is not None else dist.group.WORLD
        if not isinstance(own, ProcessGroup):
            return refusing(group, timeout, wait_all_ranks)
        if isinstance(timeout, (int, float)):
            timeout = timedelta(seconds=timeout)
        return own.monitored_barrier(timeout, wait_all_ranks)

    dist.monitored_barrier = dist.distributed_c10d.monitored_barrier = monitored_barrier


learn_torch()  # for the range of a first call, before any tensor is seen
_let_groups_monitor_barriers()
dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
# From torch 2.15 on it hooks its flight recorder into all groups of other backends, and fails on a
# group that is a class in Python.
_recording: set[str] = getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set())
_recording.add(BACKEND)
_fill_environment()
