"""What an install holds: one library for every Python and torch, or the reference alone, and says so."""

import importlib.util
import os
import re
import runpy
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import capsroute
from capsroute import _ops

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")

needs_kernels = pytest.mark.skipif(
    os.environ.get("CAPSROUTE_NO_EXT") == "1", reason="CAPSROUTE_NO_EXT=1: there are no kernels to look at"
)


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Without the CUDA kernels, which take minutes: `make cuda-build` builds those."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FORCE_CUDA": "0", **environment}
    env.pop("CAPSROUTE_BUILD_TESTING", None)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, "-v"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def symbols(*arguments: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol."""
    lines = subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout.splitlines()
    return [tuple(line.split()[-2:]) for line in lines if line]


@needs_kernels
def test_undefined_symbols_are_stable():
    """The LibTorch stable ABI and the C and C++ runtimes, nothing of a torch or Python version."""
    undefined = [name for _, name in symbols("-D", "--undefined-only", str(_ops.LIBRARY))]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    runtime = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ITM_|^__gmon_start__$|^__cxa_")
    strange = [
        name for name in undefined if not name.startswith(("aoti_torch_", "torch_")) and not runtime.search(name)
    ]
    assert strange == []


@needs_kernels
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_weak_symbols_stay_in_their_instruction_set(name):
    """Else the linker may keep the AVX-512 copy of an inline function for everyone."""
    objects = list((ROOT / "build" / "cmake" / "CMakeFiles" / f"kernels_{name}.dir").rglob("*.o"))
    assert objects
    weak = [symbol for kind, symbol in symbols("--defined-only", str(objects[0])) if kind in "WVu"]
    assert weak
    assert [symbol for symbol in weak if f"9capsroute{len(name)}{name}" not in symbol] == []


@pytest.fixture
def packed(tmp_path):
    """Packs a copy of the tree, in which nothing was built, by a command of setup.py; without kernels."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "demo", "runs"))

    def pack(command: str) -> Path:
        words = [sys.executable, "setup.py", command, "--dist-dir", tmp_path / "dist"]
        env = {**os.environ, "CAPSROUTE_NO_EXT": "1"}
        subprocess.run(words, cwd=tree, env=env, check=True, capture_output=True)
        (archive,) = (tmp_path / "dist").iterdir()
        return archive

    pack.tree = tree
    return pack


def test_sdist_holds_what_the_kernels_are_built_from(packed):
    with tarfile.open(packed("sdist")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"CMakeLists.txt", "setup.py", "capsroute/schemas.txt", "capsroute/report/page.html", *sources} <= names
    assert not [name for name in names if name.startswith("tests")]  # they would lack what they import


def test_wheel_holds_nothing_of_an_earlier_build(packed):
    stale = packed.tree / "build" / "lib" / "capsroute"
    stale.mkdir(parents=True)
    for name in ("deleted.py", "libdeleted.so"):
        (stale / name).touch()
    names = zipfile.ZipFile(packed("bdist_wheel")).namelist()
    assert "capsroute/functional.py" in names
    assert not [name for name in names if "deleted" in name]


def test_cmake_is_asked_for_in_one_version():
    asked = [
        re.search(pattern, (ROOT / name).read_text())[1]
        for name, pattern in (
            ("pyproject.toml", r"cmake>=([\d.]+)"),
            ("CMakeLists.txt", r"cmake_minimum_required\(VERSION ([\d.]+)\)"),
        )
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(("compiler", "named"), [("g++ -O2", None), ("nosuch -O2", "nosuch was not found")])
def test_the_compilers_variable_may_hold_arguments(compiler, named):
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FORCE_CUDA": "0", "CXX": compiler}
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ("the C++ kernels are not built" in run.stderr) == bool(named)
    assert named is None or named in run.stderr


def test_cuda_kernels_that_are_asked_for_are_not_left_out():
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FORCE_CUDA": "1", "CUDACXX": "no-such-nvcc"}
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "capsroute: FORCE_CUDA=1 is set, but " in run.stderr


def test_cuda_kernels_that_are_asked_for_are_not_left_out_with_the_others():
    env = {**os.environ, "FORCE_CUDA": "1", "CAPSROUTE_NO_EXT": "1"}
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "capsroute: FORCE_CUDA=1 is set, but CAPSROUTE_NO_EXT=1 is set" in run.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ["--parallel"]), ({"MAX_JOBS": "3"}, ["--parallel", "3"]), ({"CMAKE_BUILD_PARALLEL_LEVEL": "1"}, [])],
    ids=str,
)
def test_limits_of_jobs_hold(monkeypatch, variables, expected):
    monkeypatch.setenv("CAPSROUTE_NO_EXT", "1")
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert runpy.run_path(str(ROOT / "setup.py"))["jobs"]() == expected
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    cores = str(len(os.sched_getaffinity(0)))
    assert runpy.run_path(str(ROOT / "setup.py"))["jobs"]() == (["--parallel", cores] if not variables else expected)


@pytest.mark.parametrize("venv", [None, "false", "true"], ids=["no-venv", "venv", "venv-and-what-is-around"])
@pytest.mark.parametrize("packages", ["system", "user"])
def test_torch_is_found_among_the_packages_around(monkeypatch, tmp_path, packages, venv):
    """As pip's isolated build sees it: none of the packages around it."""
    monkeypatch.setenv("CAPSROUTE_NO_EXT", "1")
    monkeypatch.setenv("FORCE_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    torch_root = runpy.run_path(str(ROOT / "setup.py"))["torch_root"]
    (tmp_path / packages / "torch" / "include").mkdir(parents=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setattr(site, "getsitepackages", lambda prefixes: [str(tmp_path / "system")])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if venv:
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {venv}\n")
    assert torch_root() == (None if venv == "false" else tmp_path / packages / "torch")


@needs_kernels
def test_wheel_holds_one_library_for_every_python(tmp_path):
    built = build_wheel(tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"capsroute-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["capsroute/libcapsroute.so"]
    assert "capsroute/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"CAPSROUTE_NO_EXT": "1"}, "CAPSROUTE_NO_EXT=1 is set"), ({"CXX": "no-such-g++"}, "no-such-g++ was not found")],
    ids=["asked", "no-compiler"],
)
def test_install_without_kernels(tmp_path, environment, reason):
    """It is said while installing and by backends(), and the reference serves."""
    built = build_wheel(tmp_path, **environment)
    assert built.returncode == 0, built.stderr
    assert reason in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import capsroute, torch; print(capsroute.__file__); print(capsroute.backends()['cpu']);"
        "print(capsroute.capsule_linear(torch.ones(2, 5, 3), torch.ones(5, 6, 4, 3)).shape)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, verdict, shape = run.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert verdict.startswith("(False, 'the C++ kernels were not built")
    assert shape == "torch.Size([2, 6, 4])"


@needs_kernels
def test_a_copy_of_the_library_may_be_loaded_first(tmp_path):
    copy = shutil.copy(_ops.LIBRARY, tmp_path)
    script = (
        f"import torch; torch.ops.load_library({str(copy)!r}); import capsroute; print(capsroute.backends()['cpu']);"
        "print(capsroute.capsule_linear(torch.ones(2, 5, 3), torch.ones(5, 6, 4, 3), backend='cpu').shape)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    verdict, shape = run.stdout.splitlines()
    assert verdict == str(capsroute.backends()["cpu"])
    assert shape == "torch.Size([2, 6, 4])"


@needs_kernels
def test_why_a_library_cannot_be_loaded_is_said(monkeypatch, tmp_path):
    cut = tmp_path / _ops.LIBRARY.name
    cut.write_bytes(_ops.LIBRARY.read_bytes()[:20])
    can, why = _ops._load(cut, "")
    assert not can
    assert why.startswith("the C++ kernels could not be loaded: ")
    assert "file too short" in why


@needs_kernels
def test_failed_compile_is_an_error(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    built = build_wheel(tmp_path, CXX=str(broken))
    assert built.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


@needs_kernels
def test_instruction_set_follows_torchs_variable():
    """ATEN_CPU_CAPABILITY is honoured, and a level that is not known changes nothing."""
    script = "import torch, capsroute; print(torch.ops.capsroute.cpu_capability())"

    def chosen(capability: str | None) -> str:
        env = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
        env |= {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
        return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True).stdout.strip()

    best = chosen(None)
    assert best in INSTRUCTION_SETS
    assert chosen("default") == "baseline"
    assert chosen("avx2") == ("baseline" if best == "baseline" else "avx2")
    assert chosen("something") == best


def test_compiler_is_at_hand():
    """The tests above need nm, which comes with the compiler."""
    assert shutil.which("nm")
