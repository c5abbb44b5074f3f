"""capsroute.training.checkpoint and resuming: a run that is killed goes on as if it had not been."""

import filecmp
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from capsroute.nn import CapsNet
from capsroute.training import checkpoint, data
from capsroute.training import run as training_run
from capsroute.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    load,
    load_training,
    pack_training,
    save,
)
from capsroute.training.options import TrainingOptions
from capsroute.training.run import MODEL, TRAINING, Run, run_training
from capsroute.training.trainer import Training, train_epoch

pytest.importorskip("sklearn")
SMALL = {"image_shape": (1, 8, 8), "classes": 10, "channels": 4, "types": 1, "hidden": (8,)}
OPTIONS = TrainingOptions(epochs=60, batch_size=16, clip=1.0, validation=0.2, learning_rate=0.01)


def few() -> data.Dataset:
    """A dataset of which an epoch takes a hundredth of a second."""
    digits = data.digits()
    return digits._replace(train=digits.train[:100], test=digits.test[:20])


# Files


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Checkpoint]:
    path = tmp_path / "net.safetensors"
    content = Checkpoint(CapsNet(**SMALL), SMALL, {"seed": 3})
    save(path, content)
    return path, content


@pytest.fixture(scope="module")
def begun() -> Training:
    """A training after one epoch, with everything that a checkpoint can hold."""
    training = Training.begin(SMALL, OPTIONS._replace(amp="float16"))
    dataset = few()
    train_epoch(training, dataset.train, dataset.test)
    return training


@pytest.fixture
def saved_training(tmp_path, begun) -> Path:
    path = tmp_path / TRAINING
    path.write_bytes(pack_training(begun, {"dataset": "few"}))
    return path


@pytest.mark.parametrize("amp", ["float16", "off"])
def test_an_epoch_in_which_each_step_overflowed(tmp_path, amp):
    """In float16 it leaves no moments to store; otherwise they are missed."""
    training = Training.begin(SMALL, OPTIONS._replace(amp=amp))
    dataset = few()
    if amp == "float16":
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    train_epoch(training, dataset.train, dataset.test)
    if amp == "off":
        training.optimizer.state.clear()
    assert not training.optimizer.state
    (tmp_path / TRAINING).write_bytes(pack_training(training, {}))
    if amp == "float16":
        assert len(load_training(tmp_path / TRAINING)[0].history) == 1
    else:
        with pytest.raises(CheckpointError, match="the optimizer's state must be"):
            load_training(tmp_path / TRAINING)


def test_a_network_round_trip(saved):
    path, content = saved
    state = torch.get_rng_state()
    loaded = load(path, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.info == {"seed": 3}
    assert loaded.net.routing.backend == "reference"
    assert all(x.requires_grad and x.device.type == "cpu" for x in loaded.net.parameters())
    expected = content.net.state_dict()
    assert loaded.net.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.net.state_dict().items())
    assert CapsNet(**loaded.model)(torch.rand(2, 1, 8, 8)).lengths.shape == (2, 10)


def test_a_loaded_network_outlives_its_file(saved):
    path, (net, *_) = saved
    loaded = load(path).net
    with open(path, "r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(bytes(path.stat().st_size - file.tell()))
    assert all(torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


def test_a_network_whose_numbers_lie_in_another_order(tmp_path):
    net = CapsNet(**SMALL).to(memory_format=torch.channels_last)
    save(tmp_path / "net", Checkpoint(net, SMALL, {}))
    for name, x in load(tmp_path / "net").net.state_dict().items():
        assert torch.equal(x, net.state_dict()[name])


def test_a_training_round_trip(saved_training, begun):
    loaded, info = load_training(saved_training)
    assert info == {"dataset": "few"}
    assert loaded.options == begun.options
    assert loaded.history == begun.history
    assert loaded.scaler.state_dict() == begun.scaler.state_dict()
    for mine, its in (
        (loaded.net.state_dict(), begun.net.state_dict()),
        (loaded.best, begun.best),
        *zip(*(list(x.optimizer.state_dict()["state"].values()) for x in (loaded, begun)), strict=True),
    ):
        assert mine.keys() == its.keys()
        assert all(torch.equal(x, its[name]) for name, x in mine.items())


def test_every_loaded_number_matters(saved_training, begun):
    """What the file leaves out, or the loader drops, would show in the next epoch."""
    dataset = few()
    loaded, _ = load_training(saved_training)
    other = Training.begin(SMALL, begun.options)
    other.net.load_state_dict(begun.net.state_dict())
    other.history = list(begun.history)  # but no moments
    results = []
    for training in (loaded, load_training(saved_training)[0], other):
        train_epoch(training, dataset.train, dataset.test)
        results.append(training.history[-1]._replace(seconds=0))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("kind", ["model", "training"])
def test_a_cut_off_checkpoint_is_an_error_wherever_it_was_cut(saved, saved_training, kind):
    path, read = (saved[0], load) if kind == "model" else (saved_training, load_training)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1, *range(0, len(content), 4999)}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
            read(path)


def test_a_changed_header_is_an_error_or_harmless(saved_training, saved):
    """Whatever a byte of the header becomes, nothing but CheckpointError is raised, and nothing is executed."""
    generator = random.Random(0)
    for path, read in ((saved[0], load), (saved_training, load_training)):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        refused = 0
        for _ in range(150):
            changed = bytearray(content)
            for _ in range(generator.randint(1, 3)):
                changed[generator.randrange(8, header)] = generator.choice(b'0123456789abcdefgh{}[]":,-.\\ \x00\xff')
            path.write_bytes(changed)
            try:
                read(path)
            except CheckpointError:
                refused += 1
        assert refused > 50


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", bytes(100), b"PK\x03\x04" + bytes(200)])
def test_a_foreign_file_is_an_error(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    for read in (load, load_training):
        with pytest.raises(CheckpointError, match=f"{path} is no"):
            read(path)


class Malicious:
    """A pickle of it, loaded, would leave a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_directory_is_named(tmp_path):
    for read in (load, load_training):
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a directory"):
            read(tmp_path)


def test_a_pickle_is_not_executed(tmp_path):
    path, mark = tmp_path / "pickled", tmp_path / "mark"
    torch.save({"net": Malicious(mark)}, path)
    for read in (load, load_training):
        with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
            read(path)
    assert not mark.exists()


def content(**changes) -> dict:
    return {"capsroute": json.dumps({"version": 2, "kind": "model", "model": SMALL, "info": {}, **changes})}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is a safetensors file, but not a checkpoint of capsroute"),
        ({"format": "pt"}, "is a safetensors file, but not a checkpoint of capsroute"),
        ({"capsroute": "{"}, "does not fit its own configuration"),
        ({"capsroute": "[]"}, "does not fit its own configuration"),
        ({"capsroute": "[" * 100_000}, "does not fit its own configuration: RecursionError"),
        (content(version=3), "version 3, expected 2"),
        (content(kind="training"), 'of kind "training", expected "model"'),
        (content(model={}), "missing 2 required positional"),
        (content(model=[]), "does not fit its own configuration"),
        (content(info=3), "does not fit its own configuration"),
        (content(model={**SMALL, "types": 3}), "size mismatch"),
        (content(model={**SMALL, "classes": 0}), "classes must be"),
        (content(model={**SMALL, "classes": 10**15}), "size mismatch"),  # and no memory is asked for
        (content(model={**SMALL, "classes": 10**30}), "does not fit its own configuration"),
        (content(model={**SMALL, "hidden": [1] * 100_000}), r"hidden has 100000 widths, the file \d+ tensors"),
        (content(model={**SMALL, "sort": 0}), "'sort'"),
        (content(model={**SMALL, "device": "cuda"}), "multiple values for keyword argument 'device'"),
        (content(model={**SMALL, "dtype": "float64"}), "does not fit its own configuration"),
    ],
)
def test_a_file_of_other_contents_is_an_error(saved, metadata, message):
    from safetensors.torch import save_file

    path, (net, *_) = saved
    save_file(net.state_dict(), path, metadata)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_parameters_of_another_dtype_are_an_error(saved):
    from safetensors.torch import save_file

    path, (net, *_) = saved
    save_file(net.double().state_dict(), path, content())
    with pytest.raises(CheckpointError, match=r"conv.weight must be torch.float32, got torch.float64"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("step.conv.weight"), "KeyError: 'conv.weight'"),
        (lambda t: t.update({"exp_avg.conv.weight": torch.zeros(3)}), r"exp_avg.conv.weight must be float32 \[4, 1"),
        (
            lambda t: t.update({"exp_avg.conv.weight": t["exp_avg.conv.weight"].double()}),
            "exp_avg.conv.weight must be float32",
        ),
        (lambda t: t.update({"exp_avg.more": torch.zeros(3)}), "there is no parameter for exp_avg.more"),
        (lambda t: t.update({"extra.thing": torch.zeros(3)}), "the optimizer's state must be exp_avg, exp_avg_sq"),
        (lambda t: t.pop("best.conv.weight"), "Missing key"),
        (lambda t: t.pop("net.conv.weight"), "Missing key"),
    ],
)
def test_a_training_that_lacks_something_is_an_error(saved_training, change, message):
    tensors, stored = checkpoint._read(saved_training, "training")
    change(tensors)
    stored = {name: value for name, value in stored.items() if name not in ("version", "kind")}
    saved_training.write_bytes(checkpoint._pack("training", tensors, stored))
    with pytest.raises(CheckpointError, match=message):
        load_training(saved_training)


def test_the_options_of_a_training_are_checked(saved_training):
    tensors, stored = checkpoint._read(saved_training, "training")
    stored = {name: value for name, value in stored.items() if name not in ("version", "kind")}
    stored["options"]["batch_size"] = 0
    saved_training.write_bytes(checkpoint._pack("training", tensors, stored))
    with pytest.raises(CheckpointError, match="batch_size must be at least 1"):
        load_training(saved_training)


# Killing


@pytest.fixture(autouse=True, scope="module")
def all_on_one_thread():
    """As in the processes that are killed: torch's convolutions have other bits on another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_until_killed(run_dir: Path, begun, kill_at: str) -> None:
    """In a process of its own: begin or go on; `begun` is told the epoch that runs.

    With some values of `kill_at` it kills itself inside the next write: "write" after half of the bytes, "fsync" and
    "replace" before that.
    """
    torch.set_num_threads(1)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(epoch: int, **_) -> None:
        if begun.value != epoch:
            begun.value = epoch
            if kill_at in ("fsync", "replace"):
                setattr(os, kill_at, die)
            elif kill_at == "write":
                training_run.write_atomically = write_half

    def write_half(path: Path, content: bytes) -> None:
        path = Path(path)
        path.with_name(f".{path.name}.unfinished").write_bytes(content[: len(content) // 2])
        die()

    run_training(run_dir, few(), SMALL, OPTIONS, resume=True, on_step=on_step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Run]:
    path = tmp_path_factory.mktemp("uninterrupted")
    return path, run_training(path, few(), SMALL, OPTIONS)


@pytest.fixture(scope="module")
def start_training():
    """Starts :func:`train_until_killed` in a fork of a server that has imported everything, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    # torch's optimizers import torch._dynamo in their first step.
    context.set_forkserver_preload([__name__, "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"])

    def start(run_dir: Path, kill_at: str = ""):
        begun = context.Value("i", 0)
        process = context.Process(target=train_until_killed, args=(run_dir, begun, kill_at))
        process.start()
        return process, begun

    with pytest.MonkeyPatch.context() as patch:  # the server looks for this module there
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        yield start


def epochs_stored(run_dir: Path) -> int:
    path = run_dir / TRAINING
    return len(load_training(path)[0].history) if path.exists() else -1


def wait_for(condition, process) -> None:
    end = time.monotonic() + 60
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "the training does not begin"
        time.sleep(0.002)


def test_killed_at_any_instant_a_run_loses_one_epoch_at_most(tmp_path, uninterrupted, start_training):
    """12 kills: 2 while it starts, 4 while it trains, 6 inside a write; then it ends with the bits of the other."""
    generator = random.Random(0)
    kinds = ["start"] * 2 + ["train"] * 4 + ["write", "fsync", "replace"] * 2
    generator.shuffle(kinds)
    stored, killed_in_training = -1, 0
    for kind in kinds:
        process, begun = start_training(tmp_path, kind)
        if kind == "start":
            time.sleep(generator.uniform(0, 0.2))
            process.kill()
        elif kind == "train":  # anywhere in an epoch or the write after it, up to some epochs later
            epoch = max(stored, 0) + generator.randint(1, 3)
            wait_for(lambda begun=begun, epoch=epoch: begun.value >= epoch, process)
            time.sleep(generator.uniform(0, 0.1))
            process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        killed_in_training += begun.value > 0
        now = epochs_stored(tmp_path)  # the file is whole, or there is none
        assert now >= max(stored, begun.value - 1), kind
        stored = now
    assert killed_in_training >= 10
    assert 0 < stored < OPTIONS.epochs
    process, _ = start_training(tmp_path)
    process.join(120)
    assert process.exitcode == 0
    assert filecmp.cmp(tmp_path / MODEL, uninterrupted[0] / MODEL, shallow=False)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in uninterrupted[0].iterdir()}


def test_resuming_gives_the_numbers_of_an_uninterrupted_run(tmp_path, uninterrupted):
    class Interruption(BaseException):
        pass

    def interrupt(at: int, epoch: int, **_) -> None:
        if epoch == at:
            raise Interruption

    for at in (1, 2, 2, 17):  # once before any epoch was done, once at the same place without progress
        with pytest.raises(Interruption):
            run_training(tmp_path, few(), SMALL, OPTIONS, resume=True, on_step=partial(interrupt, at))
        assert epochs_stored(tmp_path) == at - 1
    run = run_training(tmp_path, few(), SMALL, OPTIONS, resume=True)
    expected = uninterrupted[1]
    assert [epoch._replace(seconds=0) for epoch in run.history] == [e._replace(seconds=0) for e in expected.history]
    assert (run.test, run.best_epoch) == (expected.test, expected.best_epoch)
    assert filecmp.cmp(tmp_path / MODEL, uninterrupted[0] / MODEL, shallow=False)
    assert run_training(tmp_path, few(), SMALL, OPTIONS, resume=True).test == run.test  # nothing is left to do
