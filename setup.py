"""Builds ringreduce._core from csrc: C++20 and nanobind; neither MPI, CUDA nor torch is needed.

Every source is compiled by g++ (or $CXX, with $CXXFLAGS), and where CUDA's nvcc is found the
kernels of the GPU by that, into build/objects, $MAX_JOBS at a time. An object is reused until its
source, a header of it, its flags or the compiler change. setuptools links.
`python setup.py test_csrc` builds the programs of tests/csrc by the same rule, with a fake CUDA
that runs on the CPU, and runs them; with `--sanitize=thread` or `--sanitize=address,undefined`,
under a sanitizer.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

# -Wno-restrict: false alarms of g++ 12 in std::string. clang does not know the option.
# -ffp-contract=off, and -fmad=false below: a product and a sum round alike on every processor.
# -fno-fast-math: min and max propagate NaN, whatever $CXXFLAGS says.
CXX = shlex.split(os.environ.get("CXX", "g++"))
GIVEN = shlex.split(os.environ.get("CXXFLAGS", ""))  # before ours, which win
STANDARD = ["-std=c++20", "-O3"]
CXXFLAGS = shlex.split(
    "-fPIC -fvisibility=hidden -ffunction-sections -fdata-sections"
    " -fno-fast-math -ffp-contract=off -fstack-protector-strong"
    " -Wall -Wextra -Wno-unknown-warning-option -Wno-restrict"
)
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

SOURCES = sorted(path for path in Path("csrc").glob("*/*") if path.suffix in (".cpp", ".cu"))
NO_CUDA = Path("csrc/cuda/no_cuda.cpp")  # compiled in place of all that lies beside it
FAKE_CUDA = Path("tests/csrc/fake_cuda")  # CUDA's headers and runtime, for the C++ tests

ARCHS = "RINGREDUCE_CUDA_ARCHS"  # 80;90 or the like, all-major (the default), native, or none
OLDEST_CUDA = (12, 0)  # the first with C++20
OLDEST_ARCH = 70  # the first with acquire and release
WITHOUT_CUDA = f"{ARCHS}=none builds without CUDA"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, and for which GPUs it is to compile."""

    nvcc: str
    version: str
    include_dirs: list[str]
    library_dirs: list[str]
    archs: list[str]  # sm_90 is machine code, compute_90 is PTX; or native

    def __str__(self) -> str:
        return f"{self.version} for {' '.join(self.archs)}"

    def command(self) -> list[str]:
        targets = [
            f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in self.archs
        ]
        program = [word for word in CXX if not word.startswith("-")][-1]  # ccache g++ -m64: g++
        host = [*(word for word in CXX if word.startswith("-")), *GIVEN, *CXXFLAGS]
        return [
            *(self.nvcc, "-ccbin", program, *STANDARD, "-fmad=false", "-Icsrc"),
            *(["-arch=native"] if self.archs == ["native"] else targets),
            # Drivers as old as CUDA 12 allows do not know it.
            *(["-compress-mode=size"] if version_of(self.version) >= (13,) else []),
            *(f"-Xcompiler={flag}" for flag in host),
        ]


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def read_archs(wanted: str, known: Sequence[int]) -> list[str]:
    """What $RINGREDUCE_CUDA_ARCHS asks for; known: all that nvcc can compile for."""
    if wanted == "native":
        return [wanted]
    if wanted == "all-major":
        # The first of every generation, and PTX for generations that are to come.
        usable = sorted((arch for arch in known if arch >= OLDEST_ARCH), reverse=True)
        archs = sorted({arch // 10: arch for arch in usable}.values())
        return [*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"]
    words = [word for word in re.split(r"[;, ]+", wanted) if word]
    for word in words:
        if not word.isdecimal() or int(word) not in known or int(word) < OLDEST_ARCH:
            raise PlatformError(
                f"{ARCHS}: {word!r} is none of all-major, native, none and "
                f"{', '.join(str(arch) for arch in known if arch >= OLDEST_ARCH)}"
            )
    return [f"sm_{word}" for word in words]


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PlatformError(f"{command[0]}: {error}; {WITHOUT_CUDA}") from None
    if done.returncode != 0:
        raise PlatformError(f"{shlex.join(command)}: {done.stderr.strip()}; {WITHOUT_CUDA}")
    return done.stdout + done.stderr


@functools.cache
def find_cuda() -> Cuda | None:
    """The toolkit in $CUDA_HOME, else on $PATH, else where NVIDIA's packages put it."""
    wanted = os.environ.get(ARCHS, "all-major").strip()
    if wanted in ("", "none"):
        return None
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return None
    found = re.search(r"\bV(\d+\.\d+[\d.]*)", output_of(nvcc, "--version"))
    version = found[1] if found else "0"
    if version_of(version) < OLDEST_CUDA:
        raise PlatformError(f"{nvcc} is of CUDA {version}, too old for C++20; {WITHOUT_CUDA}")
    # nvcc may be a link or a script, and its folders be named otherwise: it knows them itself.
    plan = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)
    lines = re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", plan, re.MULTILINE)
    folders = {name: [word[2:] for word in shlex.split(value)] for name, value in lines}
    known = sorted(
        int(arch) for arch in re.findall(r"_(\d+)$", output_of(nvcc, "--list-gpu-arch"), re.M)
    )
    return Cuda(nvcc, version, folders["INCLUDES"], folders["LIBRARIES"], read_archs(wanted, known))


def is_of_cuda(source: Path) -> bool:
    return source.parent == NO_CUDA.parent


def sources_of(cuda: Cuda | None) -> list[Path]:
    """What the extension is made of."""
    return [
        source
        for source in SOURCES
        if not is_of_cuda(source) or (source == NO_CUDA) == (cuda is None)
    ]


Unit = tuple[Path, list[str]]  # a source, and the command that compiles it


def units_of(sources: Sequence[Path], cuda: Cuda | None) -> list[Unit]:
    return [(source, command) for source in sources for command in commands_of(source, cuda)]


def commands_of(source: Path, cuda: Cuda | None) -> list[list[str]]:
    """One for each object that the source gives."""
    cxx = [*CXX, *GIVEN, *STANDARD, *CXXFLAGS, "-Icsrc"]
    if source == KERNELS:
        return [[*cxx, *flags, f"-DRR_ISA={isa}"] for isa, flags in ISAS.items()]
    if source.parent.name == "bindings":
        return [[*cxx, *PYTHON, "-Os", f'-DRR_VERSION="{VERSION}"']]
    if NANOBIND in source.parents:
        return [[*cxx, *PYTHON]]
    if is_of_cuda(source) and cuda is not None:
        headers = [f"-isystem{folder}" for folder in cuda.include_dirs]
        compiler = cuda.command() if source.suffix == ".cu" else [*cxx, *headers]
        return [[*compiler, f'-DRR_CUDA_BUILT="{cuda}"']]
    return [cxx]


def test_units_of(sources: Sequence[Path], sanitizer: Sequence[str]) -> list[Unit]:
    """The same for the C++ tests: what knows CUDA is compiled as C++, with the fake one."""
    flags = [*GIVEN, *STANDARD, *CXXFLAGS]
    fake = [*CXX, *flags, f"-I{FAKE_CUDA}", "-Icsrc", '-DRR_CUDA_BUILT="a fake"']
    units: list[Unit] = []
    for source in sources:
        knows_cuda = is_of_cuda(source) or "tests" in source.parts
        # g++ does not see that loops which nvcc unrolls leave nothing unset.
        alarms = ("unknown-pragmas", "uninitialized", "maybe-uninitialized", "array-bounds")
        quiet = [f"-Wno-{alarm}" for alarm in alarms]
        language = ["-x", "c++", *quiet] if source.suffix == ".cu" else []
        commands = [[*fake, *language]] if knows_cuda else commands_of(source, None)
        units += [(source, [*command, *sanitizer]) for command in commands]
    return units


@functools.cache
def compiler_version() -> str:
    try:
        command = [*CXX, "-dumpfullversion", "-dumpversion"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise PlatformError(f"no C++ compiler ({error}): install g++ or set CXX") from None


def compile_all(units: Sequence[Unit]) -> list[str]:
    """Compiles what has changed, in parallel. Returns the objects, in the order of the units."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda unit: compile_one(*unit), units))


def compile_one(source: Path, compiler: Sequence[str]) -> str:
    command = [*compiler, "-c", str(source)]
    # A build in isolation has its nanobind at a new path each time: the version stands for it.
    key = f"{compiler_version()} {command}".replace(str(NANOBIND.parent), nanobind.__version__)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    target = OBJECTS / f"{source.parent.name}_{source.stem}_{digest}.o"
    if not is_current(target):
        print("compiling", source, *(flag for flag in command if "RR_ISA" in flag), flush=True)
        started_ns = time.time_ns()
        partial = target.with_suffix(".part")
        output = ["-MMD", "-MF", str(target.with_suffix(".d")), "-o", str(partial)]
        nvcc = command[0] != CXX[0]
        threads = [f"--threads={JOBS}"] if nvcc else []  # for the GPUs at once
        if subprocess.run([*command, *output, *threads]).returncode != 0:
            hint = f" with CUDA {find_cuda()}; {WITHOUT_CUDA}" if nvcc else ""
            raise CompileError(f"{source} does not compile{hint}")
        os.utime(partial, ns=(started_ns, started_ns))  # what is edited meanwhile counts as newer
        partial.rename(target)
    return str(target)


def is_current(target: Path) -> bool:
    """Whether an object is newer than all the files that its depfile names."""
    try:
        depfile = target.with_suffix(".d").read_text().replace("\\\n", " ")
        words = re.split(r"(?<!\\)\s+", depfile.partition(":")[2])
        names = [word.replace("\\ ", " ") for word in words if word]
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
        cuda = find_cuda()
        sources = [NANOBIND / "nb_combined.cpp", *sources_of(cuda)]
        ext.extra_objects = compile_all(units_of(sources, cuda))
        ext.sources = []
        if cuda is not None:
            # Static and hidden: neither a driver nor another library's CUDA comes into play.
            ext.libraries = ["cudart_static", *LIBRARIES]
            ext.library_dirs = cuda.library_dirs
            ext.extra_link_args = [*LINK, "-Wl,--exclude-libs,libcudart_static.a"]
        # Always link: where a source has gone, no object is newer.
        self.force = self.compiler.force = True
        super().build_extension(ext)
        print(
            f"built {ext.name} {VERSION}\n"
            f"  compiler   {' '.join(CXX)} {compiler_version()}\n"
            f"  kernels    {' '.join(ISAS)}, chosen at run time\n"
            f"  cuda       {cuda or 'none'}\n"
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
        # vptr's checks need file descriptors, which a test takes away.
        limits = ["-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
        sanitizer = [f"-fsanitize={self.sanitize}", *limits, "-O1", "-g"]
        extra = sanitizer if self.sanitize else []
        core = [path for path in SOURCES if path.parent.name != "bindings" and path != NO_CUDA]
        core_objects = compile_all(test_units_of([*core, *sorted(FAKE_CUDA.glob("*.cpp"))], extra))
        test_objects = compile_all(test_units_of(tests, extra))

        def run_one(test: Path, test_object: str) -> None:
            program = link_test(test_object, core_objects, extra)
            # With addresses at random, ThreadSanitizer fails to start on some kernels.
            start = ["setarch", "--addr-no-randomize"] if self.sanitize else []
            print("running", test, self.sanitize, flush=True)
            run_test(test, [*start, program])

        # Two at a time: one alone, with ranks that wait and sleep, leaves the cores idle for half
        # of the time, and most keep to the first two. Under a sanitizer one may take minutes.
        with ThreadPoolExecutor(1 if self.sanitize else min(JOBS, 2)) as pool:
            list(pool.map(run_one, tests, test_objects))


def link_test(test_object: str, core_objects: Sequence[str], flags: Sequence[str]) -> str:
    program = str(Path(test_object).with_suffix(""))
    libraries = [f"-l{library}" for library in LIBRARIES]
    link = [*CXX, *LINK, *flags, "-o", program]
    subprocess.run([*link, test_object, *core_objects, *libraries], check=True)
    return program


def run_test(test: Path, command: Sequence[str]) -> None:
    """What it prints is kept for the case that it fails: others run beside it."""
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(
                command, check=True, timeout=TEST_LIMIT_S, stdout=output, stderr=subprocess.STDOUT
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise ExecError(f"{text}{test} failed: {error}") from None


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
