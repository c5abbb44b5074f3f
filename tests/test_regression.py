"""`capsroute bench --save` and `--compare`: a report against one that was saved before."""

import json
import os
from pathlib import Path

import pytest
import torch

from capsroute.bench import cli, regression, roofline
from capsroute.bench.measure import Result
from capsroute.bench.registry import CASES
from capsroute.cli import main


def saved(**seconds):
    """A report of one case in which the implementations took so long, measured to 1 %."""
    case = CASES["mnist-1"]._asdict()
    rows = [
        {"case": case, "pass": "forward", **Result(name, x, 0.99 * x, 1.01 * x, 9, 2**22)._asdict()}
        for name, x in seconds.items()
    ]
    return {"command": "bench", "dtype": "float32", "machine": {"threads": 1}, "results": rows}


def test_a_slower_machine_is_no_regression():
    before, now = saved(fused=1.0, reference=10.0, compiled=5.0), saved(fused=2.0, reference=20.1, compiled=9.9)
    (change,) = regression.changes(before, now)
    assert not change.slower
    assert change.describe() == "mnist-1, forward: time 1.00x, noise ±4%, memory 1.00x"


def test_a_slower_kernel_is_a_regression():
    before, now = saved(fused=1.0, reference=10.0), saved(fused=1.05, reference=10.0)
    (change,) = regression.changes(before, now)
    assert change.slower
    assert change.describe() == "mnist-1, forward: time 1.05x, noise ±4%, memory 1.00x: SLOWER"
    now["results"][0]["peak_bytes"] = 2**24
    assert regression.changes(before, now)[0].describe().endswith("memory 4.00x: SLOWER AND LARGER")


def test_a_noisy_bystander_hides_no_regression():
    before = saved(fused=1.0, reference=10.0, compiled=5.0, matmul=3.0)
    now = saved(fused=1.05, reference=10.0, compiled=5.0, matmul=6.0)
    now["results"][3] |= {"lower": 3.0, "upper": 9.0}
    assert regression.changes(before, now)[0].slower
    for row in now["results"][1:]:  # but the drift is no better known than most of the others
        row |= {"lower": 0.95 * row["seconds"], "upper": 1.05 * row["seconds"]}
    (change,) = regression.changes(before, now)
    assert not change.slower
    assert change.noise == pytest.approx(3 * (0.01**2 + 0.05**2) ** 0.5)


def test_the_noise_of_what_was_saved_counts():
    before, now = saved(fused=1.0), saved(fused=1.5)
    before["results"][0] |= {"lower": 0.7, "upper": 1.3}
    assert not regression.changes(before, now)[0].slower


def test_passes_are_compared_each_with_its_own():
    def both(forward, backward):
        report = saved(fused=forward)
        (row,) = saved(fused=backward)["results"]
        report["results"].append({**row, "pass": "forward + backward"})
        return report

    forward, backward = regression.changes(both(1.0, 3.0), both(1.5, 3.0))
    assert (forward.label, forward.slower) == ("mnist-1, forward", True)
    assert (backward.label, backward.slower) == ("mnist-1, forward + backward", False)


def test_a_twentieth_more_memory_is_no_regression():
    before, now = saved(fused=1.0), saved(fused=1.0)
    before["results"][0]["peak_bytes"], now["results"][0]["peak_bytes"] = 100 * 2**20, 105 * 2**20
    assert not regression.changes(before, now)[0].larger


def test_a_fifth_more_memory_is_a_regression():
    before, now = saved(fused=1.0), saved(fused=1.0)
    before["results"][0]["peak_bytes"], now["results"][0]["peak_bytes"] = 100 * 2**20, 120 * 2**20
    assert regression.changes(before, now)[0].larger


def test_memory_that_grows_from_nothing_is_a_regression():
    before, now = saved(fused=1.0), saved(fused=1.0)
    before["results"][0]["peak_bytes"] = 0
    (change,) = regression.changes(before, now)
    assert (change.larger, change.memory) == (True, None)
    assert change.describe() == "mnist-1, forward: time 1.00x, noise ±3%, memory from nothing: LARGER"
    now["results"][0]["peak_bytes"] = 2**20  # pages of code
    assert not regression.changes(before, now)[0].larger
    before["results"][0]["peak_bytes"] = None
    assert not regression.changes(before, now)[0].larger


def test_what_a_comparison_leaves_out_is_said():
    base, now = saved(fused=1.0, reference=2.0), saved(fused=1.0, reference=2.0)
    assert regression.unlike(base, now) == []
    now["results"] += [{**row, "pass": "forward + backward"} for row in now["results"]]
    now["machine"]["torch"], base["machine"]["torch"] = "2.14", "2.13"
    assert regression.unlike(base, now) == ["not in it: mnist-1, forward + backward", "another torch: 2.13, now 2.14"]
    now["results"][0]["seconds"] = None
    assert regression.unlike(base, now)[0] == "not measured now: mnist-1, forward"


def test_reports_that_cannot_be_compared_are_refused(tmp_path):
    now = saved(fused=1.0)
    with pytest.raises(ValueError, match="the same number of threads, got 2 and 1"):
        regression.changes({**now, "machine": {"threads": 2}}, now)
    other = json.loads(json.dumps(now))
    other["results"][0]["case"]["seed"] = 7
    with pytest.raises(ValueError, match="reports can only be compared with the same seed, got 0 and 7"):
        regression.changes(now, other)
    with pytest.raises(ValueError, match="share no case that fused was measured in"):
        regression.changes(saved(reference=1.0), now)
    with pytest.raises(ValueError, match="share no case that fused was measured in"):
        regression.changes({**now, "results": []}, now)
    unknown = {"case": {"size": 3}, "pass": "forward", "seconds": 1.0}
    nameless = json.dumps({"command": "bench", "results": []})
    for text in ("{", "[]", '{"command": "eval"}', nameless, json.dumps({"command": "bench", "results": [unknown]})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json is not what `capsroute bench --save` writes"):
            regression.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text(json.dumps({**now, "command": "tune"}))
    with pytest.raises(ValueError, match="it is of the command tune"):
        regression.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda row: row.pop("upper"), "it lacks 'upper'"),
        (lambda row: row.pop("lower"), "it lacks 'lower'"),
        (lambda row: row.pop("peak_bytes"), "it lacks 'peak_bytes'"),
        (lambda row: row.update(upper=None), "not supported"),
        (lambda row: row.update(upper=0.5), "fused took 1.0 s, from 0.99 to 0.5"),
        (lambda row: row.update(upper=float("nan")), "fused took 1.0 s, from 0.99 to nan"),
        (lambda row: row.update(seconds=0, lower=0), "fused took 0 s"),
        (lambda row: row.update(peak_bytes="4 MiB"), "not supported"),
    ],
)
def test_a_report_is_refused_as_it_is_loaded_and_not_later(tmp_path, changed, message):
    report = saved(fused=1.0)
    changed(report["results"][0])
    path = tmp_path / "base.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"base\.json is not what `capsroute bench --save` writes: .*{message}"):
        regression.load(path)


@pytest.mark.parametrize("option", ["--save", "--plot"])
def test_a_directory_that_cannot_be_written_to_is_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK | os.X_OK)  # root may write anywhere
    assert main(["bench", *(["--roofline"] if option == "--plot" else []), option, "file.png"]) == 2
    assert f"{option} must be a file in a writable directory, got file.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--save", "nowhere/base.json"), "--save must be a file in an existing directory, got nowhere/base.json"),
        (("--save", "/dev/null"), "--save must be a file in an existing directory, got /dev/null"),
        (("--save", "."), "--save must be a file in an existing directory, got ."),
        (("--roofline", "--plot", "nowhere/roof.png"), "--plot must be a file in an existing directory"),
        (("--roofline", "--plot", "roof.xyz"), "--plot must end in .png, .pdf, .svg, got roof.xyz"),
        (("--roofline", "--memory"), "--memory are for implementations"),
        (("--explain", "--device", "cuda"), "are for the CPU kernels, got --device cuda"),
        (("--compare", "base.json", "--dtype", "float64"), "reports can only be compared with the same dtype"),
        (("--compare", "base.json", "--threads", "1", "--case", "comirec"), "share no case that fused was measured in"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_takes_long(capsys, monkeypatch, tmp_path, words, message):
    def measure(*_, **__):
        raise AssertionError("measured")

    for module, name in ((cli, "compare"), (roofline, "measure_machine")):
        monkeypatch.setattr(module, name, measure)
    monkeypatch.chdir(tmp_path)
    Path("base.json").write_text(json.dumps(saved(fused=1.0)))
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_bench_saves_and_compares(tmp_path, capsys):
    path = str(tmp_path / "base.json")
    command = ["bench", "--case", "efficient", "--pass", "forward", "--seconds", "0", "--implementations", "fused"]
    assert main([*command, "--save", path]) == 0
    report = json.loads(Path(path).read_text())
    report["results"][0] |= {"seconds": 1e-9, "lower": 1e-9, "upper": 1e-9}
    Path(path).write_text(json.dumps(report))
    capsys.readouterr()
    assert main([*command, "--compare", path, "--json"]) == 1
    out, err = capsys.readouterr()
    assert f"Against {path}" in err
    (change,) = json.loads(out)["changes"]
    assert change["time"] > 1


@pytest.mark.parametrize(("change", "status"), [({}, 0), ({"seconds": 2.0}, 1), ({"peak_bytes": 2**24}, 1)], ids=str)
def test_a_regression_is_the_exit_status(monkeypatch, tmp_path, capsys, change, status):
    now = {"seconds": 1.0, "peak_bytes": 2**22}

    def made_up(case, backward, names, **_):
        return [Result(names[0], now["seconds"], now["seconds"], now["seconds"], 9, now["peak_bytes"])]

    monkeypatch.setattr(cli, "compare", made_up)
    command = ["bench", "--case", "efficient", "--pass", "forward", "--implementations", "fused"]
    path = str(tmp_path / "base.json")
    assert main([*command, "--save", path]) == 0
    now |= change
    capsys.readouterr()
    assert main([*command, "--compare", path, "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["results"][0]["seconds"] == now["seconds"]
    assert told["machine"]["threads"] == torch.get_num_threads()
