"""What only the Triton backend must show: the edges of its tiles, its launches and scratch, its refusals."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import types

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from judge import assert_as_exact_as_the_reference
from problems import EVERY, cases, random_problem

import capsroute
from capsroute import _triton
from capsroute.bench.registry import CASES, Case, make_problem
from capsroute.bench.traffic import planned, traffic
from capsroute.cli import main


@pytest.fixture
def with_tuning(monkeypatch):
    """Tiles by other numbers than the table's, on a GPU too."""
    from capsroute._triton import tuning

    def use(**numbers):
        monkeypatch.setattr(tuning, "for_shape", lambda *layer: tuning.Tuning(**numbers))

    return use


# Several tiles of samples and groups of input capsules, j in one tile up to 16 numbers J x O and else in several;
# every output capsule a tile of its own; one tile for all.
SMALL = {"forward": (1, 2), "loaded": (1, 2), "backward": (1, 2), "between": (1, 1), "held": (1, 4)}
TILES = {
    "small": {**SMALL, "row": 16, "tiled": 16, "work": 1, "groups": 3, "programs": 4, "fewest": 2},
    "gradients by j": {"held": (1, 2)},
    "j by j": {"row": 1, "tiled": 1, "work": 1, "groups": 4},
    "large": {},
}

SIZES = st.tuples(
    st.sampled_from([0, 1, 2, 3, 5]),  # B: tiles of 1, 2 and 4
    st.sampled_from([0, 1, 2, 3, 4, 5, 7]),  # I: groups of 3 and 4
    st.sampled_from([1, 2, 3, 5]),  # D
    st.sampled_from([1, 2, 3, 4, 5, 7]),  # J
    st.sampled_from([1, 2, 3, 4, 5, 8, 9]),  # O
)


@pytest.mark.parametrize("tiles", TILES)
def test_every_edge_of_the_tiles(with_tuning, tiles):
    with_tuning(**TILES[tiles])

    @hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
    @hypothesis.given(
        sizes=SIZES,
        case=st.sampled_from(cases(EVERY)),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )
    def check(sizes, case, dtype):
        form, options = case
        assert_as_exact_as_the_reference(random_problem(sizes, form=form, dtype=dtype, **EVERY[options]), "triton")

    check()


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("options", ["all", "in, all", "logits of b, j", "pass, all"])
@pytest.mark.parametrize("form", ["ijod", "jod", "votes"])
def test_several_tiles_in_each_direction(with_tuning, form, options):
    with_tuning(**TILES["small"])
    problem = random_problem((3, 4, 3, 3, 9), form=form, **{**EVERY[options]})
    assert_as_exact_as_the_reference(problem, "triton")


@pytest.fixture
def spread_out(device):
    """x with a stride of `far` in a dimension, in memory that is not touched but for it."""
    if device != "cpu":
        pytest.skip("4 GiB that are never touched cost nothing on the CPU alone")

    def spread(x: torch.Tensor, dim: int, far: int) -> torch.Tensor:
        strides = list(x.stride())
        strides[dim] = far
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            memory = torch.empty(far * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        return memory.as_strided(x.shape, strides).copy_(x)

    return spread


@pytest.mark.parametrize(
    ("form", "name", "dim", "far"),
    [
        ("ijod", "u", 0, 2**31 + 5),
        ("votes", "votes", 2, 2**30 + 8),
        ("votes", "logits", 2, 2**30 + 8),
        ("jod", "weight", 0, 2**30 + 8),
        ("jod", "weight", 1, 2**30 + 8),
    ],
)
def test_offsets_beyond_31_bits(spread_out, form, name, dim, far):
    """Samples that lie more than 2^31 numbers apart, output capsules and features of which the third does."""
    problem = random_problem((2, 3, 2, 3, 4), form=form, dtype=torch.float16, logits="BIJ")
    expected = problem.run("triton")
    problem.tensors[name] = spread_out(problem.tensors[name], dim, far)
    assert torch.equal(problem.run("triton"), expected)


def test_offsets_of_a_gradient_beyond_31_bits(spread_out):
    votes = torch.randn(1, 2, 3, 4, requires_grad=True)
    v = capsroute.dynamic_routing(votes, backend="triton")
    gradients = [
        torch.autograd.grad(v, votes, of_v, retain_graph=True)[0]
        for of_v in (v.detach(), spread_out(v.detach(), 1, 2**30 + 8))
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("coupling", "sizes"), [("in", (2, 5, 3, 4, 6)), ("in", (2, 5, 16, 4, 6)), ("out", (2, 3, 3, 70, 17))]
)
def test_the_last_stream_has_the_logits_of_the_others(coupling, sizes):
    """Where it takes their maxima and sums from other streams, and votes are so long that a last bit decides."""
    problem = random_problem(sizes, coupling=coupling, iterations=2, dtype=torch.float32)
    problem.tensors["u"] *= 1e3
    expected = problem.map(torch.Tensor.double).gradients("reference")
    for name, value in problem.gradients("triton").items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("poisoned", ["an output", "a sample"])
@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("form", ["jod", "od"])
def test_a_gradient_of_nan_reaches_the_weight_as_in_the_reference(form, coupling, poisoned):
    """Of an output capsule whose pairs are all forbidden it does not; of a masked sample only where j is normalised."""
    problem = random_problem((2, 3, 3, 3, 5), form=form, logits="BIJ", mask="BI", iterations=2, coupling=coupling)
    problem.tensors["logits"][:, :, 1] = -torch.inf
    problem.mask[0], problem.mask[1] = False, True
    grad_v = torch.ones(2, 3, 5)
    grad_v[(1, 1) if poisoned == "an output" else 0] = torch.nan
    expected = problem.gradients("reference", grad_v)
    for name, value in problem.gradients("triton", grad_v).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, equal_nan=True)


# Launches and scratch: functions of the shape


@pytest.mark.parametrize("form", ["ijod", "jod", "votes"])
def test_a_grid_takes_few_programs_in_its_second_and_third_dimension(with_tuning, monkeypatch, form):
    """On a GPU 65535, here 2."""
    from capsroute._triton import problem as module
    from capsroute._triton import tuning

    def run(launch):
        assert max(launch.grid[1:]) <= 2, launch.name
        original(launch)

    original = module.Launch.run
    monkeypatch.setattr(module.Launch, "run", run)
    monkeypatch.setattr(tuning, "MOST", 2)
    with_tuning(**TILES["small"])
    problem = random_problem((3, 7, 2, 5, 9), form=form, dtype=torch.float32, iterations=2)
    assert_as_exact_as_the_reference(problem, "triton")


LARGE = {
    "samples": Case("", 50_000, 1152, 8, 10, 16),
    "samples of one weight": Case("", 5_000_000, 8, 4, 2, 4, weight="JOD"),
    "input capsules": Case("", 1, 2_000_000, 16, 16, 16),
    "output capsules": Case("", 1, 4, 2, 70_000, 256),
    "output capsules, given votes": Case("", 1, 4, 2, 70_000, 256, weight=""),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_launches_of_any_size(case):
    """65535 programs in a second and third dimension, and 256 samples that one program adds one by one."""
    with torch.device("meta"):
        steps, _ = planned(make_problem(case), backward=True)
    for step in steps:
        if hasattr(step, "grid"):
            assert max(step.grid[1:]) <= 65535, step.name
            names = step.kernel.arg_names
            if "share" in names:
                assert step.args[names.index("share")] <= 256, step.name


@pytest.mark.parametrize(
    ("name", "launches"),
    [("efficient", 1), ("segcaps", 1), ("mnist", 6), ("mnist-1", 6), ("mind", 1), ("comirec", 6), ("imagenet", 12)],
)
def test_launches_of_the_forward(name, launches):
    """One for a small problem, else two a pass, and where J takes several tiles two more.

    Not where each pair's own weight is so large that its input capsules are shared out, as ComiRec's.
    """
    assert traffic(CASES[name], backward=False).launches == launches


def test_one_launch_for_a_small_problem_in_any_batch():
    for batch in (1, 100, 100_000):
        small = CASES["comirec"]._replace(in_features=16, out_features=16, batch=batch)
        assert traffic(small, backward=False).launches == 1


@pytest.mark.parametrize("name", CASES)
def test_scratch_is_a_small_part_of_the_votes(name):
    case = CASES[name]
    used = traffic(case, backward=True).scratch
    state = 20 * case.batch * case.outputs * max(case.out_features, case.in_features)  # V, ds and their like
    weight = 8 * case.in_features * case.outputs * case.out_features * (case.inputs if case.weight == "IJOD" else 64)
    assert used <= 4 * (case.votes / 8 + state + weight)


def without_the_interpreter(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: Triton is imported with its interpreter, or without."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# Whom it serves


def test_cpu_tensors_are_refused_outside_of_the_interpreter():
    program = (
        "import sys, torch, capsroute\n"
        "assert 'triton' not in sys.modules\n"
        "u = torch.ones(2, 5, 3)\n"
        "capsroute.capsule_linear(u, torch.ones(5, 6, 4, 3))\n"
        "assert 'triton' not in sys.modules\n"
        "capsroute.capsule_linear(u, torch.ones(5, 6, 4, 3), backend='triton')\n"
    )
    result = without_the_interpreter("-c", program)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith('RuntimeError: backend="triton" cannot serve this call: the input capsules are on the CPU')
    assert "TRITON_INTERPRET=1" in error


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0"])
def test_triton_that_is_too_old_is_a_reason(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    can, why = capsroute.backends()["triton"]
    assert not can
    assert why == f"Triton {version} is too old, 3.6 or newer is needed"


def test_triton_that_is_absent_is_a_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert capsroute.backends()["triton"] == (False, "Triton is not installed")


def test_no_gpu_to_run_on_is_a_reason(monkeypatch):
    monkeypatch.setattr(_triton, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    can, why = capsroute.backends()["triton"]
    assert not can
    assert why.endswith("but torch sees no CUDA or ROCm device here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert capsroute.backends()["triton"][0]


def test_gpus_of_other_makers_are_refused():
    can, why = _triton.serves(torch.empty(1, 1, 1, device="meta"))
    assert not can
    assert "meta" in why


# Compiled ahead of time


def test_kernels_compile_for_gpus_that_are_not_here():
    """A part of what `make gpu-proof` compiles."""
    result = without_the_interpreter("-m", "capsroute._triton.aot", "--quick", "--target", "sm_90", "gfx942")
    assert result.returncode == 0, result.stderr
    assert "gradients.gradients" in result.stdout


def test_eps_is_compiled_as_a_float64():
    """A number of Python is a float32 for Triton, where nothing else is said; its interpreter shows no difference."""
    program = (
        "import torch\n"
        "from triton.runtime import driver\n"
        "from capsroute._triton import aot, tuning\n"
        "driver.set_active(aot._Driver('sm_90'))\n"
        "found = dict((x.name, x) for _, x in aot.launches(torch.float64, tuning.ARCHITECTURES['sm_90'], quick=True))\n"
        "x = found['forward.finish']\n"
        "print(x.kernel.warmup(*x.args, grid=x.grid, **x.options).asm['ptx'])\n"
    )
    result = without_the_interpreter("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(".param .f64") == 1
    assert ".param .f32" not in result.stdout


# Tuning


def test_search_finds_the_best_of_each_number():
    from capsroute._triton import tuning

    wanted = {name: values[-1] for name, values in tuning.ALTERNATIVES.items()}

    def seconds(candidate):
        return 1 + sum(getattr(candidate, name) != value for name, value in wanted.items())

    best, least, before = tuning.search(seconds)
    assert {name: getattr(best, name) for name in wanted} == wanted
    assert least == 1
    assert before == seconds(tuning.DEFAULT)


def properties(major=9, minor=0, processors=132, lanes=32, **of_amd):
    """As torch.cuda.get_device_properties."""
    return types.SimpleNamespace(major=major, minor=minor, multi_processor_count=processors, warp_size=lanes, **of_amd)


def test_tiles_are_for_the_kind_of_gpu_and_its_processors(monkeypatch):
    from capsroute._triton import tuning

    assert tuning.for_device(properties()) == tuning.ARCHITECTURES["sm_90"]
    assert tuning.for_device(properties(7, 5, 1)) == dataclasses.replace(tuning.DEFAULT, programs=1)
    assert tuning.for_device(properties(13, 0, 10)) == dataclasses.replace(tuning.DEFAULT, programs=5)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    mi300x = properties(9, 4, 304, 64, gcnArchName="gfx942:sramecc+:xnack-")
    assert tuning.for_device(mi300x) == tuning.ARCHITECTURES["gfx942"]
    unknown = properties(9, 5, 256, 64, gcnArchName="gfx950:sramecc+:xnack-")
    assert tuning.for_device(unknown) == dataclasses.replace(tuning.CDNA, programs=128)


def test_tuning_is_kept_for_the_gpu_and_the_layer(monkeypatch, tmp_path):
    from capsroute._triton import tuning

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties())
    monkeypatch.setenv("CAPSROUTE_TUNING", str(tmp_path / "deep" / "tuning.json"))
    tuning.measured.cache_clear()
    gpu, layer = torch.device("cuda"), ("pair", 10, 16, 8, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    assert tuning.for_shape(gpu, *layer) == tuning.ARCHITECTURES["sm_90"]
    best = tuning.Tuning(forward=(4, 16), work=9)
    tuning.store("a GPU", tuning.key(*layer), best)
    assert tuning.for_shape(gpu, *layer) == best
    assert tuning.for_shape(gpu, "pair", 11, 16, 8, torch.float32) == tuning.ARCHITECTURES["sm_90"]
    assert tuning.for_shape(torch.device("cpu"), *layer) == tuning.DEFAULT
    tuning.cache_file().write_text('{"a GPU": {"layer": {"no such number": 1}}}')
    tuning.measured.cache_clear()
    with pytest.raises(ValueError, match=r"tuning\.json is not what `capsroute tune` writes"):
        tuning.for_shape(gpu, *layer)
    tuning.measured.cache_clear()


def test_tune_tells_people_and_programs(monkeypatch, capsys):
    from capsroute.bench import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_default_device", lambda device: None)
    monkeypatch.setattr(tune, "tune", lambda case, dtype: tune.Tuned(case.name, 2e-3, 1e-3, "tuning.json"))
    assert main(["tune", "--case", "mnist", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "mnist: 2 ms -> 1 ms forward + backward, kept in tuning.json\n"
    result = {"case": "mnist", "before": 2e-3, "seconds": 1e-3, "path": "tuning.json"}
    assert json.loads(out) == {"command": "tune", "dtype": "float32", "results": [result]}


def test_tune_and_gpu_benchmarks_say_that_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU, so the error cannot be seen")
    for command in (["tune"], ["bench", "--device", "cuda"]):
        assert main(command) == 2
        assert "torch sees no GPU here" in capsys.readouterr().err


# On a GPU


def test_captures_in_a_cuda_graph(device):
    """And so waits for nothing and allocates nothing that depends on data."""
    if device == "cpu":
        pytest.skip("needs a GPU; that tensors without data can be planned for is shown by the traffic's tests")
    problem = random_problem((5, 67, 5, 3, 9), dtype=torch.float32, bias=True, logits="BIJ", mask="BI")
    expected = problem.gradients("triton")
    grad_v = torch.ones_like(expected["v"])
    problem.gradients("triton", grad_v)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = problem.gradients("triton", grad_v)
    graph.replay()
    for name, x in problem.gradients("triton", grad_v).items():
        assert torch.equal(found[name], x), name
