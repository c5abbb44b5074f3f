"""capsroute.training.data: the data sets that a network is trained on and tested on."""

import gzip
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from capsroute.training import data
from capsroute.training.data import DataError, Split, hold_out

pytest.importorskip("sklearn")
MNIST = Path(os.environ.get("CAPSROUTE_DATA", "no-such-directory"))


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.digits()


def test_digits_are_split_the_same_way_always(digits):
    assert (digits.image_shape, digits.classes) == ((1, 8, 8), 10)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    for split in (digits.train, digits.test):
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert (split.images.min(), split.images.max()) == (0, 1)
    share = digits.test.labels.bincount() / torch.cat([digits.train.labels, digits.test.labels]).bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.2), rtol=0, atol=0.005)  # stratified
    torch.manual_seed(5)
    assert torch.equal(data.digits().test.images, digits.test.images)


def test_digits_splits_share_no_image_and_leave_none_out(digits):
    from sklearn.datasets import load_digits

    images = torch.cat([digits.train.images, digits.test.images]).view(1797, 64)
    labels = torch.cat([digits.train.labels, digits.test.labels])
    bunch = load_digits()
    pairs = zip((16 * images).tolist(), labels.tolist(), strict=True)
    assert sorted(pairs) == sorted(zip(bunch.data.tolist(), bunch.target.tolist(), strict=True))


def test_a_checksum_sees_every_value(digits):
    changed = digits.test.images.clone()
    changed[-1, 0, 7, 7] += 0.5
    other = digits._replace(test=Split(changed, digits.test.labels))
    assert digits.checksum() == data.digits().checksum() != other.checksum()


def test_what_is_held_out_is_stratified_and_the_same_always(digits):
    kept, held = hold_out(digits.train, 0.25)
    assert len(kept) + len(held) == len(digits.train)
    share = held.labels.bincount() / digits.train.labels.bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.25), rtol=0, atol=0.01)
    assert torch.equal(hold_out(digits.train, 0.25)[1].images, held.images)
    for labels, fraction, words in (
        ([0, 0, 1, 1] * 5, 0.05, "the smallest has 10, 1 would be held out and 19 kept"),
        ([0, 0, 1, 1] * 5, 0.95, "the smallest has 10, 19 would be held out and 1 kept"),
        ([0, 0, 0, 0, 2], 0.4, "the smallest has 1, 2 would be held out and 3 kept"),
    ):
        split = Split(torch.rand(len(labels), 1, 2, 2), torch.tensor(labels))
        told = f"{fraction:g} of {len(labels)} images cannot be held out: each of 2 classes must have one"
        with pytest.raises(DataError, match=f"^{told} on either side, but {words}$"):
            hold_out(split, fraction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 2])}, "labels of mine must be below 2, one for each class name, got 2"),
        ({"labels": torch.tensor([0, -1])}, "labels of testing images of mine must be at least 0, got -1"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, r"must be int64 \[2\], got torch.int32 \[2\]"),
        ({"labels": torch.tensor([0])}, r"must be int64 \[2\], got torch.int64 \[1\]"),
        ({"images": torch.rand(2, 4, 4)}, r"float32 \[N, C, H, W\], got torch.float32 \[2, 4, 4\]"),
        ({"images": torch.rand(2, 1, 4, 4).double()}, "must be uint8 or float32 .*, got torch.float64"),
        ({"images": torch.full((2, 1, 4, 4), 255.0)}, "must be from 0 to 1 in float32, got 255 to 255"),
        ({"images": torch.full((2, 1, 4, 4), float("nan"))}, "must be from 0 to 1 in float32, got nan"),
        ({"images": torch.rand(0, 1, 4, 4), "labels": torch.arange(0)}, "there are no testing images of mine"),
        ({"images": torch.rand(2, 1, 4, 5)}, r"\[1, 4, 4\] for training, \[1, 4, 5\] for testing"),
    ],
)
def test_a_dataset_is_checked(change, message):
    right = {"images": torch.rand(2, 1, 4, 4), "labels": torch.tensor([0, 1])}
    with pytest.raises(DataError, match=message):
        data.make_dataset("mine", Split(**right), Split(**{**right, **change}), ["ant", "bee"])


# IDX


def idx(*shape: int, values: bytes | None = None) -> bytes:
    values = bytes(k % 256 for k in range(math.prod(shape))) if values is None else values
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.fixture
def mnist_dir(tmp_path):
    """Four small files as MNIST's: plain for training, gzipped for testing."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(6, 5, 7))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(6, values=bytes((0, 1, 2, 3, 2, 1))))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(2, 5, 7)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(2, values=bytes((3, 0)))))
    return tmp_path


@pytest.mark.parametrize("names", ["mnist", "emnist"])
def test_idx_files_plain_and_gzipped(mnist_dir, names):
    if names == "emnist":
        for path in mnist_dir.iterdir():
            path.rename(mnist_dir / f"emnist-letters-{path.name.replace('t10k', 'test')}")
    dataset = data.load(mnist_dir)
    assert (dataset.image_shape, dataset.classes, dataset.class_names) == ((1, 5, 7), 4, ("0", "1", "2", "3"))
    expected = (torch.arange(6 * 35) % 256).view(6, 1, 5, 7) / 255
    torch.testing.assert_close(dataset.train.as_float(), expected, rtol=0, atol=0)
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 2, 1]
    torch.testing.assert_close(dataset.test.as_float(), expected[:2], rtol=0, atol=0)
    assert dataset.test.labels.tolist() == [3, 0]


def test_of_an_idx_file_that_is_there_both_ways_the_plain_one_is_read(mnist_dir):
    for kind, dims in (("images-idx3", (6, 5, 7)), ("labels-idx1", (6,))):
        other = gzip.compress(idx(*dims, values=bytes(math.prod(dims))))
        (mnist_dir / f"train-{kind}-ubyte.gz").write_bytes(other)
    dataset = data.load(mnist_dir)
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 2, 1]
    assert dataset.train.images[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_half_of_an_idx_data_set_is_split_itself(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(20, 5, 5))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(20, values=bytes(k % 2 for k in range(20))))
    dataset = data.load(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.test.labels.tolist().count(0) == 2


@pytest.mark.skipif(not MNIST.is_dir(), reason="CAPSROUTE_DATA names no directory with the real MNIST")
def test_real_mnist_is_read_as_it_is():
    images = data.read_idx(MNIST / "t10k-images-idx3-ubyte.gz", 3)
    labels = data.read_idx(MNIST / "t10k-labels-idx1-ubyte.gz", 1)
    assert images.shape == (10_000, 28, 28)
    assert labels.long().bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "must be an IDX file that starts with 00000803, got nothing"),
        ("train-images-idx3-ubyte", idx(6, 5, 7)[:9], "must have a header of 16 bytes, got 9"),
        ("train-images-idx3-ubyte", idx(6, 5, 7)[:-1], r"must hold \[6, 5, 7\] = 210 bytes of values, got 209"),
        ("train-images-idx3-ubyte", idx(6, 5, 7) + b"x", r"must hold \[6, 5, 7\] = 210 bytes of values, got 211"),
        ("train-images-idx3-ubyte", idx(6), "starts with 00000803, got 00000801"),
        ("train-images-idx3-ubyte", b"\x89PNG\r\n", "starts with 00000803, got 89504e47"),
        ("train-images-idx3-ubyte", idx(0, 5, 7), r"holds no values: its shape is \[0, 5, 7\]"),
        ("train-images-idx3-ubyte", idx(5, 5, 7), "holds 5 images, .*train-labels-idx1-ubyte 6 labels"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 7))[:-9], "is not a complete gzip file"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 7))[:20], "is not a complete gzip file"),
        ("t10k-images-idx3-ubyte.gz", b"\x1f\x8b" + bytes(30), "is not a complete gzip file"),  # no method
        (
            "t10k-images-idx3-ubyte.gz",
            b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20,
            "is not a complete gzip file",
        ),  # no block
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 6)), r"\[1, 5, 7\] for training, \[1, 5, 6\] for"),
        ("more-train-images-idx3-ubyte", idx(6, 5, 7), "must hold one data set, got more-train-images"),
    ],
)
def test_a_bad_idx_file_is_named(mnist_dir, name, content, message):
    (mnist_dir / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load(mnist_dir)
    assert mnist_dir.name in str(error.value)


def test_neither_folders_nor_hidden_files_are_a_data_set(mnist_dir):
    (mnist_dir / "unpacked-train-images-idx3-ubyte").mkdir()
    (mnist_dir / "._train-images-idx3-ubyte").write_bytes(b"of macOS")
    assert len(data.load(mnist_dir).train) > 0


def test_a_gzip_file_with_broken_values_is_named(mnist_dir):
    path = mnist_dir / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is not a complete gzip file"):
        data.load(mnist_dir)


def test_missing_files_are_named(mnist_dir, tmp_path_factory):
    (mnist_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no file t10k-labels-idx1-ubyte or t10k"):
        data.load(mnist_dir)
    with pytest.raises(DataError, match="holds neither IDX files"):
        data.load(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="none is not a directory"):
        data.load(mnist_dir / "none")


# CIFAR-10


@pytest.fixture
def cifar_dir(tmp_path):
    for k, name in enumerate([f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]):
        pixels = bytes((k + plane) for plane in (10, 20, 30) for _ in range(1024))
        (tmp_path / name).write_bytes(bytes([k]) + pixels + bytes([9]) + pixels)
    return tmp_path


def test_cifar10(cifar_dir):
    dataset = data.load(cifar_dir)
    assert (dataset.name, dataset.image_shape, dataset.classes) == ("cifar10", (3, 32, 32), 10)
    assert dataset.class_names[9] == "truck"
    assert dataset.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert dataset.test.images[0, :, 0, 0].tolist() == [15, 25, 35]  # the red, green and blue plane
    assert (dataset.test.images[0].flatten(1) == torch.tensor([[15], [25], [35]])).all()


def test_a_bad_cifar_file_is_named(cifar_dir):
    path = cifar_dir / "data_batch_3.bin"
    content = path.read_bytes()
    for wrong, message in (
        (content[:-1], "records of 3073 bytes, got 6145 bytes"),
        (b"", "got 0 bytes"),
        (b"\x0a" + content[1:], "must hold labels 0 to 9, got 10"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=f"data_batch_3.bin must hold .*{message.removeprefix('must hold ')}"):
            data.load(cifar_dir)
    path.unlink()
    with pytest.raises(DataError, match=r"has no file data_batch_3.bin"):
        data.load(cifar_dir)


# Folders of images


def make_images(folder: Path, count: int, colour, size=(6, 5), mode="RGB") -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new(mode, size, colour).save(folder / f"{k}.png")


def test_a_folder_of_images_is_split_and_classes_have_its_names(tmp_path):
    make_images(tmp_path / "cat", 10, (255, 0, 51))
    make_images(tmp_path / "ant", 10, (0, 0, 0))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    dataset = data.load(tmp_path)
    assert (dataset.class_names, dataset.image_shape) == (("ant", "cat"), (3, 5, 6))
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    cat = dataset.test.labels.tolist().index(1)
    assert dataset.test.images[cat, :, 2, 3].tolist() == [255, 0, 51]


def test_a_folder_with_train_and_test_and_other_sizes(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        make_images(tmp_path / split / "a", count, 10, mode="L")
        make_images(tmp_path / split / "b", count, 20, size=(9, 9), mode="L")
    with pytest.raises(DataError, match=r"b/0.png has 9 x 9 pixels, .*a/0.png 5 x 6: give image_size \(--image-"):
        data.load(tmp_path)
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"hidden, of a file system")
    dataset = data.load(tmp_path, image_size=7)
    assert dataset.image_shape == (1, 7, 7)  # grey stays grey
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.images[:, 0, 3, 3].tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_for_validation_is_read_as_that(tmp_path, name):
    for split, colour in (("train", 1), (name, 2), ("test", 3)):
        for label in ("a", "b"):
            make_images(tmp_path / split / label, 2, colour, mode="L")
    dataset = data.load(tmp_path)
    assert [int(x.images.unique()) for x in (dataset.train, dataset.test, dataset.validation)] == [1, 3, 2]
    assert dataset.validation.labels.tolist() == [0, 0, 1, 1]
    assert dataset._replace(validation=None).checksum() != dataset.checksum()
    make_images(tmp_path / name / "c", 1, 2, mode="L")
    with pytest.raises(DataError, match=f"train and .*{name} must have the same classes, only one has c"):
        data.load(tmp_path)


@pytest.mark.parametrize(("colour", "channels"), [((70, 70, 70), 1), ((70, 70, 71), 3)])
def test_a_palette_decides_whether_an_image_is_grey(tmp_path, colour, channels):
    from PIL import Image

    for name in ("a", "b"):
        make_images(tmp_path / name, 5, 70, mode="L")
    image = Image.new("P", (6, 5), 3)
    image.putpalette([*bytes(9), *colour])
    image.save(tmp_path / "b" / "palette.png")
    dataset = data.load(tmp_path)
    assert dataset.image_shape == (channels, 5, 6)
    values = torch.cat([dataset.train.images, dataset.test.images]).unique().tolist()
    assert values == ([70] if channels == 1 else [70, 71])


def test_what_would_be_lost_of_a_folder_is_an_error(tmp_path):
    for name in ("a", "b"):
        make_images(tmp_path / name, 5, (9, 8, 7, 255), mode="RGBA")  # opaque
    assert data.load(tmp_path).train.images.unique().tolist() == [7, 8, 9]
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "0.JFIF")
    assert len(data.load(tmp_path).train) == 8
    make_images(tmp_path / "b", 1, (0, 0, 0, 254), mode="RGBA")
    with pytest.raises(DataError, match=r"b/0.png has transparent pixels: put it on a background first"):
        data.load(tmp_path)
    make_images(tmp_path / "b" / "more", 1, (0, 0, 0))
    with pytest.raises(DataError, match=r"b, the folder of a class, must hold no folders, got more"):
        data.load(tmp_path)


def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_images(tmp_path / name, 5, 0, mode="L")
    monkeypatch.setattr("PIL.Image.Image.convert", lambda *_: len(1.5))
    with pytest.raises(DataError, match=r"a/0.png cannot be read as an image: object of type 'float' has no len"):
        data.load(tmp_path)


def test_images_of_one_size_are_not_resized():
    assert data.load(image_size=8).image_shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"^image_size .* images of folders only, but the digits are 8 x 8, got 16"):
        data.load(image_size=16)


@pytest.mark.parametrize("size", [0, -1, 1.5, "16", True])
def test_a_size_of_images_is_checked(size):
    with pytest.raises(DataError, match=f"^image_size must be a whole number of at least 1, got {size!r}$"):
        data.load(image_size=size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: (d / "train" / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno"),
            "a/0.png cannot be read as",
        ),
        (lambda d: make_images(d / "train" / "a", 1, 3000, mode="I;16"), "a/0.png must have 8 bits a channel"),
        (lambda d: (d / "train" / "c").mkdir(), r"train/c, the folder of a class, holds no images \(.bmp, .* .webp\)"),
        (lambda d: [shutil.rmtree(d / "train" / name) for name in ("a", "b")], "train must .* each class, got none$"),
        (lambda d: [shutil.rmtree(d / split / "b") for split in ("train", "test")], "train must .* each class, got a$"),
        (lambda d: [shutil.copytree(d / "test", d / name) for name in ("val", "valid")], "validation, got val, valid$"),
        (lambda d: make_images(d / "test" / "c", 1, 0), "must have the same classes, only one has c"),
        (lambda d: (d / "test").rename(d / "exam"), "must have both of the folders train and test, got train alone"),
        (lambda d: (d / "train").rename(d / "exam"), "must have both of the folders train and test, got test alone"),
    ],
)
def test_a_bad_image_folder_is_named(tmp_path, spoil, message):
    for split in ("train", "test"):
        make_images(tmp_path / split / "a", 1, 0)
        make_images(tmp_path / split / "b", 1, 0)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path)
