"""capsroute.training: options, the trainer, several processes, and what a run leaves behind."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import unittest.mock
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from capsroute.nn import CapsNet, CapsNetLoss
from capsroute.training import batches, checkpoint, data, distributed, overlap, progress, trainer
from capsroute.training.batches import Share
from capsroute.training.checkpoint import load, load_training
from capsroute.training.options import TrainingOptions
from capsroute.training.run import HISTORY, MODEL, TRAINING, RunError, image_shape, run_training, stored
from capsroute.training.tensorboard import tensorboard_log
from capsroute.training.trainer import Epoch, Score, Training, count_correct, evaluate, predict, train_epoch

pytest.importorskip("sklearn")
SMALL = {"image_shape": (1, 8, 8), "classes": 10, "channels": 8, "types": 2, "hidden": (16,)}
PAIRS = {**SMALL, "image_shape": (1, 10, 10)}  # overlapping digits
FAST = TrainingOptions(epochs=3, batch_size=32, learning_rate=0.01)


@pytest.fixture(scope="module")
def few() -> data.Dataset:
    """A dataset that trains in no time."""
    digits = data.digits()
    return digits._replace(train=digits.train[:256], test=digits.test[:64])


def trained(few, options=FAST, model=SMALL, on_step=lambda **_: None, **where) -> Training:
    training = Training.begin(model, options, **where)
    while not training.finished:
        train_epoch(training, few.train, few.test, on_step=on_step)
    return training


# Options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"clip": -1.0}, "clip must be finite and at least 0, got -1.0"),
        ({"shift": float("inf")}, "shift must be finite"),
        ({"clip": 10**400}, "clip must be finite and at least 0, got 1000"),
        ({"learning_rate": 10**400}, "learning_rate must be finite and above 0, got 1000"),
        ({"rotation": 181.0}, "rotation must be degrees from 0 to 180, got 181"),
        ({"shear": 90.0}, "shear must be below 90 degrees"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and above 0, got nan"),
        ({"validation": 1.0}, "validation must be a share from 0 to below 1, got 1.0"),
        ({"schedule": "stairs"}, "schedule must be one of cosine, exponential, constant, got stairs"),
        ({"amp": "float8"}, "amp must be one of off, bfloat16, float16, got float8"),
        ({"patience": 3}, "patience needs images to judge by: give validation too"),
        ({"seed": 2**32}, "seed must be from 0 to 2\\^32 - 1"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"seed": True}, "seed must be of type int, got True"),
        ({"clip": "1"}, "clip must be of type float, got '1'"),
        ({"overlap": "no"}, "overlap must be of type bool, got 'no'"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, got -0.1"),
        ({"scale": -0.1}, "scale must be finite and at least 0, got -0.1"),
        ({"seed": -1}, "seed must be from 0 to 2\\^32 - 1"),
        ({"amp": []}, r"amp must be of type str, got \[\]"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**wrong).check()


def test_a_whole_number_will_do_for_any_other():
    assert TrainingOptions(clip=1, validation=0).check().clip == 1


@pytest.mark.parametrize("name", ["cuda:9", "gpu", None])
def test_a_device_is_one_of_those_that_can_be_asked_for(name):
    with pytest.raises(ValueError, match=f"--device must be one of auto, cpu, cuda, got {name!r}"):
        distributed.pick_device(name)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("exponential", 0.01), ("constant", 1.0)])
def test_the_rate_rises_and_then_follows_the_schedule(schedule, last):
    options = TrainingOptions(schedule=schedule, learning_rate=2.0)
    rates = [options.rate(step, 1000) for step in range(1000)]
    assert rates[:100] == pytest.approx([2 * (k + 1) / 100 for k in range(100)])
    assert rates[100] == 2
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(2 * last, abs=0.02)
    assert options.rate(0, 1) == 2  # one step is enough to train


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU here"):
        distributed.pick_device("cuda")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.pick_device("auto") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


# The trainer


@pytest.mark.not_interpreted
def test_training_reduces_the_loss_and_reports(few, backend):
    told = []
    training = trained(few, on_step=lambda **fields: told.append(fields), backend=backend)
    history = training.history
    assert history[-1].train.loss < 0.8 * history[0].train.loss
    assert history[-1].held_out.accuracy > 0.4
    assert evaluate(training.net, few.test) == history[-1].held_out
    assert [fields["step"] for fields in told] == list(range(1, 25))
    assert [fields["epoch"] for fields in told] == [1] * 8 + [2] * 8 + [3] * 8
    last = told[16:]
    assert sum(fields["images"] for fields in last) == 256
    assert sum(fields["loss"] * fields["images"] for fields in last) / 256 == history[-1].train.loss
    assert sum(fields["correct"] for fields in last) / 256 == history[-1].train.accuracy


def test_each_step_takes_its_rate_of_the_whole_training(few):
    training, rates = Training.begin(SMALL, FAST), []

    def on_step(**_):
        rates.append(training.optimizer.param_groups[0]["lr"])

    while not training.finished:
        train_epoch(training, few.train, few.test, on_step=on_step)
    assert rates == [FAST.rate(step, 24) for step in range(24)]


def test_overlapping_digits_are_learnt(few):
    training = trained(few, FAST._replace(overlap=True, epochs=8), PAIRS)
    assert training.history[-1].train.loss < 0.8 * training.history[0].train.loss
    chance = 1 / 45
    assert training.history[-1].held_out.accuracy > 3 * chance


def test_the_generators_of_the_gpus_are_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Training.begin(SMALL, FAST)
    assert seeded == []


def test_the_seed_alone_decides_what_is_learnt(few):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trained(few).net
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = trained(few).net
    other = trained(few, FAST._replace(seed=1)).net
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.routing.weight, other.routing.weight)


def test_each_option_changes_what_is_learnt(few):
    plain = trained(few, FAST._replace(epochs=1)).net.routing.weight
    for change in (
        {"clip": 1e-3},
        {"schedule": "exponential"},
        {"weight_decay": 0.5},
        {"amp": "bfloat16"},
        {"shift": 0.0},
        {"rotation": 30.0},
        {"scale": 0.3},
        {"shear": 20.0},
    ):
        changed = trained(few, FAST._replace(epochs=1, **change)).net.routing.weight
        assert not torch.equal(plain, changed), change
        assert (plain - changed).norm() < plain.norm(), change


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_clipping_bounds_the_gradient(few, monkeypatch, amp):
    norms = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trained(few, FAST._replace(epochs=1, clip=0.05, amp=amp))
    assert 0 < len(norms) <= 8  # steps that overflow in float16 are left out
    torch.testing.assert_close(torch.stack(norms), torch.full((len(norms),), 0.05), rtol=1e-3, atol=0)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_learns_about_the_same(few, amp):
    exact, mixed = trained(few), trained(few, FAST._replace(amp=amp))
    assert all(x.dtype == torch.float32 for x in mixed.net.parameters())
    assert mixed.history[-1].held_out.loss == pytest.approx(exact.history[-1].held_out.loss, rel=0.1)
    assert mixed.scaler.is_enabled() == (amp == "float16")


def test_a_loss_that_explodes_is_an_error_not_a_nan(few):
    with pytest.raises(FloatingPointError, match=r"the loss became nan in epoch \d+: try a lower learning rate"):
        trained(few, FAST._replace(learning_rate=1e30))


def test_a_loss_of_infinity_is_an_error_too(few, monkeypatch):
    monkeypatch.setattr(CapsNetLoss, "forward", lambda self, output, *_: output.lengths.sum() * math.inf)
    with pytest.raises(FloatingPointError, match="the loss became inf in epoch 1"):
        trained(few)
    with pytest.raises(FloatingPointError, match="the loss of the trained network is inf"):
        evaluate(CapsNet(**SMALL), few.test)


def test_the_validation_split_chooses_and_stops(few):
    options = FAST._replace(epochs=50, validation=0.2, patience=2, learning_rate=0.1, schedule="constant")
    training = Training.begin(SMALL, options)
    losses, nets = [], []
    while not training.finished:
        train_epoch(training, few.train, few.test)
        losses.append(training.history[-1].held_out.loss)
        nets.append(training.net.routing.weight.detach().clone())
    assert len(losses) < 50
    best = losses.index(min(losses))
    assert training.best_epoch == best + 1 == len(losses) - 2
    assert torch.equal(training.result().routing.weight, nets[best])
    assert evaluate(training.result(), few.test).loss == pytest.approx(losses[best], rel=1e-5)


def test_the_best_network_computes_as_the_last_did():
    training = Training.begin(SMALL, FAST._replace(validation=0.2), backend="reference")
    training.history = [Epoch(Score(1.0, 0.5), Score(loss, 0.5), 1.0) for loss in (0.1, 0.2)]
    training.best = training.net.state_dict()
    assert training.result().routing.backend == "reference"


def test_without_a_validation_split_the_last_epoch_is_the_result(few):
    training = trained(few)
    assert (training.best, training.best_epoch) == (None, 3)
    assert training.result() is training.net


def test_evaluate_is_a_mean_over_images(few):
    net = CapsNet(**SMALL)
    score = evaluate(net, few.test)
    output = net(few.test.images, few.test.labels)
    right = (output.lengths.argmax(1) == few.test.labels).sum().item()
    assert score.accuracy == right / 64
    assert score.loss == pytest.approx(CapsNetLoss()(output, few.test.images, few.test.labels).item(), rel=1e-5)


def test_both_of_two_overlapping_digits_must_be_named():
    lengths = torch.tensor([[0.9, 0.1, 0.8], [0.9, 0.1, 0.8], [0.2, 0.9, 0.8]])
    assert predict(lengths, 2).tolist() == [[0, 2], [0, 2], [1, 2]]
    assert count_correct(lengths, torch.tensor([[2, 0], [0, 1], [2, 1]])) == 2
    assert count_correct(lengths, torch.tensor([[0], [2], [1]])) == 2


@pytest.mark.not_interpreted
def test_fused_and_reference_training_agree(few, fused):
    """Issue 7, point 4: within 1e-4 in loss for the first 50 steps."""
    losses = []
    for backend in ("reference", fused):
        told = []
        options = FAST._replace(epochs=7, learning_rate=5e-3)
        trained(few, options, on_step=lambda told=told, **fields: told.append(fields["loss"]), backend=backend)
        losses.append(told[:50])
    assert len(losses[0]) == 50
    assert losses[0][0] > 1.2 * losses[0][-1]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-4)


# Several processes


def test_the_mean_over_processes_is_that_of_the_batch(few, monkeypatch):
    """Of three images one process has two."""
    grads = []

    def step(optimizer, *_, **__):
        grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for share in (Share(), Share(0, 2), Share(1, 2)):
        train_epoch(Training.begin(SMALL, FAST), few.train[:3], few.test[:4], share=share)
    for whole, first, second in zip(*grads, strict=True):
        torch.testing.assert_close((first + second) / 2, whole)


def test_a_last_batch_may_leave_a_process_without_images(few):
    many = data.Split(few.test.images.repeat(5, 1, 1, 1)[:257], few.test.labels.repeat(5)[:257])
    net = CapsNet(**SMALL)
    assert evaluate(net, many, share=Share(1, 2)) == evaluate(net, many[1:256:2])


TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
from capsroute.training import data
from capsroute.training.options import TrainingOptions
from capsroute.training.run import run_training
digits = data.digits()
few = digits._replace(train=digits.train[:101], test=digits.test[:33])
options = TrainingOptions(epochs=1, batch_size=34, learning_rate=0.01, overlap=True, validation=0.2)
run = run_training(Path(sys.argv[1]), few, json.loads(sys.argv[2]), options)
rank = os.environ.get("RANK", "0")
Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(run.test))
"""


def test_two_processes_learn_what_one_does(tmp_path):
    """DDP under torchrun: shares of unequal size, a last batch of odd length, evaluation by halves, and an end."""
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    model = json.dumps({**PAIRS, "hidden": [16]})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    argv = ["train.py", str(tmp_path / "one"), model]
    with unittest.mock.patch.object(sys, "argv", argv):
        exec(TWO_PROCESSES, {"__name__": "one"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run(
        [*command, tmp_path / "two", model], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    one, *two = [Score(*json.loads((tmp_path / f"{name}.json").read_text())) for name in ("one-0", "two-0", "two-1")]
    assert two[0] == two[1]
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(one), rtol=1e-3, atol=0)
    nets = [load(tmp_path / out / MODEL).net.state_dict() for out in ("one", "two")]
    for name, x in nets[0].items():
        torch.testing.assert_close(nets[1][name], x, rtol=0, atol=2e-3, msg=name)


# Runs


def test_a_run_leaves_its_network_history_and_state(few, tmp_path, capsys):
    run = run_training(tmp_path / "deep" / "run", few, SMALL, FAST._replace(validation=0.2))
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == {MODEL, HISTORY, TRAINING}
    loaded = load(tmp_path / "deep" / "run" / MODEL)
    assert evaluate(loaded.net, few.test) == run.test
    assert loaded.info["test"]["accuracy"] == run.test.accuracy
    assert loaded.info["class_names"] == list("0123456789")
    history = json.loads((tmp_path / "deep" / "run" / HISTORY).read_text())
    assert [epoch["train"]["loss"] for epoch in history["epochs"]] == [epoch.train.loss for epoch in run.history]
    assert history["best_epoch"] == run.best_epoch
    err = capsys.readouterr().err.splitlines()  # not a terminal: a line an epoch
    assert len(err) == 3
    assert err[2].startswith(f"epoch 3/3  training loss {run.history[2].train.loss:.4f}  validation accuracy ")
    assert "images/s" in err[2]
    assert "left" in err[2]


def test_the_files_of_a_run_name_its_best_epoch(few, tmp_path):
    options = FAST._replace(epochs=50, validation=0.2, patience=2, learning_rate=0.1, schedule="constant")
    run = run_training(tmp_path, few, SMALL, options)
    assert run.best_epoch == len(run.history) - 2
    assert json.loads((tmp_path / HISTORY).read_text())["best_epoch"] == run.best_epoch
    assert load(tmp_path / MODEL).info["best_epoch"] == run.best_epoch


def test_images_for_validation_are_what_an_epoch_is_chosen_by(few, tmp_path):
    own = few._replace(validation=few.test[:20])
    run = run_training(tmp_path, own, SMALL, FAST._replace(epochs=1, validation=0.2))
    assert run.history[0].held_out == evaluate(run.net, own.validation)


def test_digits_of_too_few_classes_are_refused_before_any_training(few, tmp_path):
    two = few.test[few.test.labels < 2]
    with pytest.raises(ValueError, match="at least three classes"):
        run_training(tmp_path, few._replace(test=two), PAIRS, FAST._replace(overlap=True, validation=0.2))
    assert not (tmp_path / TRAINING).exists()


def test_a_directory_is_written_to_by_one_process(few, tmp_path):
    def second(**_):
        with pytest.raises(RunError, match="is being written to by another process"):
            run_training(tmp_path, few, SMALL, FAST, overwrite=True)

    first = run_training(tmp_path, few, SMALL, FAST._replace(epochs=1), on_step=second)
    assert len(first.history) == 1


def test_a_run_is_not_overwritten_by_accident(few, tmp_path):
    pytest.importorskip("tensorboard")
    first = run_training(tmp_path, few, SMALL, FAST._replace(epochs=1))
    with pytest.raises(RunError, match="already holds a run: give --resume to go on with it, or --overwrite to"):
        run_training(tmp_path, few, SMALL, FAST)
    again = run_training(tmp_path, few, SMALL, FAST._replace(epochs=1, seed=1), overwrite=True, tensorboard=True)
    assert again.test.loss != first.test.loss
    (tmp_path / "report").mkdir()
    for name in ("report/curves.png", "report.html", "mine.txt"):
        (tmp_path / name).touch()

    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def stop_in(last):
        def stop(step, **_):
            if step == last:
                raise KeyboardInterrupt

        options = FAST._replace(seed=5)
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path, few, SMALL, options, overwrite=True, tensorboard=True, on_step=stop)

    stop_in(1)  # a run that has made no step replaces none
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    stop_in(2)
    assert {path.name for path in tmp_path.iterdir()} == {TRAINING, "mine.txt"}  # nothing of the old run to go on with
    begun, _ = load_training(tmp_path / TRAINING)
    assert (begun.options.seed, begun.history) == (5, [])


@pytest.mark.parametrize("linked", [False, True])
def test_overwriting_removes_nothing_that_no_run_wrote(few, tmp_path, linked):
    """Pictures by their names alone; and nothing at all where there was no run."""
    run_dir, elsewhere, options = tmp_path / "run", tmp_path / "elsewhere", FAST._replace(epochs=1)
    report, page = run_dir / "report", run_dir / "report.html"
    for folder in (run_dir, elsewhere):
        folder.mkdir()
    if linked:
        report.symlink_to(elsewhere)
    else:
        report.mkdir()
    for path in (report / "thesis.tex", report / "speed.png", page):
        path.touch()
    run_training(run_dir, few, SMALL, options, overwrite=True)
    assert {path.name for path in report.iterdir()} == {"thesis.tex", "speed.png"}
    assert page.exists()
    run_training(run_dir, few, SMALL, options, overwrite=True)
    assert {path.name for path in report.iterdir()} == {"thesis.tex"}
    assert not page.exists()
    (report / "thesis.tex").unlink()
    run_training(run_dir, few, SMALL, options, overwrite=True)
    assert report.exists() == linked


def test_too_many_processes_overwrite_nothing(few, tmp_path, monkeypatch):
    run_training(tmp_path, few, SMALL, FAST._replace(epochs=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(distributed, "processes", lambda _: contextlib.nullcontext(Share(0, 257)))
    with pytest.raises(ValueError, match="there must be a training image for each of 257 processes, got 256"):
        run_training(tmp_path, few, SMALL, FAST._replace(batch_size=512), overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_of_several_processes_the_first_one_makes_the_directory(few, tmp_path, monkeypatch):
    """Each may have chosen another, by the time."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "processes", lambda _: contextlib.nullcontext(Share(1, 2)))
    assert len(run_training(tmp_path / "runs" / "later", few, SMALL, FAST._replace(epochs=1)).history) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_network_without_its_training_is_not_overwritten_by_accident(few, tmp_path, resume):
    options = FAST._replace(epochs=1)
    run_training(tmp_path, few, SMALL, options)
    (tmp_path / TRAINING).unlink()
    for name in (MODEL, HISTORY):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RunError, match=f"holds {name}, but no {TRAINING} to resume from: --overwrite starts anew"):
            run_training(tmp_path, few, SMALL, options, resume=resume)
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).unlink()


def test_a_run_keeps_where_its_images_came_from(few, tmp_path):
    options = FAST._replace(epochs=1)
    run_training(tmp_path, few, SMALL, options, source={"data_dir": "here"})
    for source in (None, {"data_dir": "there"}):
        run_training(tmp_path, few, SMALL, options, resume=True, source=source)
        expected = source or {"data_dir": "here"}
        assert stored(tmp_path).source == load(tmp_path / MODEL).info["source"] == expected


def test_what_a_run_was_begun_with_is_known_without_its_network(few, tmp_path, monkeypatch):
    options = FAST._replace(epochs=1)
    run_training(tmp_path, few, SMALL, options)
    monkeypatch.setattr(checkpoint, "CapsNet", None)
    found = stored(tmp_path)
    assert (found.model, found.options, found.source) == (json.loads(json.dumps(SMALL)), options, {})


def test_a_run_that_goes_on_makes_no_other_network(few, tmp_path, monkeypatch):
    options = FAST._replace(epochs=1)
    first = run_training(tmp_path, few, SMALL, options)
    monkeypatch.setattr(Training, "begin", None)
    assert run_training(tmp_path, few, SMALL, options, resume=True).test == first.test


def test_a_network_that_fails_on_the_test_split_alone_is_not_kept(few, tmp_path):
    broken = few._replace(test=data.Split(few.test.images * float("nan"), few.test.labels))
    with pytest.raises(FloatingPointError, match="the loss of the trained network is nan"):
        run_training(tmp_path, broken, SMALL, FAST._replace(epochs=1, validation=0.2))
    assert {path.name for path in tmp_path.iterdir()} == {TRAINING}


@pytest.mark.parametrize("change", ["option", "model", "overlap", "images"])
def test_only_the_same_run_is_resumed(few, tmp_path, change):
    run_training(tmp_path, few, SMALL, FAST._replace(epochs=1))
    dataset, model, options = few, SMALL, FAST._replace(epochs=1)
    if change == "option":
        options, message = options._replace(rotation=5.0), "a run with rotation = 0.0, but you asked for rotation = 5.0"
    elif change == "model":
        model, message = {**SMALL, "types": 3}, "a run with types = 2, but you asked for types = 3"
    elif change == "overlap":  # of which the shape of the images follows
        model, options, message = (
            PAIRS,
            options._replace(overlap=True),
            "with overlap = False, but you asked for overlap",
        )
    else:
        dataset = few._replace(test=few.test[:63])
        message = "was trained on other images, digits, than are there now"
    with pytest.raises(RunError, match=message):
        run_training(tmp_path, dataset, model, options, resume=True)


def test_images_a_second_are_those_of_the_steps(few, monkeypatch):
    now = [0.0]

    def pass_time(result, seconds):
        now[0] += seconds
        return result

    score = Score(1.0, 0.5)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer, "_train_batches", lambda *_: pass_time(score, 2.0))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: pass_time(score, 5.0))
    training = Training.begin(SMALL, FAST)
    trainer.train_epoch(training, few.train, few.test)
    assert training.history == [Epoch(score, score, 2.0)]


def test_a_bar_tells_the_speed_of_the_steps(monkeypatch):
    fields = {}
    bar = SimpleNamespace(add_task=lambda *_, **__: 0, update=lambda _, **new: fields.update(new))
    shown = progress._Bar(bar, 2, 0, 30, batches.WHOLE)
    score, history = Score(1.0, 0.5), []
    for epoch, times in ((1, (0.0, 1.0, 2.0)), (2, (100.0, 100.5))):
        for at in times:
            monkeypatch.setattr(progress.time, "monotonic", lambda at=at: at)
            shown.step(epoch=epoch, images=10, loss=1.0)
        assert fields["rate"] == 10 * epoch
        history.append(Epoch(score, score, 3.0 * epoch))
        shown.epoch(history)
        assert fields["rate"] == 10 / epoch


def test_a_run_shows_every_step(few, tmp_path, monkeypatch):
    told, shown = [], progress.Shown()
    shown.step = lambda **fields: told.append(fields["step"])
    monkeypatch.setattr("capsroute.training.run.progress", lambda *_: contextlib.nullcontext(shown))
    run_training(tmp_path, few, SMALL, FAST._replace(epochs=1))
    assert told == list(range(1, 9))


def test_the_time_left_is_by_the_epochs_of_this_process(monkeypatch, capsys):
    """Of five epochs two were done before."""
    now = iter((0.0, 10.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    epoch = Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 2.0)
    progress._Lines(5, 2, 30, "test").epoch([epoch] * 3)
    assert capsys.readouterr().err.endswith("15 images/s  20 s left\n")


def test_a_bar_of_a_run_that_goes_on_begins_where_that_was():
    told = {}
    bar = SimpleNamespace(
        add_task=lambda *_, **fields: told.update(fields), update=lambda _, **fields: told.update(fields)
    )
    shown = progress._Bar(bar, 3, 2, 30, Share(0, 2))
    assert (told["total"], told["completed"]) == (90, 60)
    shown.step(epoch=3, images=5, loss=1.0)
    assert told["advance"] == 10  # the other process has as many


def test_of_several_processes_the_first_one_shows_its_progress_while_there_is_any():
    training = Training.begin(SMALL, FAST)
    with progress.progress(training, 30, Share(1, 2)) as shown:
        assert type(shown) is progress.Shown
    training.history = [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0)] * 3
    with progress.progress(training, 30, Share()) as shown:
        assert type(shown) is progress.Shown


@pytest.mark.parametrize(("width", "shown"), [(79, progress._Lines), (80, progress._Bar)])
def test_a_bar_is_shown_where_it_has_room_for_all_its_words(monkeypatch, width, shown):
    rich, out = pytest.importorskip("rich.console"), io.StringIO()
    console = partial(rich.Console, file=out, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(rich, "Console", lambda stderr: console())
    training = Training.begin(SMALL, FAST._replace(epochs=200, validation=0.5))
    with progress.progress(training, 12_345, Share()) as found:
        assert type(found) is shown
        if shown is progress._Bar:
            found.step(epoch=100, images=12_345, loss=0.5)
            found.epoch([Epoch(Score(0.5, 0.5), Score(0.5, 1.0), 1.0)] * 100)
    assert "…" not in out.getvalue()
    if shown is progress._Bar:
        words = r"epoch 100/200 .*loss 0.5000 validation accuracy 100.00% 12,345 images/s [-\d]:[-\d]{2}:[-\d]{2}"
        assert re.search(words, out.getvalue())


def test_the_network_sees_a_larger_canvas_where_digits_overlap(few):
    assert image_shape(few, FAST) == (1, 8, 8)
    assert image_shape(few, FAST._replace(overlap=True)) == overlap.canvas((1, 8, 8)) == PAIRS["image_shape"]


def test_tensorboard_shows_every_epoch_once_also_after_resuming(few, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class InterruptionError(Exception):
        pass

    def stop(epoch, **_):
        if epoch == 3:
            raise InterruptionError

    options = FAST._replace(validation=0.2)
    with pytest.raises(InterruptionError):
        run_training(tmp_path, few, SMALL, options, tensorboard=True, on_step=stop)
    run = run_training(tmp_path, few, SMALL, options, tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag, value in (
        ("loss/training", lambda epoch: epoch.train.loss),
        ("accuracy/validation", lambda epoch: epoch.held_out.accuracy),
    ):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(k, pytest.approx(value(epoch))) for k, epoch in enumerate(run.history, 1)]
    assert events.Scalars("learning_rate")[-1].value < 1e-3


def test_what_was_logged_of_an_epoch_that_was_lost_is_dropped(few, tmp_path):
    """A run may be killed when an epoch is in the log, and not yet in the state to resume from."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = Training.begin(SMALL, FAST)
    for done in (0, 1):
        with tensorboard_log(tmp_path, done) as log:
            training.history = training.history[:done]
            for _ in range(done, 2):
                training.history.append(Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0))
                log(training)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/training")] == [1, 2]


def test_sums_over_processes_are_exact(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda sums: sums.mul_(2))
    assert distributed.total(2**24 + 1, device=torch.device("cpu")) == [2**25 + 2]  # more than float32 can count


def test_tensorboard_names_the_split_that_an_epoch_is_judged_by(few, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_training(tmp_path, few, SMALL, FAST._replace(epochs=1), tensorboard=True)
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"loss/test", "accuracy/test"} <= set(tags)


def test_overwriting_removes_the_logs_of_the_run_and_no_others(few, tmp_path):
    pytest.importorskip("tensorboard")
    logs, options = tmp_path / "tensorboard", FAST._replace(epochs=1)
    run_training(tmp_path, few, SMALL, options, tensorboard=True)
    (old,) = logs.iterdir()
    mine = logs / "events.out.tfevents.1.me.2.3"
    mine.touch()
    run_training(tmp_path, few, SMALL, options, tensorboard=True, overwrite=True)
    (new,) = set(logs.iterdir()) - {mine}
    assert new != old
    mine.unlink()
    run_training(tmp_path, few, SMALL, options, overwrite=True)
    assert not logs.exists()
