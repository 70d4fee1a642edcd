"""A bucket at work: its memory, the parameters whose gradients it takes, and how it takes them.

When, and what is done with the results, is decided in gradients.py.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ringreduce import _core, profiling
from ringreduce.buckets import Bucket, Place
from ringreduce.codecs import Codec, Pending, Plain
from ringreduce.communicator import Communicator
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


class Run:
    """A bucket at work."""

    __slots__ = (
        *("index", "wire", "flat", "slots", "missing", "grads", "ready_ns", "work", "_packer"),
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
        self._packer = _core.Packer([slot.view for slot in self.slots])

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
