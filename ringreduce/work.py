"""The handle of an asynchronous call: when it has ended, and what it returns. Not how it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ringreduce import _core
from ringreduce.errors import MismatchError
from ringreduce.operands import DeviceOperands


class Part(Protocol):
    """What a Work waits for, as the core's."""

    def wait(self, timeout_s: float | None = None, /) -> object: ...

    def done(self) -> bool: ...

    def times_ns(self) -> tuple[int, int]: ...


class DeviceWork:
    """A part of a Work whose tensors are on a GPU, where the core's is expected."""

    __slots__ = ("_part", "_operands")

    def __init__(self, part: _core.Work, operands: DeviceOperands) -> None:
        self._part = part
        self._operands = operands

    def wait(self, timeout_s: float | None = None) -> None:
        """The host waits until it is on its way; the caller's current stream, for its end."""
        self._part.wait(timeout_s, self._operands.current_stream())
        self._operands.unpack()

    def done(self) -> bool:
        """Whether the device has finished it."""
        return self._part.done()

    def times_ns(self) -> tuple[int, int]:
        """Of the host."""
        return self._part.times_ns()


class Work:
    """What a collective returns with `async_op=True`. The operands are kept alive without it.

    Until the call has ended, do not write to its operands, nor read those that it writes to.
    """

    __slots__ = ("_parts", "_result", "_finish", "_give_up")

    def __init__(
        self,
        parts: Sequence[Part],
        result: Any = None,
        finish: Callable[[], Any] | None = None,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        """parts: in order of issue. finish makes the result, where it cannot be made before."""
        self._parts = parts
        self._result = result
        self._finish = finish
        self._give_up = give_up

    def wait(self, timeout: float | None = None) -> Any:
        """Waits until the call has ended and returns its result, every time the same object.

        For tensors on a GPU the caller's current stream waits, the host only until the call is on
        its way there; with a timeout, the host too.

        timeout: seconds; None waits as long as the communicator allows. Raises TimeoutError when it
        expires: the call goes on, and wait may be called again; ValueError for NaN. Raises the
        error of the call if it failed.
        """
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout is a number of seconds, or None")
        deadline = None if timeout is None else time.monotonic() + timeout
        for part in self._parts:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                part.wait(left)
            except MismatchError:
                if self._give_up is not None and part is not self._parts[-1]:
                    # Other ranks may have issued fewer parts: theirs and ours would not meet again.
                    self._give_up("the ranks gave different lists to an asynchronous grouped call")
                raise
        finish = self._finish
        if finish is not None:
            self._result = finish()
            self._finish = None
        return self._result

    def times_ns(self) -> tuple[int, int]:
        """When it began and ended on this rank, of time.monotonic_ns(): once it has ended.

        On a GPU it has ended, here, when the host has launched it.
        """
        return self._parts[0].times_ns()[0], self._parts[-1].times_ns()[1]

    def done(self) -> bool:
        """Whether wait would return, or raise, at once; for tensors on a GPU, whether the device
        has finished."""
        return all(part.done() for part in self._parts)
