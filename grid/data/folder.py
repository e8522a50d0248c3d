"""A folder of images as torchvision reads it: `train/<class>/*.png` and `test/<class>/*.png`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from grid.config import InputError
from grid.data.arrays import check_arrays
from grid.data.dataset import Images, Labelled, Split

PARTS: tuple[Split, ...] = ("train", "test")
GREY, COLOUR = ("1", "L"), ("RGB", "P")
"""Modes of Pillow that are read as one channel, and as red, green and blue."""
TRANSPARENT, OPAQUE = ("LA", "RGBA", "PA", "P"), 255
"""Modes that may have a channel of transparency, and its value where nothing shines through."""


def read_folder(name: str, data_dir: Path, part: Split) -> Labelled:
    """Read one part of the folder `<data_dir>/<name>`; the classes are those of `train`, sorted by name.

    Raises:
        InputError: A file can't be read, or the images differ in size.
    """
    folder = data_dir / name
    if missing := [each for each in PARTS if not (folder / each).is_dir()]:
        raise InputError(f"{folder} has no folder {missing[0]}; put the images into train/CLASS and test/CLASS")
    try:
        classes = _classes(folder / "train")
        files = [(file, label) for label, each in enumerate(classes) for file in _files(folder / part / each)]
        if unknown := sorted(set(_classes(folder / "test")) - set(classes)):
            raise InputError(f"{folder / 'test'}: class '{unknown[0]}' is not in {folder / 'train'}; add or remove it")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from error
    if not files:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise InputError(f"{folder / part}: no images in the folders of the classes; put some there ({kinds})")
    labels = np.array([label for _, label in files], dtype=np.int64)
    return check_arrays(_read_images([file for file, _ in files]), labels, classes, str(folder / part), part)


def _classes(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """Return the images below the folder of a class, sorted, so that the order does not depend on the file system."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())


def _read_images(files: Sequence[Path]) -> Images:
    """Return grey images `[image, row, column]` if all files are, otherwise `[image, channel, row, column]`."""
    pictures = [_read_image(file) for file in files]
    grey = all(picture.ndim == 2 for picture in pictures)
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            (height, width), (other_height, other_width) = picture.shape[:2], pictures[0].shape[:2]
            raise InputError(
                f"{file}: {width}x{height} pixels, and {files[0]} has {other_width}x{other_height}; "
                "bring all images to one size"
            )
    if grey:
        return np.stack(pictures)
    coloured = [picture if picture.ndim == 3 else picture[..., None].repeat(3, 2) for picture in pictures]
    return np.stack(coloured).transpose(0, 3, 1, 2)


def _read_image(file: Path) -> Images:
    """Return an image, `[row, column]` or `[row, column, channel]`."""
    try:
        with Image.open(file) as image:
            mode = image.mode
            opaque = mode in (*GREY, *COLOUR) and "transparency" not in image.info
            if opaque or (mode in TRANSPARENT and np.asarray(image.convert("RGBA"))[..., 3].min() == OPAQUE):
                return np.asarray(image.convert("L" if mode in (*GREY, "LA") else "RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise InputError(f"{file}: no image that can be read; delete it, or save it again") from error
    kind = "transparent" if mode in (*GREY, *COLOUR, *TRANSPARENT) else f"of mode {mode}"
    raise InputError(f"{file}: {kind}; save it in grey or colour, 8 bits for each, without transparency")
