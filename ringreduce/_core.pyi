"""The types of the extension; csrc/bindings has the code."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

KINDS: dict[str, int]
OPS: dict[str, int]
DTYPES: dict[str, int]
ITEM_BYTES: tuple[int, ...]
ALGORITHMS: tuple[str, ...]
CONSTANTS: dict[str, float]
NETWORK_CHUNK_BYTES: int
NETWORK_LANES: int
ACROSS_ALGORITHMS: tuple[str, ...]
SIMULATED_ALGORITHMS: tuple[str, ...]

def supports(op: int, dtype: int, /) -> bool: ...
def build_info() -> dict[str, str]: ...
def cuda_info() -> dict[str, Any]: ...
def learn_type(
    type: type, exchange_table: object, is_lazy: object, mark_written: object
) -> None: ...
def learn_profiler(globals: dict[str, Any]) -> None: ...
def learn_world(world: Communicator | None) -> None: ...
def allreduce_in_world(x: object, op: object, /) -> bool: ...
def shortcut(
    short_way: Callable[[Any, Any], bool], general: Function, signature: str
) -> Function: ...

class Trace:
    def __init__(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> tuple[list[tuple[Any, ...]], int]: ...

class Work:
    counts: list[int]
    def wait(self, timeout_s: float | None = None, stream: int | None = None) -> None: ...
    def done(self) -> bool: ...
    def times_ns(self) -> tuple[int, int]: ...
    def output(self) -> npt.NDArray[np.uint8]: ...

class MpiLibrary:
    """What the core needs of the MPI that mpi4py has loaded; handles as they lie in memory."""

    path: str
    handle_bytes: int
    status_bytes: int
    def __init__(
        self,
        *,
        path: str,
        handle_bytes: int,
        status_bytes: int,
        communicator: bytes,
        byte_type: bytes,
        null_request: bytes,
        undefined: int,
        max_tag: int,
        ask_for_cuda: bool,
    ) -> None: ...

class Packer:
    def __init__(self, targets: list[Any]) -> None: ...
    def pack(self, sources: list[Any]) -> list[int]: ...

class Communicator:
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    closed: bool
    aborted: bool
    sequence: int
    def __init__(
        self,
        rank: int,
        size: int,
        exchange: Callable[[bytes], list[bytes]],
        *,
        in_process: bool,
        timeout_s: float,
        warn_after_s: float,
        algorithm: str,
        name: str,
        trace: Trace,
        host: str = "",
        open_network: Callable[[], tuple[MpiLibrary, int]] | None = None,
        measured: dict[str, float] = ...,
    ) -> None: ...
    def submit(
        self,
        kind: int,
        op: int,
        dtype: int,
        root: int,
        tensors: list[tuple[Any, ...]],
        keepalive: object,
        asynchronous: bool,
        device: int = -1,
        stream: int = 0,
        rows: list[int] = ...,
    ) -> Work: ...
    def allreduce_plain(self, x: object, op: object, /) -> bool: ...
    def allocate(self, size_bytes: int, device: int = -1) -> Any: ...
    def check(self) -> None: ...
    def gpu_info(self) -> dict[str, Any] | None: ...
    def is_symmetric(self, address: int, size_bytes: int, /) -> bool: ...
    def abort(self, reason: str, /) -> None: ...
    def close(self) -> None: ...
    def drain(self, timeout_s: float, /) -> None: ...
    def mark_reported(self) -> None: ...
    def all_reported(self) -> bool: ...
    def window_info(self) -> dict[str, Any]: ...
    def choice(self, kind: int, size_bytes: int, /) -> str: ...
    def forecast(self, size_bytes: int, /) -> tuple[str, int, int, float]: ...
    def constants(self) -> dict[str, float]: ...

def simulate(
    algorithm: str,
    inputs: npt.NDArray[np.uint8],
    dtype: int,
    op: int,
    chunk: int,
    *,
    lengths: list[int] | None = None,
    alpha_s: float = 1.0,
    beta_s_per_byte: float = 0.0,
    slots: int = 2,
    claims: bool = False,
    random_order: bool = False,
    max_delay_s: float = 0.0,
    seed: int = 0,
    lead: int = 1,
) -> dict[str, Any]: ...
def simulate_cluster(
    local_sizes: list[int],
    inputs: npt.NDArray[np.uint8],
    segment: int,
    across: str,
    chunk: int,
    *,
    inside: tuple[float, float],
    link: tuple[float, float],
    lead: int = 1,
    lanes: int = 1,
    shared_port: bool = False,
) -> dict[str, Any]: ...
def predict_cluster(
    count: int,
    nodes: int,
    local_size: int,
    segment: int,
    across: str,
    chunk: int,
    *,
    inside: tuple[float, float],
    link: tuple[float, float],
) -> dict[str, Any]: ...
def choose_cluster(
    count: int,
    nodes: int,
    local_size: int,
    *,
    inside: tuple[float, float],
    link: tuple[float, float],
    most_chunk: int,
) -> tuple[str, int, int, float]: ...
