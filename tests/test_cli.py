"""The command `capsroute`: what each command prints, its exit status, and its JSON."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import TINY, last_json, run
from test_data import make_images

import capsroute
from capsroute import _console, cli
from capsroute.training import cli as training_cli
from capsroute.training.options import TrainingOptions
from capsroute.training.run import HISTORY, MODEL, TRAINING

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def no_data_of_the_environment(monkeypatch):
    monkeypatch.delenv("CAPSROUTE_DATA", raising=False)


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


def test_a_reader_that_has_seen_enough_is_no_error():
    """As of `capsroute info | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "capsroute", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.UNREAD, "")


def test_words_that_a_terminal_cannot_show_stop_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(cli, "_info", lambda args: _console.say(args, "±5% \udcff") or 0)
    assert cli.main(["info"]) == 0
    assert sys.stdout.buffer.getvalue() == rb"\xb15% \udcff" + b"\n"


@pytest.mark.parametrize("command", ["train", "eval", "report", "bench", "tune", "info", "demo"])
def test_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: capsroute {command}")
    assert "--json" in out
    assert "--seed" in out
    assert ("--resume" in out) == (command == "train")  # no other has it


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", "CAPSROUTE_DATA, else"), ("eval", "run's own; if it does not say, $CAPSROUTE_DATA, else")],
)
def test_help_says_whose_images_are_the_default(capsys, command, words):
    out = " ".join(run(capsys, command, "--help")[1].split())
    assert f"(default: {'$' if command == 'train' else 'the '}{words}" in out


def test_train_leaves_a_run_that_eval_can_read(capsys, run_dir):
    assert {path.name for path in run_dir.iterdir()} == {MODEL, HISTORY, TRAINING}
    history = json.loads((run_dir / HISTORY).read_text())
    for path in (run_dir, run_dir / MODEL):
        status, out, _ = run(capsys, "eval", path, "--json")
        assert status == 0
        assert last_json(out)["test_accuracy"] == history["test"]["accuracy"]
    _, out, _ = run(capsys, "eval", run_dir)
    assert f"test accuracy {history['test']['accuracy']:.2%} on 360 images" in out


def test_train_json_and_seed(capsys, run_dir, tmp_path):
    status, out, err = run(capsys, "train", "--out", tmp_path, *TINY, "--seed", 4, "--json")
    result = last_json(out)
    assert status == 0
    assert len(out.splitlines()) == 1  # what is for people goes to stderr
    assert "test accuracy" in err
    assert result["command"] == "train"
    assert result["options"]["seed"] == 4
    assert result["out"] == str(tmp_path)
    first, second = ((path / MODEL).read_bytes() for path in (run_dir, tmp_path))
    assert first == second


def test_train_chooses_a_directory_if_none_is_given(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "train", *TINY, "--json")
    assert status == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert last_json(out)["out"] == f"runs/{made.name}"
    assert (made / MODEL).exists()


def test_every_training_option_arrives(capsys, tmp_path):
    chosen = {
        "epochs": 1,
        "batch_size": 100,
        "learning_rate": 0.004,
        "schedule": "exponential",
        "weight_decay": 0.02,
        "clip": 0.5,
        "amp": "bfloat16",
        "shift": 0.01,
        "rotation": 4.0,
        "scale": 0.1,
        "shear": 5.0,
        "validation": 0.3,
        "patience": 3,
        "seed": 7,
    }
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    sizes = ("--channels", 5, "--types", 2, "--iterations", 2)
    status, out, _ = run(capsys, "train", "--out", tmp_path, *words, *sizes, "--overlap", "--json")
    assert status == 0
    result = last_json(out)
    assert result["options"] == {**chosen, "overlap": True} == TrainingOptions(**chosen, overlap=True)._asdict()
    assert result["model"] == {"channels": 5, "types": 2, "iterations": 2, "image_shape": [1, 10, 10], "classes": 10}


def test_a_run_remembers_its_images(capsys, monkeypatch, mnist_dir, run_dir):
    monkeypatch.setenv("CAPSROUTE_DATA", str(mnist_dir))
    out_dir = mnist_dir / "run"
    status, out, _ = run(capsys, "train", "--out", out_dir, *TINY, "--json")
    assert (status, last_json(out)["dataset"]) == (0, f"idx:{mnist_dir.name}")
    monkeypatch.delenv("CAPSROUTE_DATA")
    status, out, _ = run(capsys, "eval", out_dir, "--json")
    assert (status, last_json(out)["dataset"]) == (0, f"idx:{mnist_dir.name}")
    monkeypatch.setenv("CAPSROUTE_DATA", str(mnist_dir))
    status, out, _ = run(capsys, "eval", run_dir, "--json")
    assert (status, last_json(out)["dataset"]) == (0, "digits")  # what it was trained on, not the environment's


def test_a_run_finds_its_images_from_anywhere(capsys, monkeypatch, mnist_dir):
    monkeypatch.chdir(mnist_dir)
    assert run(capsys, "train", "--data-dir", ".", "--out", "run", *TINY)[0] == 0
    (mnist_dir / "elsewhere").mkdir()
    monkeypatch.chdir(mnist_dir / "elsewhere")
    assert run(capsys, "eval", mnist_dir / "run")[0] == 0


def test_eval_lays_digits_over_each_other_as_the_training_did(capsys, tmp_path):
    status, out, _ = run(capsys, "train", "--out", tmp_path, *TINY, "--overlap", "--json")
    assert status == 0
    assert last_json(run(capsys, "eval", tmp_path, "--json")[1])["test_accuracy"] == last_json(out)["test_accuracy"]


def test_images_of_other_classes_are_refused(capsys, tmp_path):
    for folder, names in (("two", ("ant", "bee")), ("three", ("ant", "bee", "cat"))):
        for name in names:
            make_images(tmp_path / folder / name, 10, (10, 200, 30), size=(8, 8))
    assert run(capsys, "train", "--data-dir", tmp_path / "two", "--out", tmp_path / "run", *TINY)[0] == 0
    status, _, err = run(capsys, "eval", tmp_path / "run", "--data-dir", tmp_path / "three")
    assert status == 2
    assert "is for images (3, 8, 8) of 2 classes, images:three has (3, 8, 8) of 3" in err


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


def test_a_run_is_not_judged_by_images_that_were_changed(capsys, mnist_dir):
    out_dir = mnist_dir / "run"
    assert run(capsys, "train", "--data-dir", mnist_dir, "--out", out_dir, *TINY)[0] == 0
    labels = mnist_dir / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\0")
    status, _, err = run(capsys, "eval", out_dir)
    assert status == 2
    assert f"these are not the images that {out_dir / MODEL} was trained on: give --data-dir" in err
    assert run(capsys, "eval", out_dir, "--data-dir", mnist_dir)[0] == 0


def test_errors_are_one_readable_line(capsys, tmp_path, run_dir):
    (tmp_path / "cut").write_bytes((run_dir / MODEL).read_bytes()[:1000])
    (tmp_path / "file").write_text("")
    for argv, message in (
        (("eval", tmp_path / "none"), "none"),
        (("eval", tmp_path), MODEL),
        (("eval", tmp_path / "cut"), "cut is not a complete safetensors file"),
        (("eval", run_dir, "--data-dir", tmp_path), "holds neither IDX files"),
        (("train", "--out", tmp_path / "run", "--image-size", 16), "of folders only, but the digits are 8 x 8, got 16"),
        (("train", "--out", tmp_path / "file" / "run"), "file"),
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
        (("train", "--out", "x", "--epochs", "0"), "argument --epochs: must be a finite number of at least 1, got 0"),
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
    unbuilt = _console.BACKENDS["cpu"]._replace(here=lambda: (False, "it was not built"))
    monkeypatch.setitem(_console.BACKENDS, "cpu", unbuilt)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", "--backend", "cpu")
    assert status == 2
    assert err == "capsroute train: error: --backend cpu cannot run here: it was not built\n"
    assert not (tmp_path / "run").exists()


def test_a_backend_of_another_device_is_refused_before_any_work(capsys, monkeypatch, tmp_path, run_dir):
    foreign = _console.BACKENDS["cpu"]._replace(serves=lambda *_: (False, "the input capsules are elsewhere"))
    monkeypatch.setitem(_console.BACKENDS, "cpu", foreign)
    for words in (("train", "--out", tmp_path / "run"), ("eval", run_dir), ("report", run_dir)):
        status, _, err = run(capsys, *words, "--backend", "cpu")
        assert status == 2
        assert err.endswith("error: --backend cpu cannot run here: the input capsules are elsewhere\n")


def test_a_network_of_nan_is_no_result(capsys, tmp_path):
    """The only step is taken with a finite loss, and breaks the network."""
    words = ("--batch-size", 2000, "--learning-rate", 2e9)
    status, out, err = run(capsys, "train", "--out", tmp_path, *TINY, *words, "--json")
    assert (status, out) == (2, "")
    assert "the loss of the trained network is nan" in err
    assert not (tmp_path / MODEL).exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        _console.emit(argparse.Namespace(command="train", json=True), {"loss": float("nan")})


def test_a_rank_that_torchrun_did_not_set_loses_no_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, out, _ = run(capsys, "train", "--out", tmp_path, *TINY, "--json")
    assert (status, last_json(out)["out"]) == (0, str(tmp_path))
    assert (tmp_path / MODEL).exists()


def test_images_are_named_by_who_named_them(capsys, monkeypatch, mnist_dir):
    """Errors do not speak of options that were not given."""
    photos = mnist_dir / "photos"
    for name in ("ant", "bee"):
        make_images(photos / name, 10, (10, 200, 30), size=(9, 9))
    out_dir = mnist_dir / "run"
    assert run(capsys, "train", "--data-dir", photos, "--image-size", 8, "--out", out_dir, *TINY)[0] == 0
    status, _, err = run(capsys, "eval", out_dir, "--data-dir", mnist_dir)
    assert status == 2
    assert "is for images (3, 8, 8) of 2 classes, idx:" in err
    photos.rename(mnist_dir / "moved")
    assert run(capsys, "eval", out_dir)[2] == f"capsroute eval: error: images of the run: {photos} is not a directory\n"
    assert run(capsys, "eval", out_dir, "--data-dir", mnist_dir / "moved")[0] == 0  # resized as before
    monkeypatch.setenv("CAPSROUTE_DATA", "/nope")
    err = run(capsys, "train", "--out", mnist_dir / "other")[2]
    assert err == "capsroute train: error: CAPSROUTE_DATA: /nope is not a directory\n"
    err = run(capsys, "train", "--out", mnist_dir / "other", "--data-dir", "/none")[2]
    assert err == "capsroute train: error: /none is not a directory\n"


def test_a_folder_for_validation_that_is_not_used_is_told(capsys, tmp_path):
    for split in ("train", "val", "test"):
        for name in ("ant", "bee"):
            make_images(tmp_path / "photos" / split / name, 3, (10, 200, 30), size=(9, 9))
    words = ("train", "--data-dir", tmp_path / "photos", *TINY)
    told = "6 validation images are not used: give --validation to use them"
    assert told in run(capsys, *words, "--out", tmp_path / "without")[1]
    assert told not in run(capsys, *words, "--out", tmp_path / "with", "--validation", 0.5)[1]


@pytest.mark.parametrize(("words", "seed"), [((), 0), (("--seed", 0), 0), (("--seed", 5), 5)])
def test_random_numbers_do_not_depend_on_what_was_drawn_before(capsys, words, seed):
    run(capsys, "info", *words)
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("size", "words"), [((2**62,), "memory"), ((2**62, 2**62), "overflowed")])
def test_too_little_memory_is_told_in_one_line(capsys, monkeypatch, tmp_path, size, words):
    def fail(*_, **__):
        torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(training_cli, "run_training", fail)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *TINY)
    assert status == 2
    assert err.startswith("capsroute train: error: ")
    assert words in err
    assert err.count("\n") == 1


def test_an_error_of_our_own_is_not_hidden(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(training_cli, "run_training", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(capsys, "train", "--out", tmp_path / "run", *TINY)


def test_an_error_of_several_lines_is_told_in_one(capsys):
    _console.complain(argparse.Namespace(command="train"), ValueError("one\n  two"))
    assert capsys.readouterr().err == "capsroute train: error: one two\n"


@pytest.mark.parametrize(
    "words", [("info", "--seed", 2**70), ("bench", "--threads", 10**12), ("train", "--epochs", 10**30)]
)
def test_numbers_beyond_their_range_are_named(capsys, words):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert f"argument {words[1]}: must be at most " in err


def test_a_missing_library_is_told_with_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *TINY)
    assert (status, "pip install '.[demo]'" in err) == (2, True)
    assert "epoch" not in err  # none was trained
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run")
    assert status == 2
    assert "pip install '.[demo]'" in err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *TINY, "--tensorboard")
    assert status == 2
    assert "pip install '.[tensorboard]'" in err
    monkeypatch.undo()
    for library in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, library, None)
        status, _, err = run(capsys, "demo", "--out", tmp_path / "demo", *TINY)
        assert (status, f"{library} is needed here" in err) == (2, True)
        monkeypatch.undo()
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("needed", "expected"), [(0.0, 0), (1.1, 1)])
def test_demo_compares_and_judges(capsys, monkeypatch, tmp_path, mnist_dir, needed, expected):
    from capsroute.bench.measure import Result
    from capsroute.report import build

    def compare(model_factory, images, labels, *, seconds):
        assert model_factory("reference")(images, labels).lengths.shape == (128, 10)
        rows = (("fused", 0.01, 2**20), ("reference", 0.05, 3 * 2**20))
        return [Result(name, seconds, seconds, seconds, 1, peak)._asdict() for name, seconds, peak in rows]

    monkeypatch.setattr(build, "compare_training_step", compare)
    monkeypatch.setattr(cli, "DEMO_ACCURACY", needed)
    monkeypatch.setenv("CAPSROUTE_DATA", str(mnist_dir))  # the demo is about the digits, whatever is there
    status, out, err = run(capsys, "demo", "--out", tmp_path / "demo", *TINY, "--json")
    assert status == expected
    assert ("below the expected" in err) == (expected == 1)
    assert "50 ms" in err
    assert "3 MiB" in err
    result = last_json(out)
    assert result["dataset"] == "digits"
    assert result["training_step"][1]["seconds"] == 0.05
    assert result["training_step"][0]["images_per_second"] == 12_800
    assert result["files"][0] == str(tmp_path / "demo" / "report.html")
    assert (tmp_path / "demo" / "report.html").exists()


@pytest.fixture
def trained_elsewhere(monkeypatch, run_dir, tmp_path):
    """A directory into which the demo trains at once, on a GPU that is not here."""

    def train(args, *_, **__):
        shutil.copytree(run_dir, args.out)
        return {"test_accuracy": 1.0}

    monkeypatch.setattr(training_cli, "train_as_asked", train)
    return tmp_path / "demo"


def test_demo_draws_on_the_cpu_what_a_gpu_has_learnt(capsys, monkeypatch, trained_elsewhere):
    foreign = _console.BACKENDS["triton"]._replace(serves=lambda *_: (False, "the input capsules are on the CPU"))
    monkeypatch.setitem(_console.BACKENDS, "triton", foreign)
    monkeypatch.setattr("capsroute.report.build.compare_training_step", lambda *_, **__: [])
    words = ("--device", "cuda", "--backend", "triton")
    status, _, err = run(capsys, "demo", "--out", trained_elsewhere, *words)
    assert (status, err) == (0, "")
    assert (trained_elsewhere / "report.html").exists()


def test_of_several_processes_the_first_one_draws_the_demo(capsys, monkeypatch, trained_elsewhere):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "demo", "--out", trained_elsewhere) == (0, "", "")
    assert not (trained_elsewhere / "report.html").exists()


@pytest.mark.parametrize(
    "words",
    [("train", "--out", ""), ("train", "--data-dir", ""), ("report", ""), ("bench", "--save", "")],
    ids=" ".join,
)
def test_nothing_is_not_the_current_directory(capsys, words):
    """As of a variable that was not set."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert stopped.value.code == 2
    assert "must not be empty" in capsys.readouterr().err


def test_a_refused_training_leaves_no_directory(capsys, tmp_path):
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *TINY, "--validation", "0.0001")
    assert (status, "cannot be held out" in err) == (2, True)
    assert not (tmp_path / "run").exists()
