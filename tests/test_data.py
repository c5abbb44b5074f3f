"""capsroute.training.data, augment, overlap, batches: what a network is trained on and tested on."""

import gzip
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from capsroute.training import data, overlap
from capsroute.training.augment import Augmentation, warp
from capsroute.training.batches import Share, evaluation_batches, steps_per_epoch, training_batches
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
    with pytest.raises(DataError, match=r"0\.1 of 20 images cannot be held out"):
        hold_out(digits.train[:20], 0.1)


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
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(2, 5, 6)), r"\[1, 5, 7\] for training, \[1, 5, 6\] for"),
        ("more-train-images-idx3-ubyte", idx(6, 5, 7), "must hold one data set, got more-train-images"),
    ],
)
def test_a_bad_idx_file_is_named(mnist_dir, name, content, message):
    (mnist_dir / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load(mnist_dir)
    assert mnist_dir.name in str(error.value)


def test_a_gzip_file_with_broken_values_is_named(mnist_dir):
    path = mnist_dir / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is no whole gzip file"):
        data.load(mnist_dir)


def test_missing_files_are_named(mnist_dir, tmp_path_factory):
    (mnist_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no file t10k-labels-idx1-ubyte or t10k"):
        data.load(mnist_dir)
    with pytest.raises(DataError, match="holds neither IDX files"):
        data.load(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="none is no directory"):
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
    with pytest.raises(DataError, match=r"b/0.png has 9 x 9 pixels, .*a/0.png 5 x 6: say what to resize to"):
        data.load(tmp_path)
    dataset = data.load(tmp_path, image_size=7)
    assert dataset.image_shape == (1, 7, 7)  # grey stays grey
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.images[:, 0, 3, 3].tolist() == [10, 10, 20, 20]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "train" / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno"), "a/0.png is no image that can"),
        (lambda d: make_images(d / "train" / "a", 1, 3000, mode="I;16"), "a/0.png must have 8 bits a channel"),
        (lambda d: (d / "train" / "c").mkdir(), "train/c holds no images"),
        (lambda d: make_images(d / "test" / "c", 1, 0), "must have the same classes, only one has c"),
        (lambda d: (d / "test").rename(d / "exam"), "must have folders train and test, or none of them"),
    ],
)
def test_a_bad_image_folder_is_named(tmp_path, spoil, message):
    for split in ("train", "test"):
        make_images(tmp_path / split / "a", 1, 0)
        make_images(tmp_path / split / "b", 1, 0)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path)


# Augmentation


def dot_at(y: int, x: int, height: int = 9, width: int = 9) -> torch.Tensor:
    image = torch.zeros(1, 1, height, width)
    image[..., y, x] = 1
    return image


def draw(count: int = 200, **most) -> torch.Tensor:
    return Augmentation(**{"shift": 0.0, **most}).draw(count, torch.Generator().manual_seed(0))


def test_no_augmentation_changes_nothing():
    images = torch.rand(200, 3, 5, 8)
    torch.testing.assert_close(warp(images, draw()), images)


def test_shifts_move_images_by_at_most_the_fraction():
    moved = warp(dot_at(4, 4).expand(200, -1, -1, -1), draw(shift=1 / 9))  # one pixel
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(200))  # nothing is lost inside the image
    place = torch.arange(9.0)
    for marginal in (moved.sum((1, 2)), moved.sum((1, 3))):  # over y, over x
        offset = (marginal * place).sum(1) - 4
        assert offset.abs().max() <= 1 + 1e-5
        assert offset.min() < -0.8
        assert offset.max() > 0.8


def centre(images: torch.Tensor) -> torch.Tensor:
    """Where the mass of each image lies, (y, x) from its middle."""
    height, width = images.shape[2:]
    mass = images.sum((1, 2, 3))
    y = (images.sum((1, 3)) * (torch.arange(height) - (height - 1) / 2)).sum(1) / mass
    x = (images.sum((1, 2)) * (torch.arange(width) - (width - 1) / 2)).sum(1) / mass
    return torch.stack([y, x], 1)


def test_rotations_keep_distances_also_where_an_image_is_not_square():
    moved = centre(warp(dot_at(10, 14, 21, 29).expand(200, -1, -1, -1), draw(rotation=90)))
    image = centre(dot_at(10, 14, 21, 29))
    torch.testing.assert_close(moved, image.expand(200, -1), rtol=0, atol=1e-4)  # the centre stays
    moved = centre(warp(dot_at(10, 22, 21, 29).expand(200, -1, -1, -1), draw(rotation=90)))  # 8 to the right of it
    torch.testing.assert_close(moved.norm(dim=1), torch.full((200,), 8.0), rtol=0, atol=0.1)
    angle = torch.atan2(*moved.unbind(1)).rad2deg()
    assert -91 < angle.min() < -75
    assert 75 < angle.max() < 91


def test_zooms_and_shears_go_as_far_as_they_may():
    eight_right = dot_at(10, 18, 21, 21).expand(200, -1, -1, -1)
    distance = centre(warp(eight_right, draw(scale=0.2))).norm(dim=1)
    assert 8 / 1.2 - 0.1 < distance.min() < 7
    assert 9.2 < distance.max() < 8 * 1.2 + 0.1
    below = centre(warp(dot_at(18, 10, 21, 21).expand(200, -1, -1, -1), draw(shear=45)))
    torch.testing.assert_close(below[:, 0], torch.full((200,), 8.0), rtol=0, atol=0.1)
    assert -8.1 < below[:, 1].min() < -7
    assert 7 < below[:, 1].max() < 8.1


# Overlapping digits


def test_the_canvas_is_the_papers_for_mnist():
    assert overlap.canvas((1, 28, 28)) == (1, 36, 36)
    assert overlap.canvas((1, 8, 8)) == (1, 10, 10)


def test_partners_are_of_another_class_and_all_images_serve():
    labels = torch.arange(40) % 4
    of = torch.arange(40).repeat(50)
    partners = overlap.draw_partners(labels, of, torch.Generator().manual_seed(0))
    assert (labels[partners] != labels[of]).all()
    assert partners.unique().tolist() == list(range(40))
    with pytest.raises(ValueError, match="at least two classes"):
        overlap.draw_partners(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.Generator())


def test_digits_are_moved_whole_as_far_as_the_canvas_goes():
    images = torch.rand(500, 2, 8, 7)
    moves = overlap.draw_moves(500, (2, 8, 7), torch.Generator().manual_seed(0))
    assert [moves[:, k].unique().tolist() for k in (0, 1)] == [[0, 1, 2], [0, 1, 2]]
    placed = overlap.place(images, moves)
    assert placed.shape == (500, 2, 10, 9)
    for image, (down, right), on_canvas in zip(images, moves.tolist(), placed, strict=True):
        assert torch.equal(on_canvas[:, down : down + 8, right : right + 7], image)
        assert on_canvas.sum() == pytest.approx(image.sum().item(), rel=1e-5)  # and nothing else


def test_parts_are_added_up_to_white():
    parts = torch.tensor([0.25, 0.5, 0.75, 1.0]).view(1, 2, 1, 1, 2)
    torch.testing.assert_close(overlap.lay_over(parts), torch.tensor([1.0, 1.0]).view(1, 1, 1, 2))
    torch.testing.assert_close(overlap.lay_over(parts / 4), torch.tensor([0.25, 0.375]).view(1, 1, 1, 2))


# Batches


@pytest.fixture
def split(digits) -> Split:
    return digits.train[:50]


STILL = Augmentation(shift=0.0)


def test_an_epoch_sees_every_image_once_in_another_order_each_time(split):
    def seen(**which):
        batches = list(training_batches(split, 16, STILL, **{"seed": 0, "epoch": 1, **which}))
        assert [len(batch.images) for batch in batches] == [16, 16, 16, 2]
        assert all(torch.equal(batch.images.unsqueeze(1), batch.parts) for batch in batches)
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])

    images, labels = seen()
    order = [int((split.images - image).abs().sum((1, 2, 3)).argmin()) for image in images]
    assert sorted(order) == list(range(50))
    assert torch.equal(labels.squeeze(1), split.labels[order])
    assert torch.equal(seen()[0], images)
    for other in ({"epoch": 2}, {"seed": 1}, {"seed": 1 << 31}):
        assert not torch.equal(seen(**other)[0], images), other


@pytest.mark.parametrize("overlapping", [False, True])
def test_processes_together_see_what_one_would(split, overlapping):
    def batches(share):
        options = {"seed": 3, "epoch": 2, "overlapping": overlapping, "share": share}
        return list(training_batches(split, 16, Augmentation(rotation=20), **options))

    for whole, *parts in zip(batches(Share()), *(batches(Share(rank, 3)) for rank in range(3)), strict=False):
        for name in ("images", "labels", "parts"):
            x = torch.empty_like(getattr(whole, name))
            for rank, part in enumerate(parts):
                x[rank::3] = getattr(part, name)
            torch.testing.assert_close(x, getattr(whole, name))
        assert {part.whole for part in parts} == {len(whole.images)}


def test_a_last_batch_of_fewer_images_than_processes_is_left_out(split):
    assert [steps_per_epoch(50, 16, count) for count in (1, 2, 3)] == [4, 4, 3]
    assert len(list(training_batches(split, 16, STILL, seed=0, epoch=1, share=Share(0, 3)))) == 3


def test_overlapping_test_pairs_are_the_same_always(split):
    def pairs(size: int) -> list[torch.Tensor]:
        batches = list(evaluation_batches(split, overlapping=True, batch_size=size))
        return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "parts")]

    first, again = pairs(7), pairs(50)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    images, labels, parts = first
    assert images.shape == (50, 1, 10, 10)
    assert (labels[:, 0] != labels[:, 1]).all()
    assert torch.equal(labels[:, 0], split.labels)  # every image is tested
    torch.testing.assert_close(parts.sum(1).clamp(max=1), images)
