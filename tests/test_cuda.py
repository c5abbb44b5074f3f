"""The CUDA kernels without a GPU: emulated on the CPU line by line, and compiled. `make gpu-proof` does the rest."""

import os
import re
import shutil
from math import ceil

import cuda_proof
import emulated
import pytest
import torch
from problems import random_problem

ROOT = emulated.ROOT

if os.environ.get("CAPSROUTE_NO_EXT") == "1":
    pytest.skip("CAPSROUTE_NO_EXT=1: there are no kernels to test", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _built(device):
    if device != "cpu":
        pytest.skip("the emulation runs on the CPU")
    emulated.register()
    yield
    emulated.unregister()


def test_the_suite_of_the_other_backends():
    """Of every test that a backend must pass, two parametrizations; `make gpu-proof` takes all."""
    done = cuda_proof.suite(cuda_proof.SUITE, 2, leave_out=["real_shapes", "shape_of"])
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("form", ["ijod", "jod", "votes"])
def test_same_bits_in_every_order_of_threads_and_blocks(form):
    problem = random_problem((35, 70, 9, 5, 17), form=form, dtype=torch.float32, logits="BIJ", mask="BI", bias=True)
    found = []
    for order in emulated.ORDERS:
        emulated.run_in(order)
        found.append(problem.gradients("emulated"))
    emulated.run_in("forward")
    for other in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize(
    ("sizes", "form"), [((2, 3, 8, 2, 129), "ijod"), ((2, 3, 129, 2, 8), "jod"), ((2, 3, 0, 2, 129), "votes")]
)
def test_rows_too_long_for_the_kernels_are_refused(sizes, form):
    problem = random_problem(sizes, form=form, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"up to 128 in torch\.float32, got 129"):
        problem.run("emulated")


def test_more_than_32_bits_can_count_is_refused():
    u, weight = torch.empty(1, 1, 1).expand(1, 2**31, 1), torch.empty(1, 1, 1)
    with pytest.raises(RuntimeError, match="B, I, D and J up to 1073741824, got B=1 I=2147483648"):
        torch.ops.capsroute_emulated.route(u, weight, None, None, None, 1, False, False, 1e-9, 0, 0, False)


def test_only_one_header_knows_the_compilers():
    knows = r"__CUDA|__NVCC__|emulation/"
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name != "portable.cuh" and path.parent.name != "emulation":
            conditions = r"|^\s*#\s*(if|elif)|__GNUC__" if path.parent.name == "cuda" else ""
            assert not re.search(knows + conditions, path.read_text(), re.MULTILINE), path


def test_every_meeting_and_bound_is_reached():
    """So that `make gpu-proof` mutates each of them; and the cases themselves pass."""
    done = cuda_proof.run(cuda_proof.program(), "--sites")
    assert done.returncode == 0, done.stdout
    assert cuda_proof.sites_in_source() - set(done.stdout.splitlines()) == set()


# Traffic


@pytest.mark.parametrize("batch", [32, 64])
def test_bytes_of_a_forward_follow_the_formula(batch):
    """With W in place, float32, no options, and more input capsules than one launch takes."""
    inputs, in_features, outputs, out_features, passes = 200, 8, 10, 16, 3
    u = torch.randn(batch, inputs, in_features)
    weight = torch.randn(inputs, in_features, outputs, out_features)
    emulated.take_launches()
    torch.ops.capsroute_emulated.route(
        u, weight.permute(0, 2, 3, 1), None, None, None, passes, False, False, 1e-9, 0, 0, False
    )
    launches = emulated.take_launches()
    assert [x.kernel for x in launches] == ["pass", "finish"] * passes
    tiles = batch // 32
    chunks = launches[0].blocks // tiles
    assert chunks == ceil(inputs / (2 * ceil(ceil(inputs / 32) / 2)))
    state = 4 * batch * outputs * out_features  # V, or the partial sums of a chunk

    def total(kernel, what):
        return sum(getattr(x, what) for x in launches if x.kernel == kernel)

    assert total("pass", "loaded") == passes * 4 * (weight.numel() * tiles + u.numel()) + (passes - 1) * chunks * state
    assert total("pass", "stored") == passes * chunks * state
    assert total("finish", "loaded") == passes * chunks * state + (passes - 2) * state
    assert total("finish", "stored") == passes * state  # V after every pass but the last, then v


def test_small_problems_take_one_launch():
    problem = random_problem((40, 50, 64, 4, 64), form="ijod", dtype=torch.float32)  # ComiRec
    emulated.take_launches()
    problem.run("emulated")
    assert [x.kernel for x in emulated.take_launches()] == ["pack", "route"]


# Compilation


def test_float32_kernels_compile_without_local_memory(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc was not found: the CUDA kernels are not compiled here")
    kernels = cuda_proof.compile_for("float32", 90, tmp_path)
    assert len(kernels) > 20
    assert [x for x in kernels if x[3]] == []
