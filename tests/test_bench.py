"""The benchmark: its cases and implementations, its measuring, and that it refuses wrong results."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
import torch

import capsroute
from capsroute.bench import cli, compare, measure, plain, registry, regression, roofline, sweep, table
from capsroute.bench.measure import Result
from capsroute.bench.registry import CASES, IMPLEMENTATIONS, Implementation
from capsroute.cli import main

TINY = CASES["efficient"]._replace(batch=3, iterations=2)
MIB = 1 << 20


def shrunk(case, batch=20):
    return case._replace(
        batch=min(case.batch, batch),
        inputs=min(case.inputs, 13),
        in_features=min(case.in_features, 9),
        outputs=min(case.outputs, 7),
        out_features=min(case.out_features, 10),
    )


# Cases and implementations


MEBIBYTES = {
    "mnist": 90, "cifar10": 320, "deepcaps": 800, "emnist": 436, "196-classes": 5.8 * 1024, "imagenet": 12 * 1024,
    "matrix-pose": 2.5 * 1024, "segcaps": 128, "comirec": 12.5, "mind": 800,
}  # fmt: skip


@pytest.mark.parametrize("name", MEBIBYTES)
def test_cases_have_the_size_of_the_shapes_in_use(name):
    assert CASES[name].votes * 4 / MIB == pytest.approx(MEBIBYTES[name], rel=0.03)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_problem_has_the_shapes_of_its_case(case):
    case = shrunk(case)
    problem = registry.make_problem(case, torch.bfloat16)
    assert problem.u.shape == tuple(case.sizes[letter] for letter in ("BID" if case.weight else "BIJO"))
    if case.weight:
        assert problem.weight.shape == tuple(case.sizes[letter] for letter in case.weight)
    assert problem.grad_v.shape == (case.batch, case.outputs, case.out_features)
    assert {x.dtype for x in problem if isinstance(x, torch.Tensor)} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["mnist-1", "comirec", "comirec-rechub", "mind", "mind-rechub"])
def test_votes_are_as_long_as_a_new_layer_makes_them(name):
    case = CASES[name]._replace(batch=1)
    shared = {"IJOD": None, "JOD": "inputs", "OD": "pairs"}[case.weight]
    sizes = case.inputs, case.in_features, case.outputs, case.out_features
    layer = capsroute.nn.CapsuleLinear(*sizes, coupling=case.coupling, shared=shared)
    assert registry.make_problem(case).weight.std().item() == pytest.approx(layer.weight.std().item(), rel=0.05)


@pytest.mark.parametrize("part_bytes", [1, plain.PART_BYTES])  # parts of the batch, or all at once
@pytest.mark.parametrize("batch", [3, 20])  # votes made, or not
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implementations_agree(case, batch, part_bytes, monkeypatch):
    monkeypatch.setattr(plain, "PART_BYTES", part_bytes)
    names = [name for name in IMPLEMENTATIONS if name != "compiled"]
    for backward, dtype in itertools.product((False, True), (torch.float64, torch.bfloat16)):
        compare.prepare(shrunk(case, batch), backward, names, dtype)


def test_compiled_reference_agrees():
    assert list(compare.prepare(TINY, True, ["compiled"]).forwards) == ["compiled"]


@pytest.mark.parametrize("form", ["IJOD", "JOD", "OD"])
def test_torch_rechubs_own_layer_agrees(form):
    pytest.importorskip("torch_rechub")
    case = CASES["comirec-rechub"]._replace(batch=5, inputs=7, in_features=6, out_features=6, outputs=3, weight=form)
    for backward in (False, True):
        prepared = compare.prepare(case, backward, ["torch-rechub"])
        assert list(prepared.forwards) == ["torch-rechub"]
    other = prepared.problem._replace(coupling="out")
    with pytest.raises(compare.DisagreementError, match="torch-rechub"):
        compare.miscompiled(prepared.forwards, other, False)


def test_another_routing_is_not_compared():
    prepared = compare.prepare(TINY, False, ["fused", "torch-rechub"])
    assert prepared.left_out == {"torch-rechub": "another routing"}
    assert registry.names_for([TINY]) == ["fused", "reference", "compiled", "matmul"]
    assert registry.names_for([TINY, CASES["mind-rechub"]])[-1] == "torch-rechub"


def test_torch_rechubs_routing_has_three_passes():
    case = CASES["comirec-rechub"]
    assert registry.is_rechub(case)
    assert not registry.is_rechub(case._replace(iterations=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_dtype_that_is_not_computed_in_is_told(dtype):
    case = CASES["comirec-rechub"]._replace(batch=2)
    prepared = compare.prepare(case, False, ["fused", "torch-rechub"], dtype)
    assert prepared.left_out == {"torch-rechub": "float32 only"}


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepared = compare.prepare(TINY, False, ["fused", "compiled"])
    assert list(prepared.forwards) == ["fused"]
    assert prepared.left_out == {"compiled": "needs no-such-compiler"}


# What is wrong is refused


def wrong(distort):
    """A registry in which "fused" is the reference, distorted."""

    def make():
        return lambda problem: distort(registry.routed(problem, "reference"), problem)

    return {**IMPLEMENTATIONS, "fused": Implementation(make, (0, 0))}


@pytest.mark.parametrize(
    ("distort", "backward", "result"),
    [
        (lambda v, problem: v * 1.001, False, 0),
        (lambda v, problem: v + torch.nan, False, 0),
        (lambda v, problem: v[:, 1:], False, 0),
        (lambda v, problem: v.double(), False, 0),
        (lambda v, problem: v + 1e-2 * (problem.u - problem.u.detach()).sum(), True, 1),
        (lambda v, problem: v + 1e-2 * (problem.weight - problem.weight.detach()).sum(), True, 2),
    ],
    ids=["value", "nan", "shape", "dtype", "gradient-u", "gradient-weight"],
)
def test_wrong_result_is_refused(distort, backward, result, monkeypatch):
    monkeypatch.setattr(compare, "IMPLEMENTATIONS", wrong(distort))
    with pytest.raises(compare.DisagreementError, match=f"fused: result {result} is"):
        compare.prepare(TINY, backward, ["fused", "reference"])


def test_what_torch_compiles_wrongly_is_left_out(monkeypatch, capsys):
    """Torch 2.13 does so with one sample, J >= 8 and O < 7, forward + backward."""
    fused = wrong(lambda v, problem: v[:, 1:])["fused"]
    monkeypatch.setattr(compare, "IMPLEMENTATIONS", {**IMPLEMENTATIONS, "compiled": fused._replace(compiles=True)})
    command = ("--case", "efficient", "--pass", "forward", "--seconds", "0", "--json")
    assert bench(*command, "--implementations", "fused", "compiled") == 0
    captured = capsys.readouterr()
    assert re.search(r"\| efficient, forward +\| .* µs.* \| +wrong results \|", captured.err)
    right, left_out = json.loads(captured.out)["results"]
    assert right["seconds"] > 0
    assert (left_out["seconds"], left_out["note"]) == (None, "wrong results")


def test_results_of_float16_are_compared_in_more():
    """The squares of these numbers have no sum in float16."""
    y = torch.full((100,), 1e4).half()
    with pytest.raises(compare.DisagreementError):
        compare.check_equal("fused", [-y], [y])


def test_command_reports_no_time_of_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(compare, "IMPLEMENTATIONS", wrong(lambda v, problem: v + 1))
    assert bench("--case", "efficient", "--implementations", "fused", "--seconds", "0") == 1
    captured = capsys.readouterr()
    assert "efficient, forward: fused: result 0 is" in captured.err
    assert "| efficient" not in captured.out


# Measuring


def test_calls_take_turns_and_all_rounds_count():
    called, now = [], [0.0]

    def call(name, durations):
        called.append(name)
        now[0] += next(durations)

    calls = {
        "a": partial(call, "a", iter([9, 1, 2, 3, 4, 5])),  # the first is the warm-up
        "b": partial(call, "b", itertools.repeat(10)),
    }
    timings = measure.alternate(calls, 60.5, clock=lambda: now[0])  # 5 rounds take 65 s, 4 take 50
    assert called == ["a", "b"] * 6
    assert timings == {"a": measure.Timing(3, 2, 4, 5), "b": measure.Timing(10, 10, 10, 5)}


def test_at_least_three_rounds():
    assert measure.alternate({"a": lambda: None}, seconds=0)["a"].rounds == 3


def touch_64_return_16():
    torch.ones(64 * MIB // 4)
    return [torch.ones(16 * MIB // 4)]


def test_peak_growth_counts_what_was_freed_but_not_the_results():
    grown = measure.in_fresh_process(measure.peak_growth, touch_64_return_16, touch_64_return_16)
    assert grown == pytest.approx(48 * MIB, abs=2 * MIB)  # 64 freed before the 16 came


def test_a_process_that_dies_is_told(monkeypatch):
    with pytest.raises(BrokenProcessPool):
        measure.in_fresh_process(os._exit, 9)

    def dies(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(measure, "in_fresh_process", dies)
    results = compare.compare(TINY, False, ["reference"], dtype=torch.float32, seconds=0, memory=True)
    assert (results[0].peak_bytes, results[0].note) == (None, "its process was killed")


def test_memory_of_a_case():
    case = CASES["mnist"]._replace(batch=32)
    (result,) = compare.compare(case, False, ["reference"], dtype=torch.float32, seconds=0, memory=True)
    assert 1 < result.peak_bytes / (case.votes * 4) <= IMPLEMENTATIONS["reference"].held[False]


def test_what_does_not_fit_says_so_and_the_rest_runs(monkeypatch):
    needed = compare.bytes_held("reference", TINY, True, torch.float32)
    assert needed == 5.5 * TINY.votes * 4
    monkeypatch.setattr(compare, "available_memory", lambda: needed - 1)
    checked = []
    monkeypatch.setattr(compare, "miscompiled", lambda _, problem, backward: checked.append(len(problem.u)) or [])
    results = compare.compare(
        TINY._replace(batch=30), True, ["fused", "reference"], dtype=torch.float32, seconds=0, memory=False
    )
    assert results[0].rounds == 3
    assert results[1] == Result("reference", note="needs ~0 GiB")
    assert checked == [1]  # a tenth of the batch would fit, a quarter of that is used, and at least one sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_estimate_is_in_the_accumulation_type(dtype):
    size = 8 if dtype == torch.float64 else 4
    assert compare.bytes_held("compiled", CASES["mnist"], False, dtype) == 2 * 128 * 1152 * 160 * size
    assert compare.bytes_held("fused", CASES["imagenet"], True, dtype) == 0


def test_available_memory_is_less_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < measure.available_memory() < total


def test_where_memory_is_not_told_times_are_all_there_is(monkeypatch, tmp_path):
    """On macOS and Windows, which have no /proc."""
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "none")
    (result,) = compare.compare(TINY, False, ["reference"], dtype=torch.float32, seconds=0, memory=True)
    assert (result.rounds, result.peak_bytes, result.note) == (3, None, "memory is told on Linux alone")


# Table and command


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3456, "12.3 s"), (0.1, "100 ms"), (1.5e-3, "1.5 ms"), (9.999e-6, "10 µs"), (1e-9, "0.001 µs")],
)
def test_seconds_are_told_in_three_digits(seconds, text):
    assert table.format_seconds(seconds) == text


def test_rows_give_spread_and_ratio():
    results = [
        Result("fused", 0.010, 0.009, 0.011, 5, 2 * MIB),
        Result("reference", 0.125, 0.125, 0.125, 5, 90 * MIB),
        Result("compiled", note="needs ~60 GiB"),
    ]
    times, memory = table.rows("mnist", results).splitlines()
    assert [cell.strip() for cell in times.split("|")[1:-1]] == [
        "mnist",
        "10 ms ±10%",
        "125 ms ±0%, 12.5x",
        "needs ~60 GiB",
    ]
    assert [cell.strip() for cell in memory.split("|")[2:-1]] == ["2 MiB", "90 MiB, 45x", "needs ~60 GiB"]


def test_there_is_no_ratio_to_what_was_not_measured():
    results = [Result("compiled", note="needs g++"), Result("reference", 1.0, 1.0, 1.0, 3)]
    assert [cell.strip() for cell in table.rows("", results).split("|")[2:-1]] == ["needs g++", "1 s ±0%"]


def test_memory_below_a_mebibyte_gives_no_ratio():
    results = [Result("fused", 1, 1, 1, 3, 100), Result("reference", 1, 1, 1, 3, 90 * MIB)]
    assert [cell.strip() for cell in table.rows("", results).split("|")[-3:-1]] == ["< 1 MiB", "90 MiB"]


def bench(*arguments):
    return main(["bench", *arguments])


def test_what_was_measured_before_a_failure_is_saved(tmp_path, monkeypatch):
    def fails(case, backward, *_, **__):
        if backward:
            raise MemoryError
        return [Result("fused", 1.0, 1.0, 1.0, 3)]

    monkeypatch.setattr(cli, "compare", fails)
    with pytest.raises(MemoryError):
        bench("--case", "efficient", "--save", str(tmp_path / "base.json"))
    (row,) = regression.load(tmp_path / "base.json")["results"]
    assert (row["pass"], row["seconds"]) == ("forward", 1.0)


def test_what_is_asked_for_is_measured(monkeypatch):
    asked = []

    def made_up(case, backward, names, **how):
        asked.append((case, backward, names, how))
        return [Result(name, 1.0, 1.0, 1.0, 3, MIB) for name in names]

    monkeypatch.setattr(cli, "compare", made_up)
    words = ("--seed", "7", "--memory", "--seconds", "3", "--dtype", "bfloat16")
    assert bench("--case", "efficient", "--pass", "forward", "--implementations", "fused", *words) == 0
    how = {"dtype": torch.bfloat16, "seconds": 3.0, "memory": True}
    assert asked == [(CASES["efficient"]._replace(seed=7), False, ["fused"], how)]


def test_a_save_that_fails_leaves_what_was_saved_before(tmp_path, monkeypatch):
    command = ["--case", "efficient", "--pass", "forward", "--implementations", "fused", "--seconds", "0"]
    path = tmp_path / "base.json"
    assert bench(*command, "--save", str(path)) == 0
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    assert bench(*command, "--save", str(path)) == 2
    assert path.read_bytes() == before


def test_command_prints_json_last_and_alone(capsys):
    names = ["fused", "reference", "matmul"]
    assert bench("--case", "efficient", "--batch", "2", "--implementations", *names, "--seconds", "0", "--json") == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    told = json.loads(line)
    assert [(row["pass"], row["name"]) for row in told["results"]] == [
        (label, name) for label in ("forward", "forward + backward") for name in names
    ]
    assert all(row["case"]["batch"] == 2 and row["lower"] <= row["seconds"] <= row["upper"] for row in told["results"])
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert "| efficient B=2, forward + backward " in captured.err


def test_command_takes_several_batches_and_says_where_it_is_narrowest(capsys):
    options = ("--pass", "forward", "--implementations", "fused", "reference", "--seconds", "0")
    assert bench("--case", "efficient", "comirec", "--batch", "1", "16", *options) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\| (\S.*?), forward ", out, re.MULTILINE) == [
        "efficient B=1", "efficient", "comirec B=1", "comirec B=16",
    ]  # fmt: skip
    assert re.search(
        r"^The narrowest: reference takes [\d.]+ times as long as fused, \S+( B=\d+)?, forward$", out, re.M
    )


def test_command_takes_the_sizes_of_a_layer_of_ones_own(capsys):
    words = ("--case", "efficient", "--sizes", "B=2", "I=5", "D=3", "J=7", "O=9", "R=2", "--implementations", "fused")
    assert bench(*words, "--pass", "forward", "--seconds", "0", "--json") == 0
    captured = capsys.readouterr()
    assert "efficient B=2 I=5 D=3 J=7 O=9 R=2: B=2 I=5 D=3 J=7 O=9 R=2, weight [IJOD]\n" in captured.err
    assert re.search(r"\| efficient B=2 I=5 D=3 J=7 O=9 R=2, forward +\|", captured.err)
    ((row,), case) = json.loads(captured.out)["results"], CASES["efficient"]
    asked = case._replace(batch=2, inputs=5, in_features=3, outputs=7, out_features=9, iterations=2)
    assert row["case"] == asked._asdict()


def test_sweep_names_the_other_sizes(capsys):
    assert bench("--sweep", "inputs", "--sizes", "O=9", "--pass", "forward", "--seconds", "0", "--json") == 0
    assert "| mnist O=9, forward: inputs |" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--sizes K=3", "must be LETTER=N with a letter of B, I, D, J, O, R, got K=3"),
        ("--sizes O", "invalid size value: 'O'"),
        ("--sizes O=0", "must be a finite number of at least 1, got 0"),
        ("--sizes O=8 O=9", "--sizes has O twice"),
        ("--batch 3 --sizes B=3", "--batch and --sizes B=N say the same: give one of them"),
        ("--sweep outputs --sizes J=3", "--sweep outputs goes through all J itself, got it in --sizes"),
        ("--case all --sizes D=3", "the votes of segcaps are given, without D, which is in --sizes"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(words, error, capsys):
    try:
        status = bench(*words.split())
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    assert error in capsys.readouterr().err


def test_narrowest_is_over_all_that_was_measured():
    def line(label, *seconds):
        return label, [
            Result(name, taken) for name, taken in zip(("fused", "reference", "compiled"), seconds, strict=True)
        ]

    lines = [line("a", 1.0, 4.0, None), line("b", 2.0, 9.0, 3.0), line("c", None, 1.0, 1.0)]
    assert table.narrowest(lines) == "\nThe narrowest: compiled takes 1.5 times as long as fused, b"
    assert table.narrowest(lines[2:]) == ""


def test_what_is_asked_for_twice_is_measured_once(capsys):
    words = ("--case", "mnist-1", "mnist-1", "--batch", "2", "2", "--implementations", "fused", "fused")
    assert main(["bench", *words, "--pass", "forward", "--seconds", "0", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["name"], row["case"]["batch"]) == ("fused", 2)


def test_command_sets_threads_and_dtype(capsys):
    before = torch.get_num_threads()
    assert bench(
        "--case", "efficient", "--pass", "forward", "--implementations", "fused", "--seconds", "0",
        "--threads", str(before + 1), "--dtype", "bfloat16",
    ) == 0  # fmt: skip
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert f"- threads: {before + 1}\n" in out
    assert "| bfloat16" in out
    assert "backward" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would use the GPU")
def test_command_leaves_the_default_device_as_it_was(monkeypatch):
    def fails(_):
        raise MemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "describe_machine", fails)
    before = torch.get_default_device()
    with pytest.raises(MemoryError):
        bench("--device", "cuda")
    assert torch.get_default_device() == before


def test_traffic_is_of_the_pass_that_is_asked_for(capsys):
    pytest.importorskip("triton")
    assert bench("--traffic", "--case", "efficient", "--pass", "forward", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["pass"] for row in told["results"]] == ["forward"]
    assert bench("--traffic", "--case", "efficient", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["pass"] for row in told["results"]] == ["forward", "forward + backward"]


def test_traffic_of_a_gpu_needs_none(capsys):
    pytest.importorskip("triton")
    assert bench("--traffic", "--device", "cuda", "--case", "efficient", "--pass", "forward") == 0


def test_every_case_under_the_roof_has_its_own_marker(monkeypatch, tmp_path):
    drawn = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    plot = axes.plot
    monkeypatch.setattr(axes, "plot", lambda self, *args, **kw: drawn.append(plot(self, *args, **kw)[0]) or drawn[-1:])
    machine = roofline.Machine(1e11, 1e10)
    for passes in (["forward"], ["forward", "forward + backward"]):
        labels = [f"{case}, {name}" for case in ("mnist", "comirec", "mind B=2") for name in passes]
        drawn.clear()
        points = [roofline.Point(label, 1.0, 10**9, 10**8, "") for label in labels]
        roofline.plot(machine, points, tmp_path / "roof.png")
        looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in drawn[1:]}
        assert len(looks) == len(labels)
        assert len({(line.get_color(), line.get_marker()) for line in drawn[1:]}) == 3


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", "float32"), ("float64", "float64")])
def test_the_roof_says_of_which_dtype_it_is(dtype, peak, monkeypatch, capsys):
    for name, value in (("SIZE", 64), ("SIDE", 8), ("BYTES", 1 << 20), ("SECONDS", 0.0)):
        monkeypatch.setattr(roofline, name, value)
    assert bench("--roofline", "--case", "efficient", "--dtype", dtype, "--seconds", "0", "--pass", "forward") == 0
    out = capsys.readouterr().out
    assert f" GFLOP/s in {peak} (a product of matrices or a convolution), " in out
    assert f"| of {peak}'s peak |" in out


def test_a_sweep_leaves_out_what_does_not_fit(monkeypatch):
    case = TINY._replace(batch=2)
    one = sum(x.nbytes for x in registry.make_problem(case._replace(batch=1)) if isinstance(x, torch.Tensor))
    monkeypatch.setattr(sweep, "available_memory", lambda: 8 * one)
    curve = sweep.measure(case, "batch", False, torch.float32, 0)
    assert [step.size for step in curve.steps] == sweep.sizes("batch")[: len(curve.steps)]
    held = sum(
        x.nbytes
        for step in curve.steps
        for x in registry.make_problem(case._replace(batch=step.size))
        if isinstance(x, torch.Tensor)
    )
    assert held < 8 * one
    assert f"do not fit into memory: {curve.left_out[0]} to {sweep.MOST['batch']}\n" in sweep.rows(curve)
    assert curve.label == "efficient R=2, forward"  # of no batch of its own
    monkeypatch.setattr(sweep, "available_memory", lambda: 0)
    assert sweep.measure(case, "batch", False, torch.float32, 0).steps == []


def test_a_sweep_of_batches_takes_none(capsys):
    for batches in (("4",), ("4", "8")):
        assert bench("--sweep", "batch", "--batch", *batches) == 2
        assert (
            f"--sweep batch goes through all batches itself, got --batch {' '.join(batches)}" in capsys.readouterr().err
        )


def test_other_sweeps_take_several_batches(monkeypatch):
    swept = []

    def measure(case, axis, *_):
        swept.append((axis, case.batch))
        return sweep.Curve("", axis, [])

    monkeypatch.setattr(sweep, "measure", measure)
    assert bench("--sweep", "inputs", "--case", "efficient", "--pass", "forward", "--batch", "4", "8") == 0
    assert swept == [("inputs", 4), ("inputs", 8)]


@pytest.mark.parametrize("room", [2.5, 4, 7, 12, 20])
def test_gradients_of_the_largest_of_a_sweep_fit_too(monkeypatch, room):
    case = TINY._replace(batch=2)

    def needed(size):
        return sum(x.nbytes for x in registry.make_problem(case._replace(batch=size)) if isinstance(x, torch.Tensor))

    monkeypatch.setattr(sweep, "available_memory", lambda: room * needed(1))
    fit = sweep.fitting(case, "batch", torch.float32)
    assert fit
    assert sum(map(needed, fit)) + needed(fit[-1]) <= room * needed(1)


def test_one_case_of_the_benchmarks_can_be_chosen():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-k", "case:mnist-forward"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = re.findall(r"^\S+\[(.*)\]$", done.stdout, re.MULTILINE)
    assert found == [f"case:mnist-forward-{name}" for name in IMPLEMENTATIONS]


@pytest.mark.parametrize("arguments", [("--case", "imagined"), ("--batch", "0"), ("--implementations", "slow")])
def test_command_refuses_wrong_arguments(arguments):
    with pytest.raises(SystemExit):
        bench(*arguments)


def test_an_order_of_no_weight_is_an_error(capsys):
    assert bench("--case", "mind", "--order", "JIOD") == 2
    assert "no case asked for has one, got --order JIOD" in capsys.readouterr().err
