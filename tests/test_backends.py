"""Which backend serves a call: what "auto" takes, what an explicit name refuses, and life without the library."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import FUSED, random_problem
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import capsroute
from capsroute import _backends, _ops, _triton


@pytest.fixture
def log(caplog, monkeypatch):
    """What the package logs, from a fresh start."""
    monkeypatch.setattr(_backends, "_logged", set())
    caplog.set_level(logging.INFO, "capsroute")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "capsroute"]


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(_ops, "_loaded", (False, "hidden by the test"))
    monkeypatch.setattr(_triton, "load", lambda: (False, "hidden by the test"))


def called(monkeypatch, name: str) -> list:
    """Collect the calls that a backend serves."""
    calls, backend = [], _backends.BACKENDS[name]

    def run(*args):
        calls.append(args)
        return backend.route(*args)

    monkeypatch.setitem(_backends.BACKENDS, name, backend._replace(route=run))
    return calls


def test_backends_says_what_can_run_here_and_why():
    found = capsroute.backends()
    assert list(found)[-1] == "reference"
    assert set(FUSED) <= set(found)
    assert found["reference"][0] is True
    for can, why in found.values():
        assert isinstance(can, bool)
        assert isinstance(why, str)
        assert why


@pytest.mark.not_interpreted
def test_auto_takes_the_kernels_where_they_serve(monkeypatch, fused):
    calls = called(monkeypatch, fused)
    random_problem().run("auto")
    assert len(calls) == 1


def test_auto_takes_the_reference_where_no_kernels_serve(monkeypatch, log, no_library):
    calls = called(monkeypatch, "reference")
    random_problem().run("auto")
    assert len(calls) == 1
    assert len(log()) == 1
    assert "backend reference" in log()[0]
    assert "hidden by the test" in log()[0]


def test_auto_logs_its_reason_once(log):
    for _ in range(3):
        random_problem().run("auto")
    assert len(log()) == 1
    random_problem(query="BJO").run("auto")
    assert len(log()) == 1


@pytest.mark.parametrize(
    ("cuda", "triton", "features", "takes"),
    [
        (True, True, 16, "cuda"),
        (True, True, 129, "triton"),
        (False, True, 16, "triton"),
        (False, False, 16, "reference"),
    ],
)
def test_auto_on_a_cuda_tensor_asks_cuda_then_triton(monkeypatch, log, cuda, triton, features, takes):
    monkeypatch.setattr(_ops, "_cuda_loaded", (cuda, "hidden by the test"))
    monkeypatch.setattr(_triton, "load", lambda: (triton, "hidden by the test"))
    with FakeTensorMode():
        u, weight = torch.empty(2, 5, 3, device="cuda"), torch.empty(5, 4, features, 3, device="cuda")
        assert _backends.choose("auto", u, weight) is _backends.BACKENDS[takes]
    (line,) = log()
    assert line.startswith(f"backend {takes}: ")
    assert "not cpu: the input capsules are on cuda:0" in line
    assert ("not cuda" in line, "not triton" in line) == (takes != "cuda", takes == "reference")
    assert ("up to 128 in torch.float32, got 129" in line) == (features == 129)


@pytest.mark.parametrize(
    ("u", "weight", "got"),
    [
        ((2**30, 5, 3), (5, 4, 6, 3), None),
        ((2**30 + 1, 5, 3), (5, 4, 6, 3), 2**30 + 1),
        ((2, 2**29 + 1, 5, 3), (4, 6, 3), 2**30 + 2),
        ((2, 2**30 + 1, 3), (6, 3), 2**30 + 1),
        ((2, 5, 3), (5, 2**30 + 1, 6, 3), 2**30 + 1),
        ((2, 5, 2**30, 6), None, None),
        ((2, 5, 2**30 + 1, 6), None, 2**30 + 1),
    ],
    ids=str,
)
def test_cuda_serves_no_size_beyond_its_indices(monkeypatch, u, weight, got):
    monkeypatch.setattr(_ops, "_cuda_loaded", (True, "hidden by the test"))
    with FakeTensorMode():
        u = torch.empty(u, device="cuda")
        weight = None if weight is None else torch.empty(weight, device="cuda")
        can, why = _backends.BACKENDS["cuda"].serves(u, weight)
    assert can == (got is None)
    assert (f"up to 2^30, got {got}" in why) == (got is not None)


def test_cuda_cannot_run_here_without_its_library_or_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for loaded, reason in ((False, "hidden by the test"), (True, "torch sees no CUDA device here")):
        monkeypatch.setattr(_ops, "_cuda_loaded", (loaded, "hidden by the test"))
        can, why = capsroute.backends()["cuda"]
        assert not can
        assert reason in why


def test_explicit_backend_logs_nothing(log):
    random_problem().run("reference")
    assert log() == []


def test_nothing_is_logged_while_compiling(log):
    problem = random_problem()
    compiled = torch.compile(lambda u, weight: capsroute.capsule_linear(u, weight), backend="eager", fullgraph=True)
    assert_close(compiled(**problem.tensors), problem.run("reference"))
    assert log() == []


def test_code_is_not_compiled_anew_after_the_first_message(log):
    problem, counter = random_problem(), CompileCounter()
    compiled = torch.compile(lambda u, weight: capsroute.capsule_linear(u, weight), backend=counter, fullgraph=True)
    compiled(**problem.tensors)
    problem.run("auto")
    compiled(**problem.tensors)
    assert len(log()) == 1
    assert counter.frame_count == 1


def test_explicit_backend_never_falls_back(monkeypatch, fused, no_library):
    calls = called(monkeypatch, "reference")
    with pytest.raises(RuntimeError, match=f'"{fused}" cannot serve this call: hidden by the test'):
        random_problem().run(fused)
    assert calls == []


def test_explicit_backend_refuses_another_device(fused):
    with pytest.raises(RuntimeError, match=f'"{fused}" cannot serve this call: .*meta'):
        random_problem().map(lambda x: x.to("meta")).run(fused)


WITHOUT_LIBRARY = """
import sys
from pathlib import Path
import torch
before = set(sys.modules)
import capsroute
assert Path(capsroute.__file__).parent == Path("capsroute").resolve()
heavy = {"sklearn", "matplotlib", "rich", "safetensors", "triton"} & (set(sys.modules) - before)
assert not heavy, f"import capsroute brings {heavy}"
can, why = capsroute.backends()["cpu"]
assert not can
u, weight = torch.ones(2, 5, 3), torch.ones(5, 6, 4, 3)
assert torch.equal(capsroute.capsule_linear(u, weight), capsroute.capsule_linear(u, weight, backend="reference"))
try:
    capsroute.capsule_linear(u, weight, backend="cpu")
except RuntimeError as error:
    assert why in str(error)
    print(why)
"""


@pytest.mark.parametrize(("library", "reason"), [(None, "not built"), (b"no library", "could not be loaded")])
def test_package_works_without_its_library(tmp_path, library, reason):
    package = Path(capsroute.__file__).parent
    shutil.copytree(package, tmp_path / "capsroute", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library:
        (tmp_path / "capsroute" / _ops.LIBRARY.name).write_bytes(library)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout


def test_a_library_of_other_schemas_says_so(tmp_path):
    """An older one stays after a pull where the package is installed in place."""
    package = Path(capsroute.__file__).parent
    if not _ops.LIBRARY.exists():
        pytest.skip("there is no library here")
    shutil.copytree(package, tmp_path / "capsroute", ignore=shutil.ignore_patterns("_kernel_tier.so", "__pycache__"))
    schemas = tmp_path / "capsroute" / "schemas.txt"
    schemas.write_text(schemas.read_text().replace("int iterations", "int passes"))
    command = [sys.executable, "-c", "import capsroute"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "libcapsroute.so was built from other sources than" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "columns", "can"), [(1024, 1024, True), (1025, 512, True), (1025, 513, False), (1, 2**20 + 1, False)]
)
def test_triton_serves_no_matrix_beyond_its_tiles(monkeypatch, rows, columns, can):
    monkeypatch.setattr(_triton, "load", lambda: (True, "hidden by the test"))
    with FakeTensorMode():
        u, weight = torch.empty(2, 5, columns, device="cuda"), torch.empty(5, 3, rows, columns, device="cuda")
        found, why = _backends.BACKENDS["triton"].serves(u, weight)
        shared, _ = _backends.BACKENDS["triton"].serves(u, torch.empty(3, rows, columns, device="cuda"))
    assert (found, shared) == (can, True)
    assert (f"up to 2^20, got {rows} x {columns}" in why) == (not can)


def test_triton_serves_no_weight_of_an_input_capsule_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(_triton, "load", lambda: (True, "hidden by the test"))
    with FakeTensorMode():
        u = torch.empty(2, 1, 64, device="cuda")
        weights = [torch.empty(1, J, 64, 64, device="cuda") for J in (2**19 - 1, 2**19)]
        found = [_backends.BACKENDS["triton"].serves(u, weight) for weight in weights]
    assert [can for can, _ in found] == [True, False]
    assert f"below 2^31, got {2**19} x 64 x 64" in found[1][1]


@pytest.mark.parametrize(
    "make",
    [
        lambda backend: capsroute.nn.CapsuleLinear(5, 4, 3, 2, backend=backend),
        lambda backend: capsroute.nn.CapsuleConv2d(2, 4, 3, 2, 3, backend=backend),
        lambda backend: capsroute.nn.MultiInterest(5, 4, 3, 2, backend=backend),
        lambda backend: capsroute.nn.classic.CapsuleLayer(3, 5, 4, 2, backend=backend),
    ],
    ids=["linear", "conv", "multi-interest", "classic"],
)
def test_a_module_takes_the_name_of_a_backend_alone(make):
    make("triton")  # whether it can serve is a question of the call
    with pytest.raises(ValueError, match=r'backend must be one of "auto", "cpu", .*, got \'tritn\''):
        make("tritn")
