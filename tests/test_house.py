"""The rules of the house, held by reading the files: floors, sizes, words, README against the disk.

What a linter knows already (style, types) is not repeated here.
"""

import ast
import functools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringreduce.settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "ringreduce", "scripts", "tests")
CXX_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES = 500, 80, 200

# A file of csrc includes from its own folder or from a lower floor.
CXX_FLOORS = {
    "base": 0,
    "reduce": 1,
    "algorithms": 1,
    "shm": 2,
    "cuda": 2,
    "net": 2,
    "sim": 2,
    "comm": 3,
    "bindings": 4,
}
# System headers with a home, each with the only folder that may include it.
CXX_HOMES = {
    r"cuda|cooperative_groups|nvml|nv/": "cuda",
    r"Python\.h|nanobind/": "bindings",
    r"mpi\.h": None,
    r"torch/|ATen/|c10/": None,
}
# A module imports only modules that stand before it.
PYTHON_ORDER = (
    *("_core", "errors", "tuning", "settings"),
    *("profiling", "recording"),
    *("arrays", "gpu_tensors", "tensors", "operands", "work", "bootstrap", "launch"),
    *("communicator", "ending", "world"),
    *("collectives", "broadcasting", "clocks", "timeline", "compiling"),
    *("buckets", "ballot", "codecs", "costs", "join", "runs", "gradients"),
    *("agreement", "attachment", "model", "sync_batchnorm"),
    *("c10d_work", "c10d_channels", "c10d_barrier", "c10d_operands", "c10d_group", "c10d"),
    *("horovod_meeting", "horovod_types", "horovod_ops"),
    *("horovod_optimizer", "horovod_batchnorm", "horovod"),
    *("__init__", "testing"),
    *("bench_data", "bench_peers", "bench_timing", "bench_table", "bench_gpu"),
    *("bench", "simulate", "info", "tune"),
)
# The one step up: methods of Communicator whose bodies live in a module of their own.
UPWARD = {("communicator", "broadcasting")}
# Who may know torch: its arrays, its store, its models, and the programs.
TORCH_MODULES = {
    *("profiling", "gpu_tensors", "tensors", "bootstrap", "launch"),
    *("broadcasting", "buckets", "ballot", "codecs", "costs", "join", "runs", "gradients"),
    *("agreement", "attachment", "model", "sync_batchnorm"),
    *("bench_peers", "bench_gpu", "bench", "info", "simulate"),
    *("c10d_work", "c10d_channels", "c10d_barrier", "c10d_operands", "c10d_group", "c10d"),
    *("horovod_meeting", "horovod_types", "horovod_ops"),
    *("horovod_optimizer", "horovod_batchnorm", "horovod"),
}
WORDS = {
    r"(?<![\w.~])/(home|root|work|opt|mnt|tmp|Users)/": "a path of one machine",
    r"\b(TO[D]O|FIX[M]E|X[X]X)\b": "something left undone",
    r"https?://[^\s\"')]*/(simple|whl)\b": "the address of a registry",
}


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def sources(folder: str, *suffixes: str) -> list[Path]:
    found = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert found, f"no {' '.join(suffixes)} in {folder}"
    return sorted(found)


def all_sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sources(folder, ".py", *CXX_SUFFIXES)]


def tracked() -> list[str]:
    """The files of the project, as git knows them; a copy without git has no such list."""
    command = ["git", "-C", str(ROOT), "ls-files"]
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def report(offences: list[str]) -> None:
    assert not offences, "\n" + "\n".join(offences)


# --- floors


def test_cxx_includes_go_down() -> None:
    offences = []
    for path in sources("csrc", *CXX_SUFFIXES):
        folder = path.parent.name
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', read(path), re.MULTILINE):
            home = name.partition("/")[0]
            if not (ROOT / "csrc" / name).is_file() or home not in CXX_FLOORS:
                offences.append(f'{path.relative_to(ROOT)}: "{name}" is no file of csrc')
            elif home != folder and CXX_FLOORS[home] >= CXX_FLOORS[folder]:
                offences.append(f'{path.relative_to(ROOT)}: "{name}" is not on a lower floor')
    report(offences)


def test_system_headers_stay_home() -> None:
    offences = []
    for path in sources("csrc", *CXX_SUFFIXES):
        for name in re.findall(r"^\s*#\s*include\s*<([^>]+)>", read(path), re.MULTILINE):
            for pattern, home in CXX_HOMES.items():
                if re.match(pattern, name) and path.parent.name != home:
                    offences.append(f"{path.relative_to(ROOT)}: <{name}>")
    report(offences)


def test_missing_dependencies_have_no_ifdef() -> None:
    """What is absent has a file of its own; only base/ and cuda/ ask which compiler reads them."""
    pattern = re.compile(
        r"^\s*#\s*(?:if|elif).*(?:__CUDA|__NVCC|__has_include|\bHAVE_)", re.MULTILINE
    )
    offences = [
        str(path.relative_to(ROOT))
        for path in sources("csrc", *CXX_SUFFIXES)
        if path.parent.name not in ("base", "cuda") and pattern.search(read(path))
    ]
    report(offences)


def package_imports(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "ringreduce":
                    yield module or "__init__"
        elif isinstance(node, ast.ImportFrom):
            package, _, module = (node.module or "").partition(".")
            if node.level or package == "ringreduce":
                names = [alias.name for alias in node.names]
                inside = [name if name in PYTHON_ORDER else "__init__" for name in names]
                yield from [module.rpartition(".")[2]] if module else inside


def test_python_imports_go_down() -> None:
    offences = []
    for path in sources("ringreduce", ".py"):
        if path.stem not in PYTHON_ORDER:
            offences.append(f"{path.name} has no place in PYTHON_ORDER")
            continue
        lower = PYTHON_ORDER[: PYTHON_ORDER.index(path.stem)]
        for module in package_imports(ast.parse(read(path))):
            if module not in lower and (path.stem, module) not in UPWARD:
                offences.append(f"{path.name} imports {module}, which does not stand before it")
    report(offences)


def mentions_torch(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == "torch" for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == "torch"
    if isinstance(node, ast.Constant):
        return node.value == "torch"
    return isinstance(node, ast.Name) and node.id == "torch"


def test_torch_stays_home() -> None:
    offences = [
        f"{path.name}:{getattr(node, 'lineno', '?')}"
        for path in sources("ringreduce", ".py")
        if path.stem not in TORCH_MODULES
        for node in ast.walk(ast.parse(read(path)))
        if mentions_torch(node)
    ]
    report(offences)


def test_import_has_no_side_effects() -> None:
    """`import ringreduce` works without torch, starts no MPI and reads no device."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'cupy', 'mpi4py.MPI']));"
        "import ringreduce"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --- sizes


def test_files_are_short() -> None:
    lengths = {path: len(read(path).splitlines()) for path in all_sources()}
    report([f"{path}: {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES])
    assert statistics.median(lengths.values()) <= MAX_MEDIAN_LINES


def cxx_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(head, line, lines) of every function that lies in no other: found by its braces."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    noise = (
        r'R"(\w*)\((?:.|\n)*?\)\1"|//[^\n]*|/\*(?:.|\n)*?\*/|"(?:\\.|[^"\\\n])*"'
        r"|(?<!\w)'(?:\\.|[^'\\\n])'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    )
    text = re.sub(noise, blank, text, flags=re.MULTILINE)
    open_braces: list[tuple[int, bool]] = []  # where its head begins; whether a function's
    begin = 0
    for match in re.finditer(r"[{};]", text):
        at = match.start()
        begin, before = match.end(), begin
        if match[0] == "{":
            head = re.sub(
                r"\[\[.*?\]\]|\b(?:alignas|__attribute__)\s*\([^{]*?\)", "", text[before:at]
            )
            in_function = any(function for _, function in open_braces)
            open_braces.append((before, "(" in head and not in_function))
        elif match[0] == "}":
            start, function = open_braces.pop()
            if function and text[at + 1 :].lstrip()[:1] in ("{", ","):
                begin = start  # a constructor's initializer: its head goes on
            elif function:
                start += len(text[start:at]) - len(text[start:at].lstrip())
                first, last = text.count("\n", 0, start) + 1, text.count("\n", 0, at) + 1
                yield " ".join(text[start:at].partition("{")[0].split()), first, last - first + 1


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short() -> None:
    offences = []
    for path in [*all_sources(), ROOT / "setup.py"]:
        functions = python_functions if path.suffix == ".py" else cxx_functions
        for name, line, lines in functions(read(path)):
            if lines > MAX_FUNCTION_LINES:
                offences.append(f"{path.relative_to(ROOT)}:{line}: {lines} lines: {name[-60:]}")
    report(offences)


def test_cxx_functions_are_found() -> None:
    """The reader of braces above, on what it meets."""
    text = """#define BRACE {
namespace a {
template <class T>
struct alignas(64) S : B<T> {  // {
  const char* text() const { return "}"; }
  int value{3};
  S(int x) : value{x} {
    if (x) { y('{'); }
  }
};
static constexpr int table[] = {1, 2};
auto g(int n) -> int {
  auto f = [&](int m) {
    return m;
  };
  return f(n);
}
}  // namespace a
"""
    found = {line: lines for _, line, lines in cxx_functions(text)}
    assert found[5] == 1 and found[7] == 3 and found[12] == 6
    assert not set(found) & {2, 3, 4, 6, 11}


# --- words and README


def test_words() -> None:
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != "LICENSE"]
    offences = []
    for path in [*top, *all_sources(), ROOT / ".ci/run"]:
        if path.suffix == ".png":
            continue
        for pattern, meaning in WORDS.items():
            for match in re.finditer(pattern, read(path)):
                line = read(path).count("\n", 0, match.start()) + 1
                offences.append(f"{path.relative_to(ROOT)}:{line}: {match[0]}: {meaning}")
    report(offences)


def readme_tree(readme: str) -> set[str]:
    """The files that README's ```tree block names.

    A line is a path and a comment. What is indented lies in the folder above it. A folder (its
    path ends in "/") can name files in its comment instead: every word with a dot inside.
    """
    blocks = re.findall(r"^```tree\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "README.md has one block that opens with ```tree"
    files: set[str] = set()
    folders: list[tuple[int, str]] = []  # indentation and path of the open folders
    for line in filter(str.strip, blocks[0].splitlines()):
        indentation = len(line) - len(line.lstrip())
        path, _, comment = line.strip().partition(" ")
        while folders and folders[-1][0] >= indentation:
            folders.pop()
        path = (folders[-1][1] if folders else "") + path
        if path.endswith("/"):
            folders.append((indentation, path))
            files |= {
                path + name for name in re.findall(r"(?<!\S)\w+\.[a-z]+(?=[\s,;:]|$)", comment)
            }
        else:
            files.add(path)
    return files


def test_readme_tree_is_the_disk() -> None:
    """All that git tracks in FOLDERS and above them, but for what begins with a dot."""
    mine = {
        name
        for name in tracked()
        if not name.startswith(".") and ("/" not in name or name.partition("/")[0] in FOLDERS)
    }
    named = readme_tree(read(ROOT / "README.md"))
    report(
        [f"not in README's tree: {name}" for name in sorted(mine - named)]
        + [f"only in README's tree: {name}" for name in sorted(named - mine)]
    )


def test_readme_tree_is_read() -> None:
    readme = """```tree
setup.py            builds csrc/x.cpp
csrc/               the core
  base/             words: a.h b.h, half-open ranges etc.
  comm/
    work.h          a handle
tests/conftest.py   fixtures
```
"""
    csrc = {"csrc/base/a.h", "csrc/base/b.h", "csrc/comm/work.h"}
    assert readme_tree(readme) == {"setup.py", "tests/conftest.py", *csrc}


def test_readme_has_the_settings() -> None:
    """Rows of README's table: variable, argument of init (or -), default."""
    row = r"^\|\s*`(RINGREDUCE_\w+)`\s*\|\s*`?(\w+|-)`?\s*\|\s*`?([^|`]*?)`?\s*\|"
    table = {(setting.variable, setting.argument or "-", setting.default) for setting in SETTINGS}
    assert set(re.findall(row, read(ROOT / "README.md"), re.MULTILINE)) == table
