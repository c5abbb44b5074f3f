"""capsroute.training: data readers, the trainer, checkpoints and pictures."""

import gzip
import json
import os
import struct
from pathlib import Path

import pytest
import torch

from capsroute.nn import CapsNet
from capsroute.training import data, pictures
from capsroute.training.checkpoint import Checkpoint, CheckpointError, load, save, write_atomically
from capsroute.training.data import DataError, Dataset
from capsroute.training.pictures import save_pictures
from capsroute.training.trainer import Epoch, Score, TrainingOptions, evaluate, shift_at_random, train

pytest.importorskip("sklearn")
MNIST = Path(os.environ.get("CAPSROUTE_DATA", "no-such-directory"))
SMALL = {"image_shape": (1, 8, 8), "classes": 10, "channels": 8, "types": 2, "hidden": (16,)}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.digits()


@pytest.fixture(scope="module")
def few(digits) -> Dataset:
    """A dataset that trains in no time."""
    return digits._replace(
        train_images=digits.train_images[:256],
        train_labels=digits.train_labels[:256],
        test_images=digits.test_images[:64],
        test_labels=digits.test_labels[:64],
    )


def idx(*shape: int, values: bytes | None = None) -> bytes:
    count = 1
    for size in shape:
        count *= size
    values = bytes(k % 256 for k in range(count)) if values is None else values
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.fixture
def mnist_dir(tmp_path):
    """Four small files as MNIST's: plain for training, gzipped for testing."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(6, 5, 7))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(6, values=bytes((0, 1, 2, 3, 2, 1))))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(2, 5, 7)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(2, values=bytes((3, 0)))))
    return tmp_path


# Data


def test_digits_are_split_the_same_way_always(digits):
    assert (digits.image_shape, digits.classes) == ((1, 8, 8), 10)
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    for images, labels in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert (images.min(), images.max()) == (0, 1)
    share = digits.test_labels.bincount() / torch.cat([digits.train_labels, digits.test_labels]).bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.2), rtol=0, atol=0.005)  # stratified
    torch.manual_seed(5)
    again = data.digits()
    assert torch.equal(again.test_images, digits.test_images)


def test_digits_splits_share_no_image_and_leave_none_out(digits):
    from sklearn.datasets import load_digits

    images = torch.cat([digits.train_images, digits.test_images]).view(1797, 64)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    bunch = load_digits()
    pairs = zip((16 * images).tolist(), labels.tolist(), strict=True)
    assert sorted(pairs) == sorted(zip(bunch.data.tolist(), bunch.target.tolist(), strict=True))


def test_idx_files_plain_and_gzipped(mnist_dir):
    dataset = data.load(mnist_dir)
    assert (dataset.image_shape, dataset.classes) == ((1, 5, 7), 4)
    expected = (torch.arange(6 * 35) % 256).view(6, 1, 5, 7) / 255
    torch.testing.assert_close(dataset.train_images, expected, rtol=0, atol=0)
    assert dataset.train_labels.tolist() == [0, 1, 2, 3, 2, 1]
    torch.testing.assert_close(dataset.test_images, expected[:2], rtol=0, atol=0)
    assert dataset.test_labels.tolist() == [3, 0]


@pytest.mark.skipif(not MNIST.is_dir(), reason="CAPSROUTE_DATA names no directory with the real MNIST")
def test_real_mnist_is_read_as_it_is():
    images = data.read_idx(MNIST / "t10k-images-idx3-ubyte.gz", 3)
    labels = data.read_idx(MNIST / "t10k-labels-idx1-ubyte.gz", 1)
    assert images.shape == (10000, 28, 28)
    assert labels.long().bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "must be an IDX file that starts with 00000803, got nothing"),
        ("train-images-idx3-ubyte", idx(6, 5, 7)[:9], "must be an IDX file that starts with 00000803"),
        ("train-images-idx3-ubyte", idx(6, 5, 7)[:-1], r"must hold \[6, 5, 7\] = 210 bytes of values, got 209"),
        ("train-images-idx3-ubyte", idx(6, 5, 7) + b"x", r"must hold \[6, 5, 7\] = 210 bytes of values, got 211"),
        ("train-images-idx3-ubyte", idx(6), "starts with 00000803, got 00000801"),
        ("train-images-idx3-ubyte", b"\x89PNG\r\n", "starts with 00000803, got 89504e47"),
        ("train-images-idx3-ubyte", idx(0, 5, 7), r"holds no values: its shape is \[0, 5, 7\]"),
        ("train-images-idx3-ubyte", idx(5, 5, 7), "holds 5 images, .*train-labels-idx1-ubyte 6 labels"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 7))[:-9], "is no whole gzip file"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 7))[:20], "is no whole gzip file"),
        ("t10k-images-idx3-ubyte.gz", b"\x1f\x8b" + bytes(30), "is no whole gzip file"),  # no method
        ("t10k-images-idx3-ubyte.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, "is no whole gzip file"),  # no block
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 6)), r"are \[5, 7\] for training, \[5, 6\] for testing"),
    ],
)
def test_a_bad_idx_file_is_named(mnist_dir, name, content, message):
    (mnist_dir / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load(mnist_dir)
    assert str(mnist_dir) in str(error.value)


def test_a_gzip_file_with_broken_values_is_named(mnist_dir):
    path = mnist_dir / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is no whole gzip file"):
        data.load(mnist_dir)


def test_a_missing_idx_file_is_named(mnist_dir):
    (mnist_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no file t10k-labels-idx1-ubyte or t10k"):
        data.load(mnist_dir)


# Training


def test_shifts_move_images_by_at_most_the_fraction():
    dot = torch.zeros(200, 1, 9, 9)
    dot[..., 4, 4] = 1
    moved = shift_at_random(dot, 1 / 9)  # one pixel
    assert torch.equal(shift_at_random(dot, 0.0), dot)
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(200))  # nothing is lost inside the image
    place = torch.arange(9.0)
    for marginal in (moved.sum((1, 2)), moved.sum((1, 3))):  # over y, over x
        offset = (marginal * place).sum(1) - 4
        assert offset.abs().max() <= 1 + 1e-5
        assert offset.min() < -0.8
        assert offset.max() > 0.8


@pytest.mark.not_interpreted
def test_training_reduces_the_loss_and_reports(few, backend):
    told = []
    options = TrainingOptions(epochs=3, batch_size=32, learning_rate=0.01)
    net, history = train(few, SMALL, options, backend=backend, report=lambda **fields: told.append(fields))
    assert history[-1].train.loss < 0.8 * history[0].train.loss
    assert history[-1].test.accuracy > 0.4
    assert evaluate(net, few.test_images, few.test_labels) == history[-1].test
    assert sum(fields.get("images", 0) for fields in told) == 3 * 256
    assert [fields["accuracy"] for fields in told if "accuracy" in fields] == [e.test.accuracy for e in history]
    assert [fields["epoch"] for fields in told if "epoch" in fields] == [1] * 8 + [2] * 8 + [3] * 8


def test_the_seed_alone_decides_what_is_learnt(few):
    options = TrainingOptions(epochs=1, batch_size=64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = train(few, SMALL, options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = train(few, SMALL, options)
    other, _ = train(few, SMALL, options._replace(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.routing.weight, other.routing.weight)


def test_one_step_is_enough_to_train(few):
    _, history = train(few, SMALL, TrainingOptions(epochs=1, batch_size=1000))
    assert len(history) == 1


def test_evaluate_is_a_mean_over_images_in_any_batches(few):
    net = CapsNet(**SMALL)
    whole = evaluate(net, few.test_images, few.test_labels)
    parts = evaluate(net, few.test_images, few.test_labels, batch_size=7)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    right = (net(few.test_images).lengths.argmax(1) == few.test_labels).sum().item()
    assert whole == Score(whole.loss, right / 64)


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoint = Checkpoint(CapsNet(**SMALL), SMALL, {"seed": 3})
    save(path, checkpoint)
    return path, checkpoint


def test_checkpoint_round_trip(saved):
    path, checkpoint = saved
    state = torch.get_rng_state()
    loaded = load(path, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.info == {"seed": 3}
    assert loaded.net.routing.backend == "reference"
    assert all(x.requires_grad and x.device.type == "cpu" for x in loaded.net.parameters())
    expected = checkpoint.net.state_dict()
    assert loaded.net.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.net.state_dict().items())
    images = torch.rand(2, 1, 8, 8)
    assert CapsNet(**loaded.model)(images).lengths.shape == (2, 10)


def test_a_cut_off_checkpoint_is_an_error_wherever_it_was_cut(saved):
    path, _ = saved
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1, *range(0, len(content), 4999)}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="is no whole safetensors file"):
            load(path)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", bytes(100), b"PK\x03\x04" + bytes(200)])
def test_a_foreign_file_is_an_error(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is no"):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is a safetensors file, but no checkpoint of capsroute"),
        ({"format": "pt"}, "is a safetensors file, but no checkpoint of capsroute"),
        ({"capsroute": "{"}, "does not fit its own configuration"),
        ({"capsroute": "[]"}, "does not fit its own configuration"),
        ({"capsroute": json.dumps({"version": 2})}, "version 2, expected 1"),
        ({"capsroute": json.dumps({"version": 1, "model": {}, "info": {}})}, "missing 2 required positional"),
        ({"capsroute": json.dumps({"version": 1, "model": {**SMALL, "types": 3}, "info": {}})}, "size mismatch"),
        ({"capsroute": json.dumps({"version": 1, "model": {**SMALL, "classes": 0}, "info": {}})}, "classes must be"),
        ({"capsroute": json.dumps({"version": 1, "model": {**SMALL, "sort": 0}, "info": {}})}, "'sort'"),
    ],
)
def test_a_file_of_other_contents_is_an_error(saved, metadata, message):
    from safetensors.torch import save_file

    path, checkpoint = saved
    save_file(checkpoint.net.state_dict(), path, metadata)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Pictures


def test_pictures_are_drawn(few, tmp_path):
    history = [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0), Epoch(Score(0.1, 1.0), Score(0.2, 1.0), 1.0)]
    paths = save_pictures(tmp_path, CapsNet(**SMALL), few, history)
    assert [path.name for path in paths] == ["learning_curves.png", "reconstructions.png", "coupling.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_error_of_zero_lies_inside_the_learning_curves():
    history = [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0), Epoch(Score(0.1, 1.0), Score(0.2, 1.0), 1.0)]
    figure = pictures.learning_curves(history)
    axes = figure.axes[1]
    assert axes.lines[1].get_ydata().tolist() == [50, 0]
    assert axes.bbox.ymin - 1 <= axes.transData.transform((2, 0))[1] <= axes.bbox.ymax


def test_pictures_of_more_classes_than_fit_and_of_colour():
    images, labels = torch.rand(26, 3, 8, 9), torch.arange(26) % 13
    dataset = Dataset("colour", images, labels, images, labels)
    net = CapsNet((3, 8, 9), 13, channels=4, types=2, hidden=(4,))
    shown = pictures.reconstructions(net, dataset)
    assert len(shown.axes) == 2 * 10
    torch.testing.assert_close(torch.tensor(shown.axes[3].images[0].get_array()), images[3].permute(1, 2, 0))
    titles = [axes.get_title() for axes in pictures.coupling(net, dataset).subfigs[1].axes]
    label = int(net(images).lengths.gather(1, labels.unsqueeze(1)).argmax()) % 13
    assert f"to {label}" in titles


def test_coupling_picture_shows_the_coupling(few):
    net = CapsNet(**SMALL)
    figure = pictures.coupling(net, few)
    certain = net(few.test_images).lengths.gather(1, few.test_labels.unsqueeze(1)).argmax()
    _, c = net.routing(net.primary_capsules(few.test_images[certain : certain + 1]), return_coupling=True)
    by_hand = c.view(4, 4, 2, 10).mean(2) / 0.1  # [height, width, J]
    for j, axes in enumerate(figure.subfigs[1].axes[:10]):
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), by_hand[..., j], rtol=1e-5, atol=0)
