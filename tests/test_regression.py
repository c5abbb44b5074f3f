"""`capsroute bench --save` and `--compare`: a report against one that was saved before."""

import json
from pathlib import Path

import pytest

from capsroute.bench import regression
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
    assert change.describe() == "mnist-1, forward: time 1.00x, noise ±3%, memory 1.00x"


def test_a_slower_kernel_is_a_regression():
    before, now = saved(fused=1.0, reference=10.0), saved(fused=1.05, reference=10.0)
    (change,) = regression.changes(before, now)
    assert change.slower
    assert change.describe() == "mnist-1, forward: time 1.05x, noise ±3%, memory 1.00x: SLOWER"
    now["results"][0]["peak_bytes"] = 2**24
    assert regression.changes(before, now)[0].describe().endswith("memory 4.00x: SLOWER AND LARGER")


def test_reports_that_cannot_be_compared_are_refused(tmp_path):
    now = saved(fused=1.0)
    with pytest.raises(ValueError, match="one number of threads can be compared, got 2 and 1"):
        regression.changes({**now, "machine": {"threads": 2}}, now)
    with pytest.raises(ValueError, match="share no case that fused was measured in"):
        regression.changes(saved(reference=1.0), now)
    unknown = {"case": {"size": 3}, "pass": "forward", "seconds": 1.0}
    for text in ("{", "[]", '{"command": "eval"}', json.dumps({"command": "bench", "results": [unknown]})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json is not what `capsroute bench --save` writes"):
            regression.load(tmp_path / "other.json")


def test_bench_saves_and_compares(tmp_path, capsys):
    path = str(tmp_path / "base.json")
    command = ["bench", "--case", "efficient", "--pass", "forward", "--seconds", "0", "--implementations", "fused"]
    assert main([*command, "--save", path]) == 0
    report = json.loads(Path(path).read_text())
    report["results"][0] |= {"seconds": 1e-9, "lower": 1e-9, "upper": 1e-9}
    Path(path).write_text(json.dumps(report))
    capsys.readouterr()
    main([*command, "--compare", path, "--json"])
    out, err = capsys.readouterr()
    assert f"Against {path}" in err
    (change,) = json.loads(out)["changes"]
    assert change["time"] > 1
