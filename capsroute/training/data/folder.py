"""Folders of images: one folder a class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..._optional import optional
from .dataset import DataError, Dataset, Split, hold_out, make_dataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
GREY_MODES = {"1", "L", "LA"}  # of Pillow
PALETTE_MODES = {"P", "PA"}  # grey or not: the palette decides
DEEP_MODES = ("I", "F")  # "I;16" too: Pillow would clip them to 8 bits
VALIDATION_FOLDERS = ("val", "valid", "validation")  # the test split where there is no folder test


def image_folder(data_dir: Path, image_size: int | None = None) -> Dataset:
    """`train/CLASS/IMAGE` and `test/CLASS/IMAGE` (or `val`, or both), or `CLASS/IMAGE`, split 80 to 20, stratified.

    Images are grey if all of them are, else red, green and blue.

    Args:
        data_dir: the directory.
        image_size: height and width that every image is resized to. None: they must have one size already.

    Raises:
        DataError: if there are no images, an image cannot be read, or sizes or classes differ.
    """
    train_dir = data_dir / "train"
    validation = [name for name in VALIDATION_FOLDERS if (data_dir / name).is_dir()]
    if len(validation) > 1:
        raise DataError(f"{data_dir} must have one folder for validation, got {', '.join(validation)}")
    judging = [data_dir / name for name in ("test", *validation) if (data_dir / name).is_dir()]
    if train_dir.is_dir() != bool(judging):
        alone = judging[0].name if judging else "train"
        raise DataError(f"{data_dir} must have both of the folders train and test, got {alone} alone")
    name = f"images:{data_dir.resolve().name}"
    if not judging:
        class_names, files = _list(data_dir)
        whole = Split(_read(list(files), image_size), torch.tensor(list(files.values()), device="cpu"))
        return make_dataset(name, *hold_out(whole, 0.2), class_names)
    class_names, train = _list(train_dir)
    folders = [train]
    for folder in judging:
        names, files = _list(folder)
        if class_names != names:
            odd = sorted(set(class_names) ^ set(names))
            raise DataError(f"{train_dir} and {folder} must have the same classes, only one has {', '.join(odd)}")
        folders.append(files)
    images = _read([path for files in folders for path in files], image_size)  # together: all grey or all in colour
    counts = [len(files) for files in folders]
    labels = [torch.tensor(list(files.values()), device="cpu") for files in folders]
    splits = map(Split, images.split(counts), labels)
    return make_dataset(name, next(splits), next(splits), class_names, next(splits, None))


def _list(folder: Path) -> tuple[list[str], dict[Path, int]]:
    """The classes of a folder in the order of their names, and the label of each image file."""
    class_names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {
        path: label
        for label, name in enumerate(class_names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }
    kinds, found = ", ".join(sorted(SUFFIXES)), set(files.values())
    for label, name in enumerate(class_names):
        if label not in found:
            raise DataError(f"{folder / name}, the folder of a class, holds no images ({kinds})")
        inner = [path.name for path in (folder / name).iterdir() if path.is_dir() and not path.name.startswith(".")]
        if inner:
            raise DataError(
                f"{folder / name}, the folder of a class, must hold no folders, got {', '.join(sorted(inner))}"
            )
    if len(class_names) < 2:
        raise DataError(f"{folder} must hold a folder of images for each class, got {' '.join(class_names) or 'none'}")
    return class_names, files


def _read(paths: list[Path], image_size: int | None) -> Tensor:
    """Images [N, C, H, W], uint8."""
    pil = optional("PIL.Image")
    numpy = optional("numpy")

    def is_grey(file) -> bool:
        if file.mode in PALETTE_MODES:
            pixels = numpy.array(file.convert("RGB"))
            return bool((pixels == pixels[..., :1]).all())
        return file.mode in GREY_MODES

    opened = []
    for path in paths:
        try:
            with pil.open(path) as file:
                if file.mode.startswith(DEEP_MODES):
                    raise DataError(f"{path} must have 8 bits a channel, got Pillow's mode {file.mode}")
                if file.has_transparency_data and file.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                    raise DataError(f"{path} has transparent pixels: put it on a background first")
                image = file.convert("L" if is_grey(file) else "RGB")
        except DataError:
            raise
        except Exception as error:  # Pillow has no end of them for broken files
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        opened.append(image.resize((image_size, image_size)) if image_size else image)
        if opened[-1].size != opened[0].size:
            (w, h), (w0, h0) = opened[-1].size, opened[0].size
            wanted = "give image_size (--image-size) to resize them"
            raise DataError(f"{path} has {h} x {w} pixels, {paths[0]} {h0} x {w0}: {wanted}")
    mode = "L" if all(image.mode == "L" for image in opened) else "RGB"
    pixels = torch.stack([torch.from_numpy(numpy.array(image.convert(mode))) for image in opened])
    return pixels.unsqueeze(1) if mode == "L" else pixels.permute(0, 3, 1, 2).contiguous()
