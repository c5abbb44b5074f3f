"""The command `capsroute`: what each command prints, its exit status, and its JSON."""

import gzip
import json
import struct
import subprocess
import sys

import pytest

import capsroute
from capsroute import cli

pytest.importorskip("sklearn")
TINY = ["--epochs", "1", "--channels", "4", "--types", "1", "--batch-size", "128"]


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "deep" / "run"
    assert cli.main(["train", "--out", str(path), *TINY, "--seed", "4"]) == 0
    return path


@pytest.fixture
def mnist_dir(tmp_path):
    for prefix in ("train", "t10k"):
        images = bytes((0, 0, 8, 3)) + struct.pack(">3I", 12, 12, 12) + bytes(range(144)) * 12
        labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 12) + bytes(k % 3 for k in range(12))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "capsroute", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = last_json(done.stdout)
    assert len(done.stdout.splitlines()) == 1
    assert info["capsroute"] == capsroute.__version__
    assert info["backends"]["reference"] == {"available": True, "reason": "plain PyTorch, on any device"}
    assert info["threads"] >= 1


def test_info_tells_every_backend_and_why(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    for name, (can, why) in capsroute.backends().items():
        assert any(name in line and why in line and ("yes" if can else "no") in line for line in out.splitlines())


@pytest.mark.parametrize("command", ["train", "eval", "bench", "info", "demo"])
def test_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: capsroute {command}")
    assert "--json" in out


def test_train_leaves_a_run_that_eval_can_read(capsys, run_dir):
    files = {"checkpoint.safetensors", "history.json", "learning_curves.png", "reconstructions.png", "coupling.png"}
    assert {path.name for path in run_dir.iterdir()} == files
    history = json.loads((run_dir / "history.json").read_text())
    for path in (run_dir, run_dir / "checkpoint.safetensors"):
        status, out, _ = run(capsys, "eval", path, "--json")
        assert status == 0
        assert last_json(out)["test_accuracy"] == history[-1]["test"]["accuracy"]
    _, out, _ = run(capsys, "eval", run_dir)
    assert f"test accuracy {history[-1]['test']['accuracy']:.2%} on 360 images" in out


def test_train_json_and_seed(capsys, run_dir, tmp_path):
    status, out, err = run(capsys, "train", "--out", tmp_path, *TINY, "--seed", 4, "--json")
    result = last_json(out)
    assert status == 0
    assert len(out.splitlines()) == 1  # what is for people goes to stderr
    assert "test accuracy" in err
    assert result["command"] == "train"
    assert result["options"]["seed"] == 4
    assert result["files"][0] == str(tmp_path / "checkpoint.safetensors")
    first, second = ((path / "checkpoint.safetensors").read_bytes() for path in (run_dir, tmp_path))
    assert first == second


def test_train_and_eval_on_idx_files(capsys, mnist_dir, run_dir):
    out_dir = mnist_dir / "run"
    status, out, _ = run(capsys, "train", "--data-dir", mnist_dir, "--out", out_dir, *TINY, "--json")
    assert status == 0
    accuracy = last_json(out)["test_accuracy"]
    status, out, _ = run(capsys, "eval", out_dir, "--data-dir", mnist_dir, "--json")
    assert (status, last_json(out)["test_accuracy"]) == (0, accuracy)
    status, _, err = run(capsys, "eval", run_dir, "--data-dir", mnist_dir)
    assert status == 2
    assert "is for images" in err


def test_errors_are_one_readable_line(capsys, tmp_path, run_dir):
    (tmp_path / "cut").write_bytes((run_dir / "checkpoint.safetensors").read_bytes()[:1000])
    (tmp_path / "file").write_text("")
    for argv, message in (
        (("eval", tmp_path / "none"), "none"),
        (("eval", tmp_path), "checkpoint.safetensors"),
        (("eval", tmp_path / "cut"), "cut is no whole safetensors file"),
        (("eval", run_dir, "--data-dir", tmp_path), "has no file train-images-idx3-ubyte"),
        (("train", "--out", tmp_path / "file" / "run"), "file/run"),
    ):
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, ""), argv
        assert err.startswith(f"capsroute {argv[0]}: error: ")
        assert message in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("dance",), "invalid choice: 'dance'"),
        (("train",), "required: --out"),
        (("train", "--out", "x", "--epochs", "0"), "argument --epochs: must be a finite number above 0, got 0"),
        (("train", "--out", "x", "--epochs", "1.5"), "argument --epochs: invalid int value: '1.5'"),
        (
            ("train", "--out", "x", "--learning-rate", "nan"),
            "must be a finite number above 0, got nan",
        ),
        (("train", "--out", "x", "--backend", "abacus"), "argument --backend: invalid choice: 'abacus'"),
    ],
)
def test_wrong_words_are_told_by_argparse(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err


def test_a_backend_that_cannot_run_is_refused_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "backends", lambda: {"cpu": (False, "it was not built"), "reference": (True, "")})
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", "--backend", "cpu")
    assert status == 2
    assert err == "capsroute train: error: --backend cpu cannot run here: it was not built\n"
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_told_with_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run")
    assert status == 2
    assert "pip install 'capsroute[demo]'" in err


@pytest.mark.parametrize(("needed", "expected"), [(0.0, 0), (1.1, 1)])
def test_demo_compares_and_judges(capsys, monkeypatch, tmp_path, needed, expected):
    from capsroute.bench import step
    from capsroute.bench.measure import Result

    def compare(model_factory, images, labels):
        assert model_factory("reference")(images, labels).lengths.shape == (128, 10)
        rows = (("fused", 0.01, 2**20), ("reference", 0.05, 3 * 2**20))
        return [Result(name, seconds, seconds, seconds, 1, peak)._asdict() for name, seconds, peak in rows]

    monkeypatch.setattr(step, "compare_training_step", compare)
    monkeypatch.setattr(cli, "DEMO_ACCURACY", needed)
    status, out, err = run(capsys, "demo", "--out", tmp_path, *TINY, "--json")
    assert status == expected
    assert ("below the expected" in err) == (expected == 1)
    assert "50 ms" in err
    assert "3 MiB" in err
    assert last_json(out)["training_step"][1]["seconds"] == 0.05
    assert (tmp_path / "coupling.png").exists()
