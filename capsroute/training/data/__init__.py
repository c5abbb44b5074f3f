"""Images to train on: scikit-learn's digits, IDX files (MNIST), CIFAR-10's binary files, folders of images."""

from __future__ import annotations

from pathlib import Path

from .cifar import cifar10, has_cifar10
from .dataset import DataError, Dataset, Split, hold_out, make_dataset
from .digits import digits
from .folder import image_folder
from .idx import has_idx_files, idx_files, read_idx

__all__ = [
    "DataError",
    "Dataset",
    "Split",
    "cifar10",
    "digits",
    "hold_out",
    "idx_files",
    "image_folder",
    "load",
    "make_dataset",
    "read_idx",
    "resizes",
]

READERS = (has_idx_files, idx_files), (has_cifar10, cifar10)


def load(data_dir: str | Path | None = None, image_size: int | None = None) -> Dataset:
    """What a directory holds: IDX files, CIFAR-10's binary files, or folders of images; None: the digits.

    Args:
        data_dir: the directory.
        image_size: for folders of images: the height and width to resize to.

    Raises:
        DataError: if it holds none of these, or one that is broken; if the size is none.
    """
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise DataError(f"image_size must be a whole number of at least 1, got {image_size!r}")
    if data_dir is None:
        return _of_one_size("the digits", digits(), image_size)
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir} is not a directory")
    for found, read in READERS:
        if found(data_dir):
            return _of_one_size(data_dir, read(data_dir), image_size)
    if any(path.is_dir() for path in data_dir.iterdir()):
        return image_folder(data_dir, image_size)
    raise DataError(
        f"{data_dir} holds neither IDX files (train-images-idx3-ubyte ...), nor CIFAR-10's binary files "
        "(data_batch_1.bin ...), nor folders of images, one a class"
    )


def resizes(data_dir: str | Path | None) -> bool:
    """Whether images from there can be resized: those of folders, which need not have one size."""
    return data_dir is not None and not any(found(Path(data_dir)) for found, _ in READERS)


def _of_one_size(what: object, dataset: Dataset, image_size: int | None) -> Dataset:
    """A dataset whose images have one size, unless another is asked for."""
    own = dataset.image_shape[1:]
    if image_size and own != (image_size, image_size):
        raise DataError(
            f"image_size (--image-size) resizes images of folders only, but {what} are {own[0]} x {own[1]}, "
            f"got {image_size}"
        )
    return dataset
