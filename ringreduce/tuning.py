"""The constants of a cluster's links, as `python -m ringreduce.tune` writes them to a file.

A JSON object: "version", "constants" (some of the core's, by name), "measured" (where, for people).
What they mean and what stands in for those that are not there: csrc/comm/constants.h.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ringreduce import _core

VERSION = 1


def read(path: str) -> dict[str, float]:
    """Raises ValueError, which names the file, unless it is such a file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("constants"), dict):
        raise ValueError(f"{path} was not written by python -m ringreduce.tune")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')}, not {VERSION}: measure again with "
            "python -m ringreduce.tune"
        )
    return {name: _check(path, name, value) for name, value in content["constants"].items()}


def _check(path: str, name: str, value: Any) -> float:
    if name not in _core.CONSTANTS:
        raise ValueError(f"{path}: unknown constant {name!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {name} must be a positive number, not {value!r}")
    return float(value)


def write(path: str, constants: Mapping[str, float], measured: Mapping[str, Any]) -> None:
    """All of it or nothing, whatever happens meanwhile. Raises OSError."""
    content = {"version": VERSION, "constants": dict(constants), "measured": dict(measured)}
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
