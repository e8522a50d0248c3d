"""The images of a data set, split into train and validation.

Plain numpy arrays, so that a data set is loaded once and sent to every worker.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grid.config import InputError
from grid.data.catalogue import VALIDATION_DIVISOR, check_per_class, find_dataset
from grid.data.dataset import Dataset, Images, Labelled, Labels

Indices = NDArray[np.int64]


def load(
    name: str, data_dir: Path, *, per_class: int | None = None, split_seed: int = 0, refit: bool = False
) -> Dataset:
    """Load train and validation, both from the train file; download or render the files if they are missing.

    Args:
        name: As for `grid.data.catalogue.find_dataset`.
        data_dir: Folder that holds, or is to hold, the files.
        per_class: Train images per class, a balanced subset that any larger one contains; `None` for all.
        split_seed: Seed of the choice of validation and of the subset, at least 0.
        refit: Whether most validation images are to be trained on as well; see `split_indices`.

    Raises:
        InputError: Unknown name, a setting out of range, or files that are damaged or can't be obtained.
    """
    spec = find_dataset(name, data_dir)
    check_per_class(per_class)
    if split_seed < 0:
        raise InputError(f"the split seed must be at least 0, not {split_seed}")
    read: Labelled = spec.read(name, data_dir, "train")
    images, labels, classes = read.images, read.labels, read.classes
    stratified = not spec.equal_validation
    train, val = split_indices(
        labels, len(classes), per_class=per_class, split_seed=split_seed, stratified=stratified, refit=refit
    )
    arrays = images[train], labels[train], images[val], labels[val]
    return Dataset(name, classes, *arrays, fingerprint=_fingerprint(name, classes, arrays))


def is_on_disk(name: str, data_dir: Path) -> bool:
    """Return whether the train files are on disk; those of users always count as such."""
    is_there = find_dataset(name, data_dir).is_there
    return is_there is None or bool(is_there(name, data_dir))


def load_test(name: str, data_dir: Path, like: Dataset | None = None) -> tuple[Images, Labels]:
    """Load the test set. Only `grid.confirm` may call this: no choice may depend on the test set.

    Args:
        name: As for `load`.
        data_dir: As for `load`.
        like: The train and validation images that it goes with, to be compared with it.

    Returns:
        Images as in `Dataset`, and labels from 0, int64 `[image]`.

    Raises:
        InputError: Unknown name, or files that are damaged or can't be obtained.
    """
    read: Labelled = find_dataset(name, data_dir).read(name, data_dir, "test")
    if like is not None and read.images.shape[1:] != like.train_images.shape[1:]:
        shapes = f"{read.images.shape[1:]}, the train images {like.train_images.shape[1:]}"
        raise InputError(f"the test images of '{name}' are of shape {shapes}; bring them to one size and colour")
    if like is not None and read.labels.max() >= len(like.classes):
        problem = f"label {read.labels.max()}, and train has {len(like.classes)} classes"
        raise InputError(f"the test images of '{name}' have {problem}; leave out classes that train lacks")
    return read.images, read.labels


def split_indices(
    labels: Labels,
    class_count: int,
    *,
    per_class: int | None = None,
    split_seed: int = 0,
    stratified: bool = False,
    refit: bool = False,
) -> tuple[Indices, Indices]:
    """Draw validation, then train, so that validation is the same for every `per_class`.

    Args:
        labels: Classes of the images in the train file, `[image]`, from 0.
        class_count: Number of classes.
        per_class: Train images per class; `None` for all that validation leaves.
        split_seed: Seed of the draw, at least 0.
        stratified: Whether validation holds a sixth of every class, so that it has the shares that a test set has;
            otherwise as many of every class as a sixth of the smallest.
        refit: Whether five of six validation images are moved to train, for nets between which nothing is chosen.

    Returns:
        Positions in `labels` of train and of validation, both increasing.

    Raises:
        InputError: `per_class` is out of range, or a class is too small to be split.
    """
    sizes = np.bincount(labels, minlength=class_count)
    smallest = int(sizes.min())
    if smallest < VALIDATION_DIVISOR:
        raise InputError(f"each class needs {VALIDATION_DIVISOR} train images or more; the smallest has {smallest}")
    held_out = (sizes if stratified else np.full(class_count, smallest)) // VALIDATION_DIVISOR
    check_per_class(per_class, largest=smallest - smallest // VALIDATION_DIVISOR)
    still_out = np.maximum(1, held_out // VALIDATION_DIVISOR) if refit else held_out
    rng = np.random.default_rng(split_seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(class_count)]
    train = np.concatenate(
        [
            positions[out : None if per_class is None else held + per_class]
            for positions, out, held in zip(shuffled, still_out, held_out, strict=True)
        ]
    )
    val = np.concatenate([positions[:out] for positions, out in zip(shuffled, still_out, strict=True)])
    return np.sort(train), np.sort(val)


def _fingerprint(name: str, classes: tuple[str, ...], arrays: Iterable[NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(repr((name, classes)).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
