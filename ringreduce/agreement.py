"""The same model on all ranks: they compare theirs, take rank 0's values, and keep buffers equal.

No gradients here.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ringreduce.broadcasting import broadcast_parameters, find_difference
from ringreduce.communicator import Communicator
from ringreduce.errors import MismatchError


def agree(
    comm: Communicator, module: nn.Module, ignore: Collection[str], arguments: object
) -> None:
    """Collective. Raises the same MismatchError on all ranks unless model and arguments agree."""
    lines = [f"arguments {arguments}"]
    lines += [_describe(name, x) for name, x in named_tensors(module, ignore).items()]
    found = find_difference(lines, comm)
    if found is not None:
        raise MismatchError(
            f"the models on {comm.name} differ between ranks, first here: rank 0 has "
            f"[{found.first}], rank {found.rank} has [{found.other}]. Make the same model on all "
            "ranks"
        )


def broadcast_model(
    comm: Communicator, module: nn.Module, ignore: Collection[str], root: int = 0
) -> None:
    """Collective. Gives the root's parameters and buffers to all ranks, in place."""
    tensors = named_tensors(module, ignore).items()
    broadcast_parameters([(name, x.detach()) for name, x in tensors], root, comm=comm)


class Buffers:
    """The buffers of a module, to be made equal again and again. Does not keep the module alive."""

    def __init__(self, comm: Communicator, module: nn.Module, ignore: Collection[str]) -> None:
        self._comm = comm
        self._module = weakref.ref(module)
        # Where buffers are, not which: forward may assign new ones.
        self._homes = [
            (weakref.ref(owner), name)
            for path, owner in module.named_modules()
            for name in owner._buffers
            if f"{path}.{name}".lstrip(".") not in ignore
        ]

    def broadcast(self, root: int = 0) -> None:
        """Gives the root's to all ranks if the module is in training mode. Collective then."""
        module = self._module()
        if module is None or not module.training:
            return
        owners = ((home(), name) for home, name in self._homes)
        found = (owner._buffers.get(name) for owner, name in owners if owner is not None)
        # Behind autograd's back: the graph of another forward may have saved them, as batch norm
        # does, which does not use their values there.
        buffers = {id(x): x.data for x in found if x is not None}
        if buffers:
            try:
                self._comm.grouped_broadcast_(list(buffers.values()), root)
            except MismatchError as error:
                raise MismatchError(
                    "buffers that forward assigned have other shapes on other ranks: name them in "
                    f"`ignore`, or set sync_buffers=False. {error}"
                ) from None


def named_tensors(module: nn.Module, ignore: Collection[str] = ()) -> dict[str, Tensor]:
    """Parameters and buffers in registration order, shared ones once, without those to ignore."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    seen = {id(x) for name, x in named if name in ignore}
    found: dict[str, Tensor] = {}
    for name, x in named:
        if id(x) not in seen:
            seen.add(id(x))
            found[name] = x
    return found


def check_names(module: nn.Module, ignore: Collection[str]) -> None:
    """Raises ValueError for a name in ignore that is no parameter's and no buffer's."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    unknown = sorted(set(ignore) - names)
    if unknown:
        raise ValueError(f"ignore: no parameter or buffer is called {', '.join(unknown)}")


def check_parameters(module: nn.Module, ignore: Collection[str]) -> None:
    """Raises ValueError unless there are parameters to train, and all of them have a shape."""
    tensors = named_tensors(module, ignore)
    for name, x in tensors.items():
        if is_lazy(x):
            raise ValueError(
                f"'{name}' is lazy and has no shape yet: run one forward on every rank, with "
                "input of the right shape, before the module is wrapped"
            )
    if not any(isinstance(x, nn.Parameter) and x.requires_grad for x in tensors.values()):
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires grad, so nothing to reduce: "
            "use it as it is, with broadcast_parameters() to start all ranks from the same values"
        )


def _describe(name: str, x: Tensor) -> str:
    kind = "parameter" if isinstance(x, nn.Parameter) else "buffer"
    if is_lazy(x):
        return f"{kind} {name}: lazy"
    # The stride of a dimension of one element means nothing, and torch does not keep it.
    strides = [s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True)]
    return (
        f"{kind} {name}: shape {tuple(x.shape)}, strides {tuple(strides)}, {x.dtype}, "
        f"{x.device.type}, requires_grad={x.requires_grad}"
    )
