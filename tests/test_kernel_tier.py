"""The kernel tier below the operators: every instruction set, and its own C++ test under sanitizers."""

import importlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from capsroute import reference

ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
AVX2 = "-mavx2;-mfma;-mf16c"

if os.environ.get("CAPSROUTE_NO_EXT") == "1":
    pytest.skip("CAPSROUTE_NO_EXT=1: there are no kernels to test", allow_module_level=True)
kernel_tier = importlib.import_module("capsroute._kernel_tier")  # built for development only


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", kernel_tier.instruction_sets())
@pytest.mark.parametrize("shape", [(5, 67, 8, 10, 16), (3, 19, 5, 3, 17), (37, 131, 4, 10, 16)], ids=str)
def test_instruction_set_against_reference(name, shape, dtype):
    batch, inputs, in_features, outputs, out_features = shape
    u = torch.randn(batch, inputs, in_features, dtype=dtype)
    weight = torch.randn(inputs, in_features, outputs, out_features, dtype=dtype) / 4
    grad = torch.randn(batch, outputs, out_features, dtype=dtype)
    found = kernel_tier.route(name, u.numpy(), weight.numpy(), grad.numpy(), 3)

    exact = [x.double().requires_grad_() for x in (u, weight)]
    v, _ = reference.routing(exact[0], exact[1].permute(0, 2, 3, 1), None, None, None, reference.Options())
    expected = v, *torch.autograd.grad(v, exact, grad.double())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(have).double(), want, rtol=tolerance, atol=tolerance)


def test_unknown_instruction_set_is_refused():
    one = torch.ones(1, 1, 1, 1).numpy()
    with pytest.raises(ValueError, match="mmx"):
        kernel_tier.route("mmx", one[0], one, one[0], 1)


# What the C++ test is built with: how, and the emulator that runs it.
BUILDS = {
    "address-16": ({"CAPSROUTE_SANITIZE": "address,undefined", "CAPSROUTE_TEST_BYTES": 16}, None),
    # AVX-512's vectors, in two halves where the processor lacks it: the same lanes (here alone samples too), tiles and
    # tails; and its pairs of bfloat16, one after the other
    "thread-64": ({"CAPSROUTE_SANITIZE": "thread", "CAPSROUTE_TEST_BYTES": 64, "CAPSROUTE_TEST_FLAGS": AVX2}, None),
    "address-32": (
        {"CAPSROUTE_SANITIZE": "address,undefined", "CAPSROUTE_TEST_BYTES": 32, "CAPSROUTE_TEST_FLAGS": AVX2},
        None,
    ),
    "address-64": (
        {
            "CAPSROUTE_SANITIZE": "address,undefined",
            "CAPSROUTE_TEST_BYTES": 64,
            "CAPSROUTE_TEST_FLAGS": f"{AVX2};-DCAPSROUTE_PAIRS",
        },
        None,
    ),
    # NEON, by Debian's cross compiler and qemu: no such processor is at hand
    "aarch64": (
        {
            "CMAKE_SYSTEM_NAME": "Linux",
            "CMAKE_SYSTEM_PROCESSOR": "aarch64",
            "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
            "CMAKE_EXE_LINKER_FLAGS": "-static",
        },
        "qemu-aarch64",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of the C++ test, all begun at once: each compiles one long file, on one core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(build_and_run, tmp_path_factory.mktemp(name), *how)
            for name, how in BUILDS.items()
            if not why_not(name)
        }


@pytest.mark.parametrize("name", BUILDS)
def test_cpp_test(name, runs):
    if name not in runs:
        pytest.skip(why_not(name))
    run = runs[name].result()
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip().endswith("0 failures")


def why_not(name: str) -> str:
    """Why the C++ test cannot be built or run so here, or nothing."""
    settings, emulator = BUILDS[name]
    if emulator:
        tools = {settings["CMAKE_CXX_COMPILER"]: "g++-aarch64-linux-gnu", emulator: "qemu-user"}
        missing = [
            f"there is no {tool} here: apt-get install {tools[tool]}" for tool in tools if not shutil.which(tool)
        ]
        return "; ".join(missing)
    if "CAPSROUTE_TEST_FLAGS" in settings and "avx2" not in kernel_tier.instruction_sets():
        return "this processor has no AVX2"
    return ""


def build_and_run(directory: Path, settings: dict, emulator: str | None) -> subprocess.CompletedProcess:
    """The run of the first command that fails, or of the test."""
    assert shutil.which("cmake", path=PATH)
    defines = [f"-D{key}={value}" for key, value in {"CAPSROUTE_KERNEL_TEST": "ON", **settings}.items()]
    env = {**os.environ, "PATH": PATH}
    for command in (
        ["cmake", "-S", ROOT, "-B", directory, *defines],
        ["cmake", "--build", directory, "--target", "kernel_test", "--parallel"],
        [*([emulator] if emulator else []), directory / "kernel_test"],
    ):
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        if run.returncode:
            break
    return run
