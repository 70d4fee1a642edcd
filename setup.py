"""Builds ringreduce._core from csrc: C++20 and nanobind; neither MPI, CUDA nor torch is needed.

Every source is compiled by g++ (or $CXX) into build/objects, $MAX_JOBS at a time. An object is
reused until its source, a header of it, its flags or the compiler change. setuptools links.
`python setup.py test_csrc` builds the programs of tests/csrc by the same rule and runs them;
with `--sanitize=thread` or `--sanitize=address,undefined`, under a sanitizer.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, PlatformError

VERSION = re.findall(r'^version = "(.+)"$', Path("pyproject.toml").read_text(), re.MULTILINE)[0]
JOBS = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
ABI3 = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
NANOBIND = Path(nanobind.source_dir())
PYTHON_INCLUDE = Path(sysconfig.get_path("include"))
OBJECTS = Path("build/objects")
TEST_LIMIT_S = 600

# How a source becomes an object, by its suffix.
# -Wno-restrict: false alarms of g++ 12 in std::string.
# -ffp-contract=off: a product and a sum round alike under every instruction set.
CXX = shlex.split(os.environ.get("CXX", "g++"))
CXXFLAGS = shlex.split(
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffunction-sections -fdata-sections"
    " -ffp-contract=off -fstack-protector-strong -Wall -Wextra -Wno-restrict -Icsrc"
)
COMPILERS = {".cpp": [*CXX, *CXXFLAGS]}
LINK = ["-Wl,--gc-sections", "-Wl,-z,relro", "-Wl,-z,now"]
LIBRARIES = ["dl", "rt", "pthread"]

# The arithmetic is compiled once for each instruction set, chosen at run time.
KERNELS = Path("csrc/reduce/kernels.cpp")
ISAS = {"baseline": []}
if platform.machine() == "x86_64":
    ISAS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}

# nanobind and what includes it, as the head of nb_combined.cpp has it.
PYTHON = [
    *("-DNDEBUG", "-DNB_COMPACT_ASSERTIONS", "-fno-strict-aliasing"),
    *(["-DPy_LIMITED_API=0x030C0000"] if ABI3 else []),
    *(f"-isystem{path}" for path in (PYTHON_INCLUDE, sysconfig.get_path("platinclude"))),
    *(f"-isystem{NANOBIND.parent / path}" for path in ("include", "ext/robin_map/include")),
]

SOURCES = sorted(
    path
    for path in Path("csrc").glob("*/*")
    if path.suffix in COMPILERS and path.name != "gpu.cpp"
)
BINDINGS = [path for path in SOURCES if path.parent.name == "bindings"]
CORE = [path for path in SOURCES if path not in BINDINGS]


def flags_of(source: Path) -> list[list[str]]:
    """The flags of a source beside its compiler's: one list for each object that it gives."""
    if source == KERNELS:
        return [[*flags, f"-DRR_ISA={isa}"] for isa, flags in ISAS.items()]
    if source in BINDINGS:
        return [[*PYTHON, "-Os", f'-DRR_VERSION="{VERSION}"']]
    return [PYTHON] if NANOBIND in source.parents else [[]]


@functools.cache
def compiler_version() -> str:
    try:
        command = [*CXX, "-dumpfullversion", "-dumpversion"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise PlatformError(f"no C++ compiler ({error}): install g++ or set CXX") from None


def compile_all(sources: Sequence[Path], extra: Sequence[str] = ()) -> list[str]:
    """Compiles what has changed, in parallel. Returns the objects, in the order of the sources."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    units = [(source, [*flags, *extra]) for source in sources for flags in flags_of(source)]
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda unit: compile_one(*unit), units))


def compile_one(source: Path, flags: Sequence[str]) -> str:
    command = [*COMPILERS[source.suffix], *flags, "-c", str(source)]
    # A build in isolation has its nanobind at a new path each time: the version stands for it.
    key = f"{compiler_version()} {command}".replace(str(NANOBIND.parent), nanobind.__version__)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    target = OBJECTS / f"{source.parent.name}_{source.stem}_{digest}.o"
    if not is_current(target):
        print("compiling", source, *(flag for flag in flags if "RR_ISA" in flag), flush=True)
        started_ns = time.time_ns()
        partial = target.with_suffix(".part")
        output = ["-MMD", "-MF", str(target.with_suffix(".d")), "-o", str(partial)]
        if subprocess.run([*command, *output]).returncode != 0:
            raise CompileError(f"{source} does not compile")
        os.utime(partial, ns=(started_ns, started_ns))  # what is edited meanwhile counts as newer
        partial.rename(target)
    return str(target)


def is_current(target: Path) -> bool:
    """Whether an object is newer than all the files that its depfile names."""
    try:
        depfile = target.with_suffix(".d").read_text().replace("\\\n", " ")
        names = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", depfile)[1:] if name]
        return all(os.stat(name).st_mtime_ns < target.stat().st_mtime_ns for name in names)
    except FileNotFoundError:
        return False


class BuildExt(build_ext):
    """Compiles as above, then lets setuptools link."""

    def build_extension(self, ext: Extension) -> None:
        if not (PYTHON_INCLUDE / "Python.h").exists():
            raise PlatformError(
                f"{PYTHON_INCLUDE}/Python.h is missing: install this Python's headers "
                "(Debian and Ubuntu: python3-dev; Fedora: python3-devel)"
            )
        ext.extra_objects = compile_all([NANOBIND / "nb_combined.cpp", *map(Path, ext.sources)])
        ext.sources = []
        self.force = True  # always link: a removed source leaves no object that is newer
        super().build_extension(ext)
        print(
            f"built {ext.name} {VERSION}\n"
            f"  compiler   {' '.join(CXX)} {compiler_version()}\n"
            f"  kernels    {' '.join(ISAS)}, chosen at run time\n"
            f"  python     {sys.version_info.major}.{sys.version_info.minor}"
            f"{' and later (abi3)' if ABI3 else ' only'}, nanobind {nanobind.__version__}\n"
            f"  mpi        whichever mpi4py has loaded, at run time",
            flush=True,
        )


class TestCsrc(Command):
    """Builds every tests/csrc/test_*.cpp with the core, without Python, and runs it."""

    description = "build and run the C++ tests"
    user_options = [("sanitize=", None, "a value of -fsanitize: thread, or address,undefined")]

    def initialize_options(self) -> None:
        self.sanitize = ""

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        tests = sorted(Path("tests/csrc").glob("test_*.cpp"))
        sanitizer = [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-O1", "-g"]
        extra = sanitizer if self.sanitize else []
        core = compile_all(CORE, extra)
        for test, test_object in zip(tests, compile_all(tests, extra), strict=True):
            program = Path(test_object).with_suffix("")
            link = [*CXX, *LINK, *extra, "-o", str(program)]
            libraries = [f"-l{library}" for library in LIBRARIES]
            subprocess.run([*link, test_object, *core, *libraries], check=True)
            # With addresses at random, ThreadSanitizer fails to start on some kernels.
            start = ["setarch", "--addr-no-randomize"] if self.sanitize else []
            print("running", test, self.sanitize, flush=True)
            try:
                subprocess.run([*start, str(program)], check=True, timeout=TEST_LIMIT_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                raise ExecError(f"{test} failed: {error}") from None


core = Extension(
    "ringreduce._core",
    sources=[str(path) for path in SOURCES],
    language="c++",
    py_limited_api=ABI3,
    extra_link_args=LINK,
    libraries=LIBRARIES,
)
setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildExt, "test_csrc": TestCsrc},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if ABI3 else {},
)
