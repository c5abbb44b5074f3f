"""Runs of `capsroute train` that go on, are begun anew, or must be left alone."""

import filecmp
import shutil

import pytest
import torch
from commands import TINY, last_json, run

from capsroute import cli
from capsroute.training import checkpoint, distributed
from capsroute.training import cli as training_cli
from capsroute.training import run as training_run
from capsroute.training.run import HISTORY, MODEL, TRAINING

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def no_data_of_the_environment(monkeypatch):
    monkeypatch.delenv("CAPSROUTE_DATA", raising=False)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_run_goes_on_with_its_own_options_and_no_others(capsys, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / MODEL).unlink()  # as if it had been killed before the end
    status, out, _ = run(capsys, "train", "--out", tmp_path / "run", "--resume", "--json")
    assert status == 0
    assert last_json(out)["options"]["seed"] == 4
    assert filecmp.cmp(tmp_path / "run" / MODEL, run_dir / MODEL, shallow=False)
    for words, message in (
        (("--resume", "--epochs", 9), "a run with epochs = 1, but you asked for epochs = 9"),
        ((), "already holds a run: give --resume to go on with it, or --overwrite to replace it"),
    ):
        status, _, err = run(capsys, "train", "--out", tmp_path / "run", *words)
        assert status == 2
        assert message in err
    assert run(capsys, "train", "--resume")[2].endswith("--resume needs --out, the run to resume\n")


def test_an_interrupted_training_says_how_to_go_on(capsys, monkeypatch, mnist_dir):
    """In the first epoch already, and what it says goes on with the same images and options."""
    begin = ("train", "--data-dir", mnist_dir, *TINY, "--seed", 3)
    assert run(capsys, *begin, "--out", mnist_dir / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train_epoch", interrupt)
        status, _, err = run(capsys, *begin, "--out", mnist_dir / "run")
    assert status == 130
    go_on = f"train --out {mnist_dir / 'run'} --resume"
    assert err == f"capsroute train: error: interrupted: resume with: capsroute {go_on}\n"
    assert run(capsys, "eval", mnist_dir / "run")[2] == (
        f"capsroute eval: error: the training in {mnist_dir / 'run'} is not finished; resume with: capsroute {go_on}\n"
    )
    assert run(capsys, *go_on.split())[0] == 0
    assert filecmp.cmp(mnist_dir / "run" / MODEL, mnist_dir / "whole" / MODEL, shallow=False)


def test_a_training_that_has_not_begun_has_nothing_to_go_on_with(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(training_cli, "run_training", interrupt)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", *TINY)
    assert (status, err) == (130, "capsroute train: error: interrupted\n")


def test_resume_begins_a_run_only_if_something_says_which(capsys, monkeypatch, mnist_dir):
    argv = ("train", "--out", mnist_dir / "run", "--resume")
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert f"{mnist_dir / 'run'} holds no run to resume; to start one, name images or options" in err
    assert not (mnist_dir / "run").exists()
    assert run(capsys, *argv, *TINY)[0] == 0
    monkeypatch.setenv("CAPSROUTE_DATA", str(mnist_dir))
    monkeypatch.setattr(training_cli, "MODEL_DEFAULTS", {"channels": 4, "types": 1, "iterations": 3})
    assert run(capsys, "train", "--out", mnist_dir / "other", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--validation", 0.99), "cannot be held out"), (("--overlap",), "must be of at least three classes")],
)
def test_a_run_is_not_overwritten_by_one_that_cannot_begin(capsys, mnist_dir, run_dir, words, message):
    shutil.copytree(run_dir, mnist_dir / "run")
    for prefix in ("train", "t10k"):
        (mnist_dir / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 12)) + bytes((0, 1) * 6))
    argv = ("train", "--out", mnist_dir / "run", "--overwrite", "--data-dir", mnist_dir, *TINY, *words)
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    names = [MODEL, HISTORY, TRAINING]
    assert filecmp.cmpfiles(mnist_dir / "run", run_dir, names, shallow=False) == (names, [], [])


def test_a_run_that_was_to_be_replaced_is_not_what_to_resume(capsys, monkeypatch, mnist_dir, run_dir):
    shutil.copytree(run_dir, mnist_dir / "a run")
    argv = ("train", "--out", mnist_dir / "a run", "--data-dir", mnist_dir, *TINY, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train_epoch", interrupt)
        status, _, err = run(capsys, *argv)
    assert (status, err) == (130, "capsroute train: error: interrupted\n")
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert f"look at it with: capsroute report '{mnist_dir / 'a run'}'" in out


def test_a_network_is_not_judged_by_classes_of_other_names(capsys, mnist_dir):
    path = mnist_dir / "run" / MODEL
    run(capsys, "train", "--out", path.parent, "--data-dir", mnist_dir, *TINY)
    assert run(capsys, "eval", path, "--data-dir", mnist_dir)[0] == 0
    net, model, info = checkpoint.load(path)
    checkpoint.save(path, checkpoint.Checkpoint(net, model, {**info, "class_names": ["0", "1", "wolf"]}))
    status, _, err = run(capsys, "eval", path, "--data-dir", mnist_dir)
    assert status == 2
    assert f"{path} calls class 2 wolf, idx:{mnist_dir.name} 2: they must be called alike" in err


def test_a_resumed_run_computes_as_before_and_goes_on_logging(capsys, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    told = []

    def watched(*args, **how):
        told.append((how["backend"], how["tensorboard"]))
        return training_run.run_training(*args, **how)

    def pick(name):
        told.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(training_cli, "run_training", watched)
    monkeypatch.setattr(distributed, "pick_device", pick)
    run(capsys, "train", "--out", tmp_path, *TINY, "--backend", "reference", "--tensorboard", "--device", "cpu")
    run(capsys, "train", "--out", tmp_path, "--resume")
    run(capsys, "train", "--out", tmp_path, "--resume", "--backend", "auto", "--device", "auto")
    run(capsys, "train", "--out", tmp_path / "other", *TINY)
    before, other = ["cpu", ("reference", True)], ["auto", ("auto", False)]
    assert told == [*before, *before, "auto", ("auto", True), *other]


def test_a_run_goes_on_and_is_judged_where_its_images_are_now(capsys, mnist_dir, tmp_path):
    out_dir, before, moved = tmp_path / "run", tmp_path / "before", tmp_path / "moved"
    before.mkdir()
    for file in mnist_dir.glob("*ubyte*"):
        file.rename(before / file.name)
    assert run(capsys, "train", "--data-dir", before, "--out", out_dir, *TINY)[0] == 0
    before.rename(moved)
    assert run(capsys, "train", "--data-dir", moved, "--out", out_dir, "--resume")[0] == 0
    assert run(capsys, "eval", out_dir)[0] == 0  # the new place is kept, though no epoch was left
    (out_dir / TRAINING).write_bytes(b"damaged")
    assert run(capsys, "eval", out_dir)[0] == 0  # that asks the network alone


def forge(run_dir, **changes):
    """Change what the training in a directory says of itself; `source` by its entries, unless it is none."""
    tensors, content = checkpoint._read(run_dir / TRAINING, "training")
    source = changes.pop("source", {})
    source = {**content["info"]["source"], **source} if isinstance(source, dict) else source
    content["options"] |= changes
    content["info"]["source"] = source
    del content["version"], content["kind"]
    (run_dir / TRAINING).write_bytes(checkpoint._pack("training", tensors, content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "x"}, "does not say where its images came from: source is 'x'"),
        ({"source": {"data_dir": 3}}, "data_dir must be of type str, got 3"),
        ({"source": {"data_dir": "here", "image_size": "8"}}, "image_size must be of type int, got '8'"),
        ({"source": {"image_size": True}}, "image_size must be of type int, got True"),
        ({"source": {"tensorboard": "no"}}, "tensorboard must be of type bool, got 'no'"),
        ({"source": {"backend": "foo"}}, "--backend must be one of auto, cpu, cuda, triton, reference, got 'foo'"),
        ({"source": {"backend": []}}, "--backend must be one of auto, cpu, cuda, triton, reference, got []"),
        ({"source": {"device": "cuda:9"}}, "--device must be one of auto, cpu, cuda, got 'cuda:9'"),
        ({"batch_size": 1.5}, "batch_size must be of type int, got 1.5"),
    ],
)
def test_what_a_run_says_of_itself_is_checked(capsys, tmp_path, run_dir, changes, message):
    shutil.copytree(run_dir, tmp_path / "run")
    forge(tmp_path / "run", **changes)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_where_a_network_says_its_images_are_is_checked(capsys, tmp_path, run_dir):
    net, model, info = checkpoint.load(run_dir / MODEL)
    checkpoint.save(tmp_path / MODEL, checkpoint.Checkpoint(net, model, {**info, "source": "x"}))
    status, _, err = run(capsys, "eval", tmp_path / MODEL)
    assert (status, err.count("\n")) == (2, 1)
    assert "source is 'x'" in err


@pytest.mark.parametrize("options", [{"epochs": 0}, {"steps": 3}, 3], ids=str)
def test_how_a_network_says_it_was_trained_is_checked(capsys, tmp_path, run_dir, options):
    net, model, info = checkpoint.load(run_dir / MODEL)
    checkpoint.save(tmp_path / MODEL, checkpoint.Checkpoint(net, model, {**info, "options": options}))
    status, _, err = run(capsys, "eval", tmp_path / MODEL)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{tmp_path / MODEL} does not say how it was trained: " in err


def test_demo_overwrites_no_run_but_its_own(capsys, monkeypatch, tmp_path, run_dir):
    monkeypatch.setattr("capsroute.report.cli.write_report", lambda *_, **__: {})
    monkeypatch.setattr(cli, "DEMO_ACCURACY", 0)
    for _ in range(2):
        assert run(capsys, "demo", "--out", tmp_path / "demo", *TINY)[0] == 0
    shutil.copytree(run_dir, tmp_path / "mine")
    for name in (TRAINING, MODEL):
        status, _, err = run(capsys, "demo", "--out", tmp_path / "mine", *TINY)
        assert status == 2
        assert err.endswith(f"{tmp_path / 'mine'} holds a run that is not the demo's: choose another --out\n")
        assert filecmp.cmp(tmp_path / "mine" / name, run_dir / name, shallow=False)
        (tmp_path / "mine" / name).unlink()


def test_demo_knows_its_run_after_train_went_on_with_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("capsroute.report.cli.write_report", lambda *_, **__: {})
    monkeypatch.setattr(cli, "DEMO_ACCURACY", 0)
    for words in (("demo", *TINY), ("train", "--resume"), ("demo", *TINY)):
        assert run(capsys, *words, "--out", tmp_path)[0] == 0


@pytest.mark.parametrize("name", ["report.html", "report/curves.png"])
def test_demo_overwrites_no_report_but_its_own(capsys, tmp_path, name):
    (tmp_path / "report").mkdir()
    for mine in {name, "report/thesis.tex"}:
        (tmp_path / mine).write_text("mine")
    status, _, err = run(capsys, "demo", "--out", tmp_path, *TINY)
    assert status == 2
    assert err.endswith(f"{tmp_path} holds a report that is not the demo's: choose another --out\n")
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {tmp_path / name, tmp_path / "report" / "thesis.tex"}
    assert all(path.read_text() == "mine" for path in files)
