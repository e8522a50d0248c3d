"""The images: EMNIST or glyphs from disk, checked, upright, and split into train and validation.

Plain numpy arrays, so that a data set is loaded once and sent to every worker. EMNIST is downloaded if it is missing.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data.catalogue import DATASETS, VALIDATION_SHARE, check_name, check_per_class
from grid.data.dataset import Dataset, Images, Labels
from grid.data.emnist import check_above, download, find_files, idx_files
from grid.data.glyphs import Glyphs, render_if_missing
from grid.data.idx import check_classes, check_labels, read_pair

Indices = NDArray[np.int64]


def load(name: str, data_dir: Path, *, per_class: int | None = None, split_seed: int = 0) -> Dataset:
    """Load train and validation, both from the train file; download or render the files if they are missing.

    Args:
        name: One of `NAMES`.
        data_dir: Folder that holds, or is to hold, `EMNIST/raw` or `Glyphs/raw`.
        per_class: Train images per class, a balanced subset that any larger one contains; `None` for all.
        split_seed: Seed of the choice of validation and of the subset, at least 0.

    Raises:
        InputError: Unknown name, a setting out of range, or files that are damaged or can't be obtained.
    """
    check_name(name)
    check_per_class(per_class)
    if split_seed < 0:
        raise InputError(f"the split seed must be at least 0, not {split_seed}")
    images, labels = _read(name, data_dir, "train")
    classes = _classes(name)
    train, val = split_indices(labels, len(classes), per_class=per_class, split_seed=split_seed)
    arrays = images[train], labels[train], images[val], labels[val]
    return Dataset(name, classes, *arrays, fingerprint=_fingerprint(name, classes, arrays))


def is_on_disk(name: str, data_dir: Path) -> bool:
    """Return whether the train files are on disk."""
    split = DATASETS[name].split
    if name == "glyphs":
        return all(path.is_file() for path in idx_files(data_dir / "Glyphs" / "raw", split, "train"))
    return find_files(data_dir, split, "train") is not None


def load_test(name: str, data_dir: Path) -> tuple[Images, Labels]:
    """Load the test set. Only `grid.confirm` may call this: no choice may depend on the test set.

    Returns:
        Upright images, uint8 `[image, 28, 28]`, and labels from 0, int64 `[image]`.

    Raises:
        InputError: Unknown name, or files that are damaged or can't be obtained.
    """
    check_name(name)
    return _read(name, data_dir, "test")


def split_indices(
    labels: Labels, class_count: int, *, per_class: int | None = None, split_seed: int = 0
) -> tuple[Indices, Indices]:
    """Draw validation, then train, so that validation is the same for every `per_class`.

    Args:
        labels: Classes of the images in the train file, `[image]`, from 0.
        class_count: Number of classes.
        per_class: Train images per class; `None` for all that validation leaves.
        split_seed: Seed of the draw, at least 0.

    Returns:
        Positions in `labels` of train and of validation, both increasing; validation holds a sixth of the smallest
        class from every class.

    Raises:
        InputError: `per_class` is out of range, or a class is too small to be split.
    """
    smallest = int(np.bincount(labels, minlength=class_count).min())
    if smallest < VALIDATION_SHARE:
        raise InputError(f"each class needs {VALIDATION_SHARE} train images or more; the smallest has {smallest}")
    held_out = smallest // VALIDATION_SHARE
    check_per_class(per_class, largest=smallest - held_out)
    rng = np.random.default_rng(split_seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(class_count)]
    end = None if per_class is None else held_out + per_class
    train = np.sort(np.concatenate([positions[held_out:end] for positions in shuffled]))
    return train, np.sort(np.concatenate([positions[:held_out] for positions in shuffled]))


def _classes(name: str) -> tuple[str, ...]:
    """Return the class names, without the empty class that torchvision's list for Letters begins with."""
    source = _source(name)
    return tuple(label for label in source.classes_split_dict[DATASETS[name].split] if label != "N/A")


def _source(name: str) -> type[EMNIST]:
    return Glyphs if name == "glyphs" else EMNIST


def _fingerprint(name: str, classes: tuple[str, ...], arrays: Iterable[NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(repr((name, classes)).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read(name: str, data_dir: Path, part: str) -> tuple[Images, Labels]:
    """Return the upright images and the labels of the `train` or the `test` file."""
    images_file, labels_file = _files(name, data_dir, part)
    images, labels = read_pair(images_file, labels_file)
    labels -= 1 if name == "emnist-letters" else 0
    classes = _classes(name)
    check_labels(labels, len(classes), labels_file)
    if part == "train":
        check_classes(labels, classes, VALIDATION_SHARE, labels_file)
    return np.ascontiguousarray(images.transpose(0, 2, 1)), labels


def _files(name: str, data_dir: Path, part: str) -> tuple[Path, Path]:
    """Return the images and the labels of one part, downloaded or rendered if they are missing."""
    split = DATASETS[name].split
    if name == "glyphs":
        return idx_files(render_if_missing(data_dir), split, part)
    found = find_files(data_dir, split, part)
    if found is None:
        check_above(data_dir, split, part)
        download(data_dir, split, part)
        found = idx_files(data_dir / "EMNIST" / "raw", split, part)
    return found
