"""A bucket at work: its memory, the parameters whose gradients it takes, and how it takes them.

When, and what is done with the results, is decided in gradients.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from ringreduce import _core, profiling
from ringreduce.buckets import Bucket, Place
from ringreduce.codecs import Codec, Pending, Plain
from ringreduce.communicator import Communicator
from ringreduce.operands import stream_of
from ringreduce.tensors import describe, torch_stream
from ringreduce.work import Work


class _Ended(Work):
    """Of a blocking call."""

    __slots__ = ("_times_ns",)

    def __init__(self, begin_ns: int) -> None:
        super().__init__(())
        self._times_ns = begin_ns, time.monotonic_ns()

    def times_ns(self) -> tuple[int, int]:
        return self._times_ns


class Slot:
    """One parameter and its place in a bucket."""

    __slots__ = ("index", "name", "parameter", "view", "result", "address", "published")

    def __init__(
        self, index: int, place: Place, parameter: nn.Parameter, wire: Tensor, flat: Tensor
    ) -> None:
        self.index = index
        self.name = place.name
        self.parameter = parameter
        self.view = place.view(wire)  # to be packed
        self.result = place.view(flat)  # ours alone: user code may make its own point elsewhere
        self.address = self.result.data_ptr()
        self.published = self.result.detach()  # what becomes .grad

    def pack(self, grad: Tensor | None, counts: bool, factor: float | None) -> None:
        """The gradient times factor; zeros where it does not count.

        A factor of 0 lets nothing pass, NaN neither: it may be of a mean over no data.
        """
        if grad is not None and points_to(grad, self.address):
            shown = self.parameter.grad is grad
            grad = grad.clone()
            if shown:
                self.parameter.grad = grad
        if grad is None or factor == 0 or not counts:
            self.view.zero_()
        elif factor is None:
            self.view.copy_(_plain(grad))
        else:
            torch.mul(_plain(grad), factor, out=self.view)

    def publish(self) -> None:
        if self.published.data_ptr() != self.address:  # after `p.grad.data = ...`
            self.published = self.result.detach()
        self.parameter.grad = self.published


class _Streams:
    """On which streams of a GPU the gradients of a bucket were made: usually one, the packer's."""

    def __init__(self, wire: Tensor) -> None:
        self._array = describe(wire)
        self._found: set[int] = set()

    def note(self) -> None:
        """The caller's current one."""
        self._found.add(stream_of(self._array))

    def forget(self) -> None:
        self._found.clear()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within, the caller's current stream comes after the others; then they come after it, as
        there the memory of gradients is used again."""
        own, device = stream_of(self._array), self._array.device
        found = list(self._found)  # other threads add
        current = torch_stream(own, device)
        others = [torch_stream(x, device) for x in found if x != own]
        for other in others:
            current.wait_stream(other)
        yield
        for other in others:
            other.wait_stream(current)


class _DevicePacker:
    """On a GPU what _core.Packer is on the CPU."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots

    def pack(self, grads: Sequence[Tensor | None]) -> list[int]:
        """All that is plain, in few kernels. Returns the indices of what it left out."""
        views, plain, left = [], [], []
        for i, (grad, slot) in enumerate(zip(grads, self._slots, strict=True)):
            if grad is None or grad.is_sparse or points_to(grad, slot.address):
                left.append(i)
            else:
                views.append(slot.view)
                plain.append(grad)
        if plain:
            torch._foreach_copy_(views, plain)
        return left


class Run:
    """A bucket at work.

    streams: None on the CPU.
    """

    __slots__ = (
        *("index", "wire", "flat", "slots", "missing", "grads", "ready_ns", "work"),
        *("streams", "_packer"),
    )

    def __init__(
        self,
        index: int,
        bucket: Bucket,
        parameters: Sequence[nn.Parameter],
        first_slot: int,
        comm: Communicator,
        codec: Codec,
    ) -> None:
        """Collective: allocates the memory."""
        self.index = index
        dtype = codec.wire_dtype(bucket.dtype)
        # What travels; symmetric memory.
        self.wire = comm.empty(bucket.length, dtype, bucket.device).zero_()
        # The same tensor, unless a codec has another dtype on the wire.
        same = dtype == bucket.dtype
        self.flat = self.wire if same else torch.zeros_like(self.wire, dtype=bucket.dtype)
        places = enumerate(zip(bucket.places, parameters, strict=True), first_slot)
        self.slots = [
            Slot(i, place, parameter, self.wire, self.flat) for i, (place, parameter) in places
        ]
        self.missing: set[int] = set()  # slots without a gradient yet; the same object for life
        # By slot, as they were accumulated: what a later hook makes of .grad is not reduced.
        self.grads: list[Tensor | None] = [None] * len(self.slots)
        self.ready_ns = 0  # when its last gradient was there
        self.work: Pending | None = None  # of this backward, once it is launched
        self.streams = _Streams(self.wire) if self.wire.is_cuda else None
        views = [slot.view for slot in self.slots]
        self._packer: _core.Packer | _DevicePacker = (
            _core.Packer(views) if self.streams is None else _DevicePacker(self.slots)
        )

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """Within, the caller's current stream comes after all that its gradients were made on."""
        return contextlib.nullcontext() if self.streams is None else self.streams.joined()

    def holds(self, grad: Tensor) -> bool:
        """Whether it begins in the memory that `.grad` is to view."""
        begin = self.flat.data_ptr()
        return not grad.is_sparse and begin <= grad.data_ptr() < begin + self.flat.nbytes

    def reduce(
        self,
        comm: Communicator,
        codec: Codec,
        op: str,
        unused: Collection[int],
        factor: float | None,
        keeps: bool,
        async_op: bool,
    ) -> int:
        """Takes the gradients and starts to reduce them. Returns how many bytes travel.

        unused: slots that have nothing new from this rank: they count as zeros, but if `keeps`, as
        what is there already. factor: of every gradient; None is 1. async_op: False: returns, if it
        can be, when the bucket is reduced.
        """
        with self.joined():
            self._pack(unused, factor, keeps)
        if type(codec) is not Plain:
            self.work, size_bytes = codec.reduce(comm, self.wire, op, self.index)
            return size_bytes
        begin_ns = time.monotonic_ns()
        work = comm.allreduce_(self.wire, op, async_op=async_op)
        self.work = work if async_op else _Ended(begin_ns)
        return self.wire.nbytes

    @profiling.spanned("ringreduce::pack")
    def _pack(self, unused: Collection[int], factor: float | None, keeps: bool) -> None:
        """In one call, but for what is not plain."""
        pairs = zip(self.grads, self.slots, strict=True)
        grads = [slot.parameter.grad if grad is None else grad for grad, slot in pairs]
        self.grads[:] = [None] * len(grads)
        left = range(len(grads)) if factor is not None else self._packer.pack(grads)
        for i in left:
            slot = self.slots[i]
            slot.pack(grads[i], keeps or slot.index not in unused, factor)
        if unused and not keeps:
            for slot in self.slots:
                if slot.index in unused:
                    slot.view.zero_()


def points_to(grad: Tensor, address: int) -> bool:
    return not grad.is_sparse and grad.data_ptr() == address


def _plain(grad: Tensor) -> Tensor:
    """Dense, and outside of any graph."""
    grad = grad.detach()
    return grad.to_dense() if grad.is_sparse else grad
