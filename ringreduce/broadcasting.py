"""Brings all ranks to one rank's state at the start of training: an object, a model, an optimizer.

Tensors travel as tensors. Pickled are only the object of broadcast_object and the structure of an
optimizer's state: the ranks of a job are processes of one user, who trust each other.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from ringreduce import tensors
from ringreduce.arrays import CPU
from ringreduce.collectives import communicator_of
from ringreduce.communicator import Communicator
from ringreduce.errors import MismatchError


def broadcast_object(obj: Any, root: int = 0, *, comm: Communicator | None = None) -> Any:
    """root's obj, on all ranks: obj itself on root, an equal one elsewhere, where obj is ignored.

    Any object that pickle takes. Unpickling runs code that root chose, as the same user.
    """
    comm = communicator_of(comm)
    pickled = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL) if comm.rank == root else b""
    data, _ = comm.gather_bytes(pickled, root)
    return obj if comm.rank == root else pickle.loads(data)


def broadcast_parameters(
    model_or_state_dict: Any, root: int = 0, *, comm: Communicator | None = None
) -> None:
    """Overwrites the parameters and buffers on all ranks with root's, one message for each dtype.

    model_or_state_dict: a torch module, a dict of tensors or arrays by name, or a list of (name,
    tensor). Order does not matter. Raises MismatchError on all ranks, naming the first difference,
    unless all have the same names, shapes and dtypes; TypeError or ValueError for a tensor that
    cannot be written.
    """
    comm = communicator_of(comm)
    root = comm.check_root(root)
    named = sorted(_named_tensors(model_or_state_dict), key=lambda item: item[0])
    arrays = tensors.describe_all(named, writable=True)
    lines = [f"{name} {array}" for (name, _), array in zip(named, arrays, strict=True)]
    _require_same("broadcast_parameters", lines, comm)
    comm.grouped_broadcast_([x for _, x in named], root)


def broadcast_optimizer_state(
    optimizer: Any, root: int = 0, *, comm: Communicator | None = None
) -> None:
    """Gives root's state and hyperparameters to the optimizers of all ranks.

    optimizer: a torch optimizer, over parameters of the same shapes and dtypes on all ranks. Only
    root's needs to have state: call it after root has loaded a checkpoint. Raises MismatchError on
    all ranks if the parameters differ.
    """
    comm = communicator_of(comm)
    root = comm.check_root(root)
    groups = [group["params"] for group in optimizer.param_groups]
    parameters = [(f"group {i}, parameter", x) for i, group in enumerate(groups) for x in group]
    arrays = tensors.describe_all(parameters)
    lines = [f"{name} {array}" for (name, _), array in zip(parameters, arrays, strict=True)]
    _require_same("broadcast_optimizer_state", lines, comm)
    found: list[Any] = []
    structure = None
    if comm.rank == root:
        structure = _take_tensors(optimizer.state_dict(), found)
        tensors.describe_all(((f"state[{i}]", x) for i, x in enumerate(found)), writable=True)
    # State may be on the CPU where parameters are on a GPU; which GPU is each rank's own.
    on_gpu = [tensors.describe(x).device != CPU for x in found]
    blanks = [(tuple(x.shape), x.dtype, gpu) for x, gpu in zip(found, on_gpu, strict=True)]
    structure, blanks = broadcast_object((structure, blanks), root, comm=comm)
    if comm.rank != root:
        device = max((array.device for array in arrays), default=CPU)
        own = None if device == CPU else f"cuda:{device}"
        found = [
            tensors.blank(shape, dtype, own if gpu else None).allocate()
            for shape, dtype, gpu in blanks
        ]
    comm.grouped_broadcast_(found, root)
    if comm.rank != root:
        optimizer.load_state_dict(_put_tensors(structure, found))


def _named_tensors(source: Any) -> Iterable[tuple[str, Any]]:
    if hasattr(source, "named_parameters") and hasattr(source, "named_buffers"):
        return [*source.named_parameters(), *source.named_buffers()]
    pairs = source.items() if isinstance(source, Mapping) else source
    try:
        return [(str(name), x) for name, x in pairs]
    except (TypeError, ValueError):
        raise TypeError(
            "expected a torch module, a dict of tensors or a list of (name, tensor), "
            f"not {type(source).__name__}"
        ) from None


class Difference(NamedTuple):
    """Where lists of lines first differ between two ranks."""

    line: int  # its number, from 0
    first: str  # rank 0's
    other: str  # that of ...
    rank: int  # ... the first rank that differs from rank 0


def find_difference(lines: list[str], comm: Communicator) -> Difference | None:
    """Collective: the same on all ranks. None: all have the same lines.

    Digests go first: the description of a large model travels only to be shown.
    """
    mine = json.dumps(lines).encode()
    if len(set(comm.exchange(hashlib.sha256(mine).digest()))) == 1:
        return None
    everyone = [json.loads(message) for message in comm.exchange(mine)]
    rank = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
    pairs = zip_longest(everyone[0], everyone[rank], fillvalue="nothing more")
    return next(Difference(i, a, b, rank) for i, (a, b) in enumerate(pairs) if a != b)


def _require_same(what: str, lines: list[str], comm: Communicator) -> None:
    """Collective. Raises the same MismatchError on all ranks unless all have the same lines."""
    found = find_difference(lines, comm)
    if found is not None:
        raise MismatchError(
            f"{what} on {comm.name}, after #{comm.core.sequence}: tensor {found.line} differs: "
            f"rank 0 has '{found.first}', rank {found.rank} has '{found.other}'. Make the same "
            "model on all ranks"
        )


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a structure that is pickled without its tensors."""

    index: int


def _take_tensors(structure: Any, found: list[Any]) -> Any:
    """The structure with slots in place of its tensors, which are appended to found."""
    if tensors.is_tensor(structure):
        found.append(structure)
        return _Slot(len(found) - 1)
    if isinstance(structure, dict):
        return {key: _take_tensors(value, found) for key, value in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(_take_tensors(value, found) for value in structure)
    return structure


def _put_tensors(structure: Any, found: list[Any]) -> Any:
    """The way back."""
    if isinstance(structure, _Slot):
        return found[structure.index]
    if isinstance(structure, dict):
        return {key: _put_tensors(value, found) for key, value in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(_put_tensors(value, found) for value in structure)
    return structure
