"""Reduces gradients while backward goes on: hooks count, complete buckets leave, its end publishes.

A bucket lies in symmetric memory and is reduced in place. While it is, it is nobody's `.grad`: that
becomes a view of the bucket, or of what a codec makes of it, only when backward ends. Knows nothing
of modules, modes and buffers.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ringreduce import profiling
from ringreduce.ballot import Ballot
from ringreduce.buckets import Bucket
from ringreduce.codecs import Codec
from ringreduce.communicator import Communicator
from ringreduce.costs import Totals, record_backward
from ringreduce.errors import RingReduceError
from ringreduce.join import RollCall
from ringreduce.runs import Run, Slot, points_to


class GradientReducer:
    """Keeps the gradients of a model equal on all ranks. One for each layout of its buckets.

    A backward is *armed* when it is to be reduced: by a hook on what forward returned, or, where
    that had no tensors to hook, by the first gradient. Each parameter's hook counts; a bucket that
    is complete is reduced in the background, strictly in order. When backward ends, what is
    missing is filled in, one last message says who used which parameter, and `.grad`
    becomes the view.

    weight: this rank's; None: all count the same. Read when a backward is armed, and None on all
    ranks or on none. roll_call: None unless ranks may run out of data.

    Hooks may run on several threads, one a device: sets change atomically, launches take a lock.
    """

    def __init__(
        self,
        comm: Communicator,
        op: str,
        parameters: dict[str, nn.Parameter],
        plan: Sequence[Bucket],
        codec: Codec,
        before_publishing: Callable[[int], None],
        totals: Totals,
        previous: GradientReducer | None = None,
    ) -> None:
        """Collective: allocates the buckets.

        before_publishing: called at the end of a reduced backward, on all ranks, with the first
        rank that has data. totals: counted up. previous: whose gradients, reduced or not, are
        still in the parameters.
        """
        self.comm = comm
        self.plan = plan
        self.weight: float | None = None
        self.roll_call: RollCall | None = None
        if previous is not None:
            self.weight, self.roll_call = previous.weight, previous.roll_call
        self._op = op
        self._codec = codec
        self._idempotent = op == "avg" and codec.lossless
        self._before_publishing = before_publishing
        self._totals = totals
        self._slots: list[Slot] = []
        self._runs = [self._allocate(i, bucket, parameters) for i, bucket in enumerate(plan)]
        self._ballot = Ballot(comm, len(self._slots), len(plan))
        reduced = set() if previous is None else previous._reduced_parameters()
        # Slots whose .grad, if any, is all ranks'; slots where it may have more of this rank alone.
        self._reduced = {slot.index for slot in self._slots if id(slot.parameter) in reduced}
        self._local = {slot.index for slot in self._slots} - self._reduced
        self._parameters = {id(slot.parameter) for slot in self._slots}
        self._armed = False
        self._callback: weakref.ref[functools.partial[None]] | None = None  # of the armed backward
        self._weight: float | None = None  # in the armed backward
        self._factor: float | None = None  # of gradients on their way into a bucket
        self._begin_ns = 0  # of the armed backward
        self._next = 0  # bucket to launch
        self._dirty: set[int] = set()  # buckets that got gradients after they were launched
        self._late = False  # whether a first gradient arms
        self._late_once = False  # ... until a backward was reduced
        self._local_task = -1  # the backward that is not to be reduced
        self._lock = threading.Lock()
        self._closed = False
        self._hooked = any(map(_has_hooks, (slot.parameter for slot in self._slots)))
        self._versions: list[int] = []  # of the parameters as the backward began, if hooked
        self._handles = [
            slot.parameter.register_post_accumulate_grad_hook(self._counter(slot, run))
            for run in self._runs
            for slot in run.slots
        ]
        if not self._idempotent:
            self._handles += [
                slot.parameter.register_hook(self._guard(slot)) for slot in self._slots
            ]

    def _allocate(self, index: int, bucket: Bucket, parameters: dict[str, nn.Parameter]) -> Run:
        own = [parameters[place.name] for place in bucket.places]
        run = Run(index, bucket, own, len(self._slots), self.comm, self._codec)
        self._slots += run.slots
        return run

    def _reduced_parameters(self) -> set[int]:
        """By id."""
        return {id(self._slots[i].parameter) for i in self._reduced - self._local}

    @property
    def unused(self) -> list[str]:
        """Names of the parameters that no rank had a gradient for in the last reduced backward."""
        used = zip(self._slots, self._ballot.used, strict=False)
        return [slot.name for slot, used_by_any in used if not used_by_any]

    def holds(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> bool:
        """Whether these very tensors, by these names, are what it reduces."""
        mine = {slot.name: slot.parameter for slot in self._slots}
        return len(mine) == len(parameters) and all(mine.get(name) is p for name, p in parameters)

    def close(self) -> None:
        """Local: removes the hooks. What `.grad` views stays valid."""
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- Around forward.

    def meet(self) -> None:
        """Before forward. Raises RingReduceError in a strict join that a rank has left."""
        if self.roll_call is not None and self.roll_call.strict:
            self.roll_call.call(True, False, (), len(self._slots))

    def watch(self, outputs: Iterable[Tensor], sync: bool) -> None:
        """Called after forward: the backward from its outputs is to be reduced (sync) or not."""
        found = False
        for tensor in outputs:
            if tensor.grad_fn is not None:  # a hook on a leaf would stay for ever
                # Its parents, not the node: that would own a hook that owns it.
                parents = tensor.grad_fn.next_functions
                tensor.register_hook(lambda _, parents=parents: self._begin(sync, parents))
                found = True
        self._late = sync
        self._late_once = found

    def recover(self) -> None:
        """Ends a reduction that an exception in backward has left half done. Collective then.

        It sends what is missing, so that this rank stays in step with the others, and tells them.
        """
        if not self._armed or (self._callback is not None and self._callback() is not None):
            return
        self._armed = False
        self._local.update(set(range(len(self._slots))) - self._missing())
        for run in self._runs:
            run.missing.clear()
        self._launch_ready(ended=True)
        self._vote(set(), failed=True)

    def shadow(self) -> bool:
        """Takes part in one backward of the ranks that have data. False: none has any more.

        Only what was accumulated without being reduced is this rank's part in it, if anything.
        """
        roll_call = self.roll_call
        assert roll_call is not None
        rank = self.comm.rank
        left_behind = self._held() if rank in roll_call.here else ()
        roll_call.call(False, False, left_behind, len(self._slots))
        if rank not in roll_call.here:
            for slot in self._slots:
                if slot.index not in self._local | roll_call.kept:
                    slot.parameter.grad = None  # as the others have done
        if roll_call.over:
            return False
        left = any(self._slots[i].parameter.grad is not None for i in self._local)
        self._prepare(roll_call.weighted or roll_call.by_present, left)
        self._finish()
        return True

    # ---- During backward, on its threads.

    def _begin(self, sync: bool, parents: tuple) -> None:
        """A backward has come to an output of forward, whose graph goes on with `parents`."""
        self.recover()
        if self._closed or self._armed:
            return
        if not sync:
            self._local_task = torch._C._current_graph_task_id()
            if self.roll_call is not None:
                self.roll_call.below = set(self._held())
            return
        if self._accumulates(parents):
            self._arm()

    def _accumulates(self, parents: tuple) -> bool:
        """False within torch.autograd.grad: there the engine skips what is not for its inputs.

        Looks at the graph until it comes to a parameter: near, unless all are in checkpoints.
        """
        nodes, seen = [node for node, _ in parents], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            try:
                if not torch._C._will_engine_execute_node(node):
                    return False
            except RuntimeError:  # a parameter itself is such an input
                return False
            if id(getattr(node, "variable", None)) in self._parameters:
                return True
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
        return True

    def _begin_late(self) -> bool:
        """At a gradient in a backward that is not armed: whether it is now."""
        if not self._late or torch._C._current_graph_task_id() == self._local_task:
            return False
        self._arm()
        return True

    def _arm(self) -> None:
        roll_call, weighted = self.roll_call, self.weight is not None
        if roll_call is not None:
            if not roll_call.strict:
                roll_call.call(True, weighted, self._kept(), len(self._slots))
            weighted |= roll_call.by_present
        self._prepare(weighted, True)
        finish = functools.partial(self._finish)  # the engine's alone: an exception drops it
        torch.autograd.Variable._execution_engine.queue_callback(finish)
        self._callback = weakref.ref(finish)
        self._armed = True

    def _kept(self) -> list[int]:
        """Slots whose reduced gradients this backward will be accumulated onto."""
        return self._held() if self._idempotent else []

    def _held(self) -> list[int]:
        """Slots whose `.grad` is what was reduced, and not zero, whatever this rank has added."""
        assert self.roll_call is not None
        found = ((i, self._slots[i]) for i in self._reduced)
        return [
            i
            for i, slot in found
            if (i not in self._local or i in self.roll_call.below)
            and (grad := slot.parameter.grad) is not None
            and points_to(grad, slot.address)
            and bool(grad.any())
        ]

    def _prepare(self, weighted: bool, counts: bool) -> None:
        """Sets out for a reduction. counts: whether this rank has anything to be weighted."""
        self._begin_ns = time.monotonic_ns()
        for slot in self._slots:
            grad = slot.parameter.grad
            if grad is not None and grad is not slot.published:
                self._take_out(slot, grad)
        self._note_versions()
        for run in self._runs:
            run.missing.update(slot.index for slot in run.slots)
            run.grads[:] = [None] * len(run.slots)
            run.work = None
            if run.streams is not None:
                run.streams.forget()
        self._next = 0
        self._dirty.clear()
        self._weight = self._factor = None
        if weighted:
            self._weight = (1.0 if self.weight is None else self.weight) if counts else 0.0
            self._factor = self._weight
            if self._divides_first():
                self._factor /= self._total_weight() or 1.0

    def _take_out(self, slot: Slot, grad: Tensor) -> None:
        """A gradient that was moved here from another parameter lies in that one's place."""
        if not points_to(grad, slot.address) and any(run.holds(grad) for run in self._runs):
            slot.parameter.grad = grad.clone()

    def _divides_first(self) -> bool:
        """Weighted gradients, and sums of them, may be too large for float16."""
        return any(run.wire.dtype == torch.float16 for run in self._runs)

    def _total_weight(self) -> float:
        """Collective."""
        assert self._weight is not None
        weights = np.zeros(self.comm.size)
        weights[self.comm.rank] = self._weight
        return sum(self.comm.allreduce_(weights, "max").tolist())

    def _counter(self, slot: Slot, run: Run) -> Callable[[Tensor], None]:
        """The hook of a parameter: the hot path, called once for each in every backward."""
        index, missing, grads, streams = slot.index, run.missing, run.grads, run.streams
        discard, place = missing.discard, slot.index - run.slots[0].index

        def count(parameter: Tensor) -> None:
            if not self._armed and not self._begin_late():
                self._local.add(index)
                return
            if streams is not None:
                streams.note()
            if run.work is not None:
                self._dirty.add(run.index)
            elif (grad := parameter.grad) is not None:
                grads[place] = grad
                if self._hooked:
                    parameter.grad = grad.clone()
                elif len(parameter._post_accumulate_grad_hooks) > 1:
                    self._set_apart()
                discard(index)
                if not missing:
                    run.ready_ns = time.monotonic_ns()
                    self._launch_ready()

        count.reducer = self  # type: ignore[attr-defined]  # for reducers_of
        return count

    def _set_apart(self) -> None:
        """A user's hook, still to come, may write to any gradient: from now on, to a copy."""
        self._hooked = True
        self._note_versions()
        for run in self._runs:
            with run.joined():
                for slot, grad in zip(run.slots, run.grads, strict=True):
                    if grad is not None and slot.parameter.grad is grad:
                        slot.parameter.grad = grad.clone()

    def _note_versions(self) -> None:
        self._versions = [slot.parameter._version for slot in self._slots] if self._hooked else []

    def _check_versions(self) -> None:
        for slot, version in zip(self._slots, self._versions, strict=False):
            if slot.parameter._version != version:
                raise RingReduceError(
                    f"'{slot.name}' was written during backward(), as an optimizer in a hook does. "
                    "Gradients are this rank's until backward returns, so the ranks may have "
                    "different values now: step after backward()"
                )

    def _guard(self, slot: Slot) -> Callable[[Tensor], None]:
        """Before a gradient is accumulated: what is reduced already must not be reduced again."""
        index, parameter = slot.index, slot.parameter

        def check(_: Tensor) -> None:
            if index not in self._reduced:
                return
            if parameter.grad is not None and bool(parameter.grad.any()):
                again = (
                    f"op '{self._op}' would count that one again"
                    if self._codec.lossless
                    else f"codec {self._codec.name} would compress that one again"
                )
                raise RingReduceError(
                    f"'{slot.name}' gets a gradient on top of one that is reduced already, and "
                    f"{again}: call zero_grad() before this backward, or accumulate under "
                    "no_sync() and reduce once, at the end"
                )
            self._reduced.discard(index)

        return check

    def _launch_ready(self, unused: Collection[int] = (), *, ended: bool = False) -> None:
        """The last bucket waits for the end: this thread has nothing else to do then, and need not
        wake another one."""
        last = len(self._runs) - 1
        with self._lock:
            while self._next < last + ended and not self._runs[self._next].missing:
                self._reduce(self._runs[self._next], unused, self._next < last)
                self._next += 1

    @profiling.spanned("ringreduce::launch")
    def _reduce(self, run: Run, unused: Collection[int], async_op: bool) -> None:
        op = self._op if self._weight is None else "sum"
        with torch.no_grad():
            self._totals.bytes += run.reduce(
                self.comm, self._codec, op, unused, self._factor, self._idempotent, async_op
            )
            self._totals.gradient_bytes += run.flat.nbytes

    # ---- At the end of backward, on the thread that called it, or that torch has for the GPU.

    @profiling.spanned("ringreduce::finish")
    def _finish(self) -> None:
        try:
            with torch.no_grad():
                computed_ns = time.monotonic_ns()
                unused = self._unused()
                start_s = time.perf_counter()
                self._launch_ready(unused, ended=True)
                self._vote(unused)
                self._totals.count(self._runs, computed_ns)
                self._reduce_dirty(unused)
                self._before_publishing(self.roll_call.here[0] if self.roll_call else 0)
                self._totals.wait_s += time.perf_counter() - start_s
                self._totals.backwards += 1
                self._publish()
                recorder = self.comm.bootstrap.recorder
                record_backward(recorder, self._begin_ns, computed_ns, self._runs)
                self._check_versions()
        finally:
            self._armed = False
            self._late = self._late and not self._late_once

    def _missing(self) -> set[int]:
        return set().union(*(run.missing for run in self._runs))

    def _unused(self) -> set[int]:
        """Ends the count. Returns the slots that have nothing new from this rank."""
        unused = {
            i
            for i in self._missing()
            if i not in self._local or self._slots[i].parameter.grad is None
        }
        for run in self._runs:
            if run.missing:
                run.missing.clear()
                run.ready_ns = time.monotonic_ns()
        return unused

    def _vote(self, unused: set[int], failed: bool = False) -> None:
        """Waits for what all ranks say of the buckets, and for these."""
        ballot = self._ballot
        ballot.hold(unused, self._dirty, self._weight, failed)
        for run in self._runs:
            assert run.work is not None
            run.work.wait()
        if ballot.failed and not failed:
            self._local.update(set(range(len(self._slots))) - unused)
            raise RingReduceError(
                f"backward() raised an exception on rank {', '.join(map(str, ballot.failed))}, so "
                "its gradients were not reduced: each rank has its own. See that rank's output"
            )

    def _reduce_dirty(self, unused: set[int]) -> None:
        """Reduces again, on all ranks, what got more gradients on any of them."""
        for run in (self._runs[i] for i in self._ballot.dirty):
            self._reduce(run, unused, False)
            assert run.work is not None
            run.work.wait()

    def _publish(self) -> None:
        """What no rank has used keeps its `.grad`, None or not."""
        weighted = self._weight is not None and not self._divides_first()
        divisor = sum(self._ballot.weights) if weighted else 0.0
        for run in self._runs:
            if run.flat is not run.wire:
                run.flat.copy_(run.wire)
            if divisor:
                run.flat.div_(divisor)
        pairs = zip(self._slots, self._ballot.used, strict=True)
        published = [slot for slot, used in pairs if used]
        for slot in published:
            slot.publish()
        self._reduced.update([slot.index for slot in published])
        self._local.clear()


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Of the user, after accumulation; torch's optimizers in backward have another kind."""
    return bool(parameter._post_accumulate_grad_hooks) or hasattr(
        parameter, "_in_backward_optimizers"
    )


def reducers_of(module: nn.Module) -> set[GradientReducer]:
    """Those that are not closed and have a parameter of the module: of earlier wrappers."""
    return {
        hook.reducer
        for parameter in module.parameters()
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
        if hasattr(hook, "reducer")
    }
