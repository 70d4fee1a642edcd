"""The collectives as functions, on the world unless comm says otherwise: what each does, in full.

They are methods of Communicator too, without the comm argument. No logic here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ringreduce import _core
from ringreduce.communicator import Communicator
from ringreduce.world import world


def communicator_of(comm: Communicator | None) -> Communicator:
    """comm, or the world for None. Raises TypeError for what is no Communicator."""
    if comm is None:
        return world()
    if isinstance(comm, Communicator):
        return comm
    raise TypeError(
        f"comm must be a ringreduce.Communicator, not {type(comm).__name__}: take world(), or a "
        "part of it with world().split(color); an mpi4py communicator goes to init(comm)"
    )


def allreduce(
    x: Any,
    op: str = "sum",
    *,
    out: Any = None,
    async_op: bool = False,
    comm: Communicator | None = None,
) -> Any:
    """The sum (by default) of x over all ranks, as a new tensor or in out. x is left as it is.

    x: a torch tensor or numpy array, or on a GPU a torch tensor or cupy array, of any shape and
        strides, the same shape and dtype on all ranks; on all on the CPU, or on a GPU. float64,
        float32, float16, bfloat16, int64, int32, int16, int8, uint8, bool, complex64, complex128.
    op: "sum", "avg", "min", "max" or "prod". Floats: 16-bit ones are accumulated in 32 bits; min
        and max propagate NaN. Integers wrap around; their avg is truncated toward zero. bool: sum
        and max are "or", prod and min are "and", no avg. Complex: no min and max.
    out: where the result goes, of x's shape and dtype: x itself, or memory apart from x.

    Returns out, or a new tensor with x's type, shape, dtype and memory format, which never requires
    grad. The result is bitwise the same on all ranks.

    As in every collective here: with async_op=True a `Work` is returned at once, whose `wait()`
    gives the result; operands must not be touched until then. Raises TypeError or ValueError,
    before anything is sent, for what is wrong on this rank alone; MismatchError, on all ranks,
    where they called different things; PeerFailed, CollectiveTimeout or NotInitialized where the
    collective cannot take place.

    On a GPU it is a part of the caller's current stream, as a kernel of torch would be: when the
    call returns it may be still to come, and what fails then is raised by the next call, by
    `Work.wait` or by `Communicator.check`. A communicator works on one GPU of each rank.
    """
    return communicator_of(comm).allreduce(x, op, out=out, async_op=async_op)


# As in Communicator.allreduce_, but two calls sooner: they count beside a collective of 1 us.
@partial(
    _core.shortcut,
    _core.allreduce_in_world,
    signature="(x, op='sum', *, async_op=False, comm=None)",
)
def allreduce_(
    x: Any, op: str = "sum", *, async_op: bool = False, comm: Communicator | None = None
) -> Any:
    """`allreduce` in place: x becomes the sum (by default) over all ranks, and is returned.

    No element of x may lie on another one's memory. A leaf that requires grad is written as under
    `torch.no_grad()`; the tensor's version counts up. If the call fails, the contents of x are
    undefined.
    """
    return communicator_of(comm).allreduce_(x, op, async_op=async_op)


def grouped_allreduce(
    xs: Iterable[Any],
    op: str = "sum",
    *,
    async_op: bool = False,
    comm: Communicator | None = None,
) -> Any:
    """`allreduce` of a list of tensors, as one message for each dtype. Returns the list of results.

    All ranks must pass the same shapes and dtypes in the same order. The list may be empty. Tensors
    on the CPU and on a GPU may be in one list, and travel apart.
    """
    return communicator_of(comm).grouped_allreduce(xs, op, async_op=async_op)


def grouped_allreduce_(
    xs: Iterable[Any],
    op: str = "sum",
    *,
    async_op: bool = False,
    comm: Communicator | None = None,
) -> Any:
    """`grouped_allreduce` in place, of tensors that do not share memory. Returns them as a list.

    If the lists differ between ranks in an asynchronous call of several dtypes, the MismatchError
    leaves the communicator unusable.
    """
    return communicator_of(comm).grouped_allreduce_(xs, op, async_op=async_op)


def reduce_scatter(
    x: Any, op: str = "sum", *, async_op: bool = False, comm: Communicator | None = None
) -> Any:
    """This rank's part of the sum (by default) of x over all ranks, as a new tensor.

    x: as in `allreduce`, with at least one dimension. The result is split along dimension 0 as by
    `numpy.array_split(result, size)[rank]`: the first x.shape[0] % size ranks get one row more.
    """
    return communicator_of(comm).reduce_scatter(x, op, async_op=async_op)


def allgather(x: Any, *, async_op: bool = False, comm: Communicator | None = None) -> Any:
    """The x of all ranks, in rank order, joined along dimension 0, as a new tensor.

    Dimension 0 may differ between ranks, the other dimensions and the dtype may not. A 0-d x counts
    as one row: the result then has shape (size,). On a GPU the ranks tell each other their rows
    first: with async_op=True, too, the call waits for the others to come.
    """
    return communicator_of(comm).allgather(x, async_op=async_op)


def broadcast(
    x: Any, root: int = 0, *, async_op: bool = False, comm: Communicator | None = None
) -> Any:
    """root's x, as a new tensor, on all ranks. All ranks' x must have the same shape and dtype."""
    return communicator_of(comm).broadcast(x, root, async_op=async_op)


def broadcast_(
    x: Any, root: int = 0, *, async_op: bool = False, comm: Communicator | None = None
) -> Any:
    """`broadcast` in place: x becomes root's x, and is returned. x as in `allreduce_`."""
    return communicator_of(comm).broadcast_(x, root, async_op=async_op)


def reduce(
    x: Any,
    op: str = "sum",
    root: int = 0,
    *,
    async_op: bool = False,
    comm: Communicator | None = None,
) -> Any:
    """The sum (by default) of x over all ranks, as a new tensor on root; None on the others."""
    return communicator_of(comm).reduce(x, op, root, async_op=async_op)


def barrier(*, async_op: bool = False, comm: Communicator | None = None) -> Any:
    """Returns None when all ranks have called it; their GPUs may not have finished by then."""
    return communicator_of(comm).barrier(async_op=async_op)


def empty(
    shape: int | Sequence[int],
    dtype: Any,
    device: Any = None,
    comm: Communicator | None = None,
) -> Any:
    """An uninitialised symmetric tensor: all ranks share its memory, so it is reduced uncopied.

    Collective: all ranks of comm ask for the same number of bytes at the same time. The tensor is
    an ordinary one, usable in any collective of comm, in whole or in parts; dropping it is local,
    and its memory is used again when all ranks have.

    dtype: a torch dtype makes a torch tensor; a numpy dtype, or its name, a numpy array, on a GPU
        one of cupy.
    device: None or "cpu"; "cuda", this thread's current GPU, or "cuda:1". Raises ResourceError if
        there is not enough memory to share.
    """
    return communicator_of(comm).empty(shape, dtype, device)
