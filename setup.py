"""Builds the C++ kernels with CMake where it can; CMakeLists.txt lists sources and flags.

Without a compiler, without torch (whose headers and library are needed), or with CAPSROUTE_NO_EXT=1 the
package is installed with its plain-PyTorch reference alone. A compile that fails is an error. `python -m build` needs
--no-isolation, and `uv pip install` --no-build-isolation: unlike pip's, their isolated environment shows no torch
around it.
CAPSROUTE_BUILD_TESTING=1 also builds the pybind11 module that tests and benchmarks use.

The CUDA kernels are built where nvcc is and torch is a build for CUDA; whether a GPU is there is never asked.
FORCE_CUDA=1 makes it an error if they cannot be, FORCE_CUDA=0 leaves them out.
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TESTING = os.environ.get("CAPSROUTE_BUILD_TESTING") == "1"


def torch_root() -> Path | None:
    """Where torch is installed: seen from here, or, in pip's isolated build, in the environment around it."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    around = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    venv = Path(sys.prefix, "pyvenv.cfg")
    if not venv.exists() or re.search(r"include-system-site-packages *= *true", venv.read_text(), re.IGNORECASE):
        around += [*site.getsitepackages([sys.base_prefix, sys.base_exec_prefix]), site.getusersitepackages()]
    places += [Path(packages) / "torch" for packages in around]
    return next((place for place in places if (place / "include").is_dir()), None)


def why_no_kernels() -> str | None:
    if os.environ.get("CAPSROUTE_NO_EXT") == "1":
        return "CAPSROUTE_NO_EXT=1 is set"
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, not on {sys.platform}"
    if torch_root() is None:
        return "torch is not installed in this environment"
    return next((f"{tool} was not found" for tool in (program("CXX", "g++"), "cmake") if not shutil.which(tool)), None)


def program(variable: str, default: str) -> str:
    """The program of an environment variable that may have arguments too, as CXX="ccache g++"."""
    return next(iter(shlex.split(os.environ.get(variable, ""))), default)


def why_no_cuda() -> str | None:
    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0 is set"
    version = {}
    exec((torch_root() / "version.py").read_text(), version)
    missing = None if version.get("cuda") else "torch is a build without CUDA"
    if not missing and not shutil.which(program("CUDACXX", "nvcc")):
        missing = "nvcc was not found"
    if missing and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"capsroute: FORCE_CUDA=1 is set, but {missing}")
    return missing


def jobs() -> list[str]:
    """How many at a time, if CMake's own variable does not say it; without a number make would start them all."""
    if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ:
        return []
    most = os.environ.get("MAX_JOBS") or ("" if shutil.which("ninja") else str(len(os.sched_getaffinity(0))))
    return ["--parallel", most] if most else ["--parallel"]


class Build(build):
    """What an earlier build left in the same place would be packed too: modules since deleted, the tests' library."""

    def run(self):
        if os.path.exists(self.build_lib):
            shutil.rmtree(self.build_lib)
        super().run()


class BuildKernels(build_ext):
    """One CMake build; the extensions below only name its products."""

    def run(self):
        cmake = ROOT / "build" / "cmake"  # kept, so that a second install compiles only what changed
        products = [Path(self.get_ext_filename(extension.name)).name for extension in self.extensions]
        # Forget which compiler and which ninja the last install saw, not what it compiled.
        (cmake / "CMakeCache.txt").unlink(missing_ok=True)
        for found in cmake.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        configure = ["cmake", "-S", ROOT, "-B", cmake, f"-DTORCH_ROOT={torch_root()}"]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        if TESTING:
            import pybind11

            configure += ["-DCAPSROUTE_BUILD_TESTING=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCAPSROUTE_CUDA={'OFF' if no_cuda else 'ON'}"]
        targets = [Path(product).stem.removeprefix("lib") for product in products]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", cmake, *jobs(), "--target", *targets], check=True)
        package = (ROOT if self.inplace else Path(self.build_lib)) / "capsroute"
        package.mkdir(parents=True, exist_ok=True)
        for product in products:
            shutil.copy2(cmake / product, package / f"{product}.new")
            os.replace(package / f"{product}.new", package / product)  # a running process keeps the old one

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    """The library calls no Python: one wheel serves every version."""

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


reason = why_no_kernels()
if reason and os.environ.get("FORCE_CUDA") == "1":
    raise SystemExit(f"capsroute: FORCE_CUDA=1 is set, but {reason}")
if reason:
    print(f"capsroute: the C++ kernels are not built, the reference is all there will be: {reason}", file=sys.stderr)
no_cuda = reason or why_no_cuda()
if no_cuda and not reason:
    print(f"capsroute: the CUDA kernels are not built: {no_cuda}", file=sys.stderr)
names = [] if reason else ["capsroute.libcapsroute"] + ["capsroute._kernel_tier"] * TESTING
names += [] if no_cuda else ["capsroute.libcapsroute_cuda"]
setup(
    ext_modules=[Extension(name, []) for name in names],
    cmdclass={"build": Build, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)
