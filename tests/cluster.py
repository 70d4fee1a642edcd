"""Several hosts on this machine for tests, made by scripts/cluster.sh, where it allows that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "cluster.sh"


def call(verb: str, *arguments: str) -> None:
    """Raises CalledProcessError, with what the script said, if it fails."""
    subprocess.run(
        [str(SCRIPT), verb, *arguments], check=True, capture_output=True, text=True, timeout=30
    )


def why_not() -> str | None:
    """What this machine lacks, if anything."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: install iproute2 and util-linux"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "true"]
    if subprocess.run(probe, capture_output=True, timeout=30).returncode != 0:
        return "this machine allows no namespaces"
    return None


class Cluster:
    """Hosts 1 to `hosts`, until `down`."""

    def __init__(self, mpirun: str, name: str, hosts: int, rate: str) -> None:
        self._environment = os.environ | {"MPIRUN": mpirun, "CLUSTER_NAME": name}
        self._name = name
        try:
            call("up", "--name", name, "--hosts", str(hosts), "--rate", rate)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no hosts can be made on this machine: {error.stderr}")

    def command(self, *arguments: str, layout: str = "1,1", mpirun: str = "") -> list[str]:
        """mpirun across the hosts of Python with these arguments, for `environment`.

        layout: ranks on host 1, on host 2, and so on. mpirun: options of its own.
        """
        options = ["--unequal", layout, "--mpirun", mpirun]
        return [str(SCRIPT), "run", *options, "--", sys.executable, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return self._environment

    def fail(self, host: int) -> None:
        """Kills every process of the host."""
        call("fail", "--name", self._name, str(host))

    def cut(self, host: int) -> None:
        """Unplugs the host's network cable."""
        call("cut", "--name", self._name, str(host))

    def down(self) -> None:
        call("down", "--name", self._name)
