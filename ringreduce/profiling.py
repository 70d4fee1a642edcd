"""Ranges in torch.profiler: what a rank called, beside torch's own operators.

They show the caller's thread: of an asynchronous collective only its start. When the data moved is
in a timeline. Never imports torch: where nobody did, nobody profiles with it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from ringreduce import _core

Result = TypeVar("Result")


class _NoTorch:
    _is_profiler_enabled = False


# torch.autograd.profiler once torch is in use. The flag is a plain global of that module: reading
# it costs some nanoseconds, torch's function for it ten times that.
switch: Any = _NoTorch


def learn_torch() -> None:
    """Called when the first torch tensor is seen. A torch without the flag shows no ranges."""
    global switch
    profiler = sys.modules["torch"].autograd.profiler
    if hasattr(profiler, "_is_profiler_enabled"):
        switch = profiler
        _core.learn_profiler(vars(profiler))


def span(name: str, **details: Any) -> AbstractContextManager[Any]:
    """A range, for a switch that is on.

    details: numbers and strings, which the profiler shows where it records shapes.
    """
    fast = getattr(sys.modules["torch"]._C._profiler, "_RecordFunctionFast", None)
    try:
        return fast(name, [], details)  # type: ignore[misc]  # None: of torch 2.1
    except TypeError:
        return switch.record_function(name)


def spanned(name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorates a function: a range around each of its calls, if a profiler runs."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            if not switch._is_profiler_enabled:
                return function(*args, **kwargs)
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate
