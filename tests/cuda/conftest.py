"""Tests on a real GPU: skipped, visibly, where there is none. One GPU is enough for all of them.

Ranks are threads of one process, whose kernels run side by side, or processes that share the GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

# Read when CUDA starts. More streams than queues would put kernels behind others that wait for
# them; a kernel that is loaded when it is first used may wait for all that run.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import pytest  # noqa: E402
import torch  # noqa: E402

from ringreduce import _core  # noqa: E402


def why_not() -> str:
    reason = str(_core.cuda_info()["unavailable"])
    if reason:
        return reason
    return "" if torch.cuda.is_available() else "this torch finds no GPU"


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Every test here needs one."""
    reason = why_not()
    if reason:
        pytest.skip(f"no GPU: {reason}")


@pytest.fixture
def tests_path() -> dict[str, str]:
    """For mpirun: where scripts find the modules of tests."""
    here = str(Path(__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]])}
