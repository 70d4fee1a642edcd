"""setup.py's flags, and its choice of CUDA or none, with an nvcc that is a script: nothing is
compiled."""

import runpy
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")
pytest.importorskip("nanobind")

ROOT = Path(__file__).resolve().parent.parent
NVCC = """#!/bin/sh
case $1 in
  --version) echo 'Cuda compilation tools, release VERSION' ;;
  --dryrun) echo '#$ INCLUDES="-I/toolkit/include"  '; echo '#$ LIBRARIES=  "-L/toolkit/lib"' ;;
  --list-gpu-arch) printf 'compute_%s\\n' 50 60 70 75 80 90 100 103 ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """build(version, archs): the names of setup.py, as that nvcc and $RINGREDUCE_CUDA_ARCHS are."""

    def run(version: str, archs: str | None) -> dict[str, Any]:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(NVCC.replace("VERSION", version))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("RINGREDUCE_CUDA_ARCHS", raising=False)
        if archs is not None:
            monkeypatch.setenv("RINGREDUCE_CUDA_ARCHS", archs)
        return runpy.run_path("setup.py")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return run


@pytest.mark.parametrize(
    ("archs", "built"),
    [
        (None, "13.0.88 for sm_70 sm_80 sm_90 sm_100 compute_100"),
        ("90", "13.0.88 for sm_90"),
        ("80;90", "13.0.88 for sm_80 sm_90"),
        ("native", "13.0.88 for native"),
    ],
)
def test_archs(build: Any, archs: str | None, built: str) -> None:
    setup = build("13.0, V13.0.88", archs)
    cuda = setup["find_cuda"]()
    assert str(cuda) == built
    assert (cuda.include_dirs, cuda.library_dirs) == (["/toolkit/include"], ["/toolkit/lib"])
    assert setup["NO_CUDA"] not in setup["sources_of"](cuda)
    targets = [word for word in cuda.command() if "arch=" in word]
    if archs == "native":
        assert targets == ["-arch=native"]
    else:
        assert targets[-1].endswith(f"code={built.rpartition(' ')[2]}")
        assert len(targets) == len(built.split()) - 2


@pytest.mark.parametrize("archs", ["", "none"])
def test_without_cuda(build: Any, archs: str) -> None:
    setup = build("13.0, V13.0.88", archs)
    assert setup["find_cuda"]() is None
    of_cuda = [path for path in setup["sources_of"](None) if path.parent.name == "cuda"]
    assert of_cuda == [setup["NO_CUDA"]]
    assert (ROOT / of_cuda[0]).is_file()


@pytest.mark.parametrize(
    ("version", "archs", "reason"),
    [
        ("11.5, V11.5.119", "90", "CUDA 11.5.119, too old for C..20; RINGREDUCE_CUDA_ARCHS=none"),
        ("unknown", "90", "CUDA 0, too old"),
        ("13.0, V13.0.88", "60", "'60' is none of all-major, native, none and 70, 75, 80"),
        ("13.0, V13.0.88", "sm_90", "'sm_90' is none of"),
    ],
)
def test_refusals_say_what_to_do(build: Any, version: str, archs: str, reason: str) -> None:
    setup = build(version, archs)
    with pytest.raises(setuptools.errors.PlatformError, match=reason):
        setup["find_cuda"]()


def test_a_broken_nvcc_is_quoted(build: Any, tmp_path: Path) -> None:
    setup = build("13.0, V13.0.88", "90")
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence >&2; exit 2\n")
    with pytest.raises(setuptools.errors.PlatformError, match="no licence; .*=none builds without"):
        setup["find_cuda"]()


def test_flags_of_the_user_come_before_ours(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-DTHEIRS -O0")
    setup = build("13.0, V13.0.88", "none")
    for source in setup["sources_of"](None):
        for command in setup["commands_of"](source, None):
            assert command[1:3] == ["-DTHEIRS", "-O0"] and "-O3" in command
