"""Images as arrays: from an `.npz` file or a function of a parts file, checked before anything is trained on them."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grid.config import InputError
from grid.data.dataset import Labelled, Split, check_sizes
from grid.data.idx import describe_start
from grid.wording import first_line

KEYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
"""Split -> the names, each of images and labels, that a file may have for it; the second are those of Keras."""
CLASSES_KEY = "classes"
CLASSES = range(2, 1001)
CHANNELS = range(1, 17)
WANTED = "uint8 [image, row, column] or [image, channel, row, column]"


def read_npz(name: str, data_dir: Path, part: Split) -> Labelled:
    """Read one part of `<data_dir>/<name>`, an `.npz` file.

    Raises:
        InputError: It is none, lacks an array, or an array is of another type or shape.
    """
    path = data_dir / name
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as other:
                raise InputError(
                    f"{path}: {describe_start(other.read(40))}, not an .npz file; save one with numpy.savez"
                )
        with np.load(path, allow_pickle=False) as file:
            images, labels = _pick(path, file, part)
            known = file[CLASSES_KEY].astype(str).tolist() if CLASSES_KEY in file else None
            classes = _numbered(known, labels if part == "train" else _pick(path, file, "train")[1])
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); pass another file") from error
    except InputError:
        raise
    except (ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(
            f"{path}: not an .npz file of numbers ({first_line(error)}); save one with numpy.savez"
        ) from error
    return check_arrays(images, labels, classes, str(path), part)


def call(function: Any, name: str, data_dir: Path, part: Split) -> Labelled:
    """Return one part of what the function of a parts file loads; see `grid.parts.data`.

    Raises:
        InputError: The function fails, or returns something else.
    """
    where = f"data set '{name}'"
    try:
        loaded = tuple(function(data_dir))
        arrays = [np.asarray(each) for each in loaded[:4]]
        classes = None if len(loaded) < 5 or loaded[4] is None else list(map(str, loaded[4]))
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{where} can't be loaded: {type(error).__name__}: {first_line(error)}") from error
    if len(loaded) not in (4, 5):
        raise InputError(
            f"{where} must return train images, train labels, test images, test labels and, if you like, the names of "
            f"its classes; got {len(loaded)} values"
        )
    images, labels = arrays[:2] if part == "train" else arrays[2:]
    return check_arrays(images, labels, _numbered(classes, arrays[1]), f"{where} ({part})", part)


def check_arrays(
    images: NDArray[Any], labels: NDArray[Any], classes: Sequence[str] | None, where: str, part: Split
) -> Labelled:
    """Return images and labels after a check.

    Args:
        images: To be uint8, grey or of several channels.
        labels: To be whole numbers from 0.
        classes: Names of the classes; None for the numbers that occur.
        where: Names the source in errors.
        part: `train` needs enough images of every class.

    Raises:
        InputError: Something is of another type or shape, or does not match.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(f"{where}: images are {images.dtype} of shape {images.shape}; make them {WANTED}")
    if images.ndim == 4 and images.shape[1] not in CHANNELS:
        hint = "move the channels to the second axis: images.transpose(0, 3, 1, 2)"
        raise InputError(f"{where}: images are of shape {images.shape}, with {images.shape[1]} channels; {hint}")
    if labels.shape != (len(images),):
        raise InputError(f"{where}: labels are of shape {labels.shape} for {len(images):,} images; give one per image")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where}: labels are {labels.dtype}, not whole numbers; number the classes from 0")
    if not len(images):
        raise InputError(f"{where}: no images")
    if labels.min() >= 1 and part == "train":
        found = f"labels run from {labels.min()} to {labels.max()}"
        raise InputError(f"{where}: {found}; number the classes from 0, as labels - {labels.min()} does")
    names = _numbered(classes, labels)
    if len(names) not in CLASSES:
        raise InputError(f"{where}: {len(names):,} classes; 2 to {CLASSES[-1]:,} are possible")
    if len(set(names)) < len(names):
        raise InputError(f"{where}: two classes have the same name; name each differently")
    if not 0 <= labels.min() <= labels.max() < len(names):
        found = f"labels run from {labels.min()} to {labels.max()}"
        raise InputError(f"{where}: {found} for {len(names)} classes; number the classes from 0 to {len(names) - 1}")
    known = labels.astype(np.int64)
    if part == "train":
        check_sizes(known, names, where, "add images, or leave the class out and number the others from 0")
    return Labelled(np.ascontiguousarray(images), known, tuple(names))


def _numbered(classes: Sequence[str] | None, labels: NDArray[Any]) -> list[str]:
    if classes is not None or labels.dtype.kind not in "iu" or not labels.size:
        return list(classes or ())
    return [str(label) for label in range(max(0, min(int(labels.max()), CLASSES[-1])) + 1)]


def _pick(path: Path, file: Any, part: Split) -> tuple[NDArray[Any], NDArray[Any]]:
    for images, labels in KEYS[part]:
        if images in file and labels in file:
            return file[images], file[labels]
    wanted = " or ".join(" and ".join(names) for names in KEYS[part])
    raise InputError(f"{path}: has {', '.join(sorted(file)) or 'no arrays'}; save {wanted} in it")
