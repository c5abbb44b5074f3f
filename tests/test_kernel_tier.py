"""The kernel tier below the operators: every instruction set, and its own C++ test under sanitizers."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("sanitize", "width", "flags"),
    [
        ("address,undefined", 16, ""),
        ("thread", 32, AVX2),
        # AVX-512's vectors, in two halves where the processor lacks it: the same lanes, tiles and tails; and its pairs
        # of bfloat16, one after the other
        ("address,undefined", 64, f"{AVX2};-DCAPSROUTE_PAIRS"),
    ],
    ids=["address-16", "thread-32", "address-64"],
)
def test_cpp_test_under_sanitizer(tmp_path, sanitize, width, flags):
    if flags and platform.machine() != "x86_64":
        pytest.skip("AVX2 is x86-64's")
    if flags and "avx2" not in kernel_tier.instruction_sets():
        pytest.skip("this processor has no AVX2")
    settings = {"CAPSROUTE_SANITIZE": sanitize, "CAPSROUTE_TEST_BYTES": width, "CAPSROUTE_TEST_FLAGS": flags}
    build_and_run(tmp_path, settings)


def test_cpp_test_on_an_emulated_aarch64(tmp_path):
    """NEON, compiled by Debian's cross compiler and run by qemu: no such processor is at hand."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool, package in ((compiler, "g++-aarch64-linux-gnu"), (emulator, "qemu-user")):
        if not shutil.which(tool):
            pytest.skip(f"there is no {tool} here: apt-get install {package}")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    build_and_run(tmp_path, settings, emulator)


def build_and_run(tmp_path, settings: dict, *emulator: str) -> None:
    assert shutil.which("cmake", path=PATH)
    defines = [f"-D{key}={value}" for key, value in {"CAPSROUTE_KERNEL_TEST": "ON", **settings}.items()]
    env = {**os.environ, "PATH": PATH}
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, *defines],
        ["cmake", "--build", tmp_path, "--target", "kernel_test", "--parallel"],
        [*emulator, tmp_path / "kernel_test"],
    ):
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip().endswith("0 failures")
