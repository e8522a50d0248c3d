"""The data sets: a row for each, which says what reads it and how many images were published.

Standard library only, so that a wrong name is refused, and a run forecast, at once and without data.
"""

from dataclasses import dataclass
from pathlib import Path

from grid.config import InputError
from grid.parts.registry import DATASETS, Code, DataSource

VALIDATION_DIVISOR = 6
"""Validation takes a sixth of each class."""


@dataclass(frozen=True)
class Sizes:
    """Published facts about one data set.

    Reference: Cohen et al. 2017, EMNIST: an extension of MNIST to handwritten letters, https://arxiv.org/abs/1702.05373
    """

    train_size: int
    """Images in the train file, before validation is cut from it."""
    test_size: int
    class_count: int
    balanced: bool = True
    """Whether all classes have the same size."""

    @property
    def largest_per_class(self) -> int | None:
        """Training images per class that validation leaves; None if the class sizes are unknown (unbalanced)."""
        class_size = self.train_size // self.class_count
        return class_size - class_size // VALIDATION_DIVISOR if self.balanced else None

    def split_sizes(self, per_class: int | None = None) -> tuple[int, int]:
        """Forecast how many images `grid.data.load.load` will return.

        The class sizes of an unbalanced data set are unknown here: its validation counts as empty, which makes the
        forecast of train an upper bound.

        Args:
            per_class: Train images per class, at least 1; `None` for all.

        Returns:
            Images in train and in validation.
        """
        class_size = self.train_size // self.class_count
        val_size = class_size // VALIDATION_DIVISOR * self.class_count if self.balanced else 0
        train_size = self.train_size - val_size
        return (train_size if per_class is None else min(train_size, per_class * self.class_count)), val_size


def _add(name: str, source: str, sizes: Sizes, *, equal_validation: bool = False) -> None:
    """Add a data set that `read_<source>` and `has_<source>` in `grid.data.sources` read and look for."""
    read, is_there = (Code(f"grid.data.sources:{verb}_{source}") for verb in ("read", "has"))
    DATASETS[name] = DataSource(read, is_there, sizes, equal_validation=equal_validation)


# Letters: the sizes of the files that NIST distributes, 145,600 images in total. ByMerge and ByClass keep the
# validation that they have always had, as many images of every class, though their classes differ in size.
_add("emnist-balanced", "emnist", Sizes(112_800, 18_800, 47))
_add("emnist-bymerge", "emnist", Sizes(697_932, 116_323, 47, balanced=False), equal_validation=True)
_add("emnist-byclass", "emnist", Sizes(697_932, 116_323, 62, balanced=False), equal_validation=True)
_add("emnist-letters", "emnist", Sizes(124_800, 20_800, 26))
_add("emnist-digits", "emnist", Sizes(240_000, 40_000, 10))
_add("emnist-mnist", "emnist", Sizes(60_000, 10_000, 10))
_add("mnist", "mnist_like", Sizes(60_000, 10_000, 10, balanced=False))
_add("fashion-mnist", "mnist_like", Sizes(60_000, 10_000, 10))
_add("kmnist", "mnist_like", Sizes(60_000, 10_000, 10))
_add("glyphs", "glyphs", Sizes(14_100, 2_820, 47))

NAMES: tuple[str, ...] = tuple(DATASETS)
"""Of the built-in data sets."""
NPZ = ".npz"


def find_dataset(name: str, data_dir: Path) -> DataSource:
    """Return the row of a data set or, for an `.npz` file or a folder of images in the data folder, one made for it.

    Raises:
        InputError: There is no such data set.
    """
    if name in DATASETS:
        return DATASETS[name]
    path = data_dir / name
    if name.endswith(NPZ):
        if not path.is_file():
            raise InputError(f"there is no file {path}; pass another --data or --data-dir")
        return DataSource(Code("grid.data.arrays:read_npz"))
    if name not in ("", ".", "..") and path.is_dir():
        return DataSource(Code("grid.data.folder:read_folder"))
    choices = f"choose from {', '.join(DATASETS)}, a file.npz, or a folder with train/CLASS and test/CLASS"
    raise InputError(f"unknown data set '{name}'; {choices}, or add it with --parts FILE.py")


def locate(data: str, data_dir: Path) -> tuple[str, Path]:
    """Return the name of a data set and the folder that it is in, given what a user calls it.

    A file or a folder may be given by its path, from here or from the data folder.

    Raises:
        InputError: It has the name of another data set.
    """
    if data in DATASETS:
        return data, data_dir
    found = next((path.absolute() for path in (Path(data), data_dir / data) if path.exists()), data_dir / data)
    if found.name in DATASETS:
        raise InputError(f"--data {data} has the name of the data set {found.name}; rename the file or folder")
    return found.name, found.parent


def check_per_class(per_class: int | None, *, largest: int | None = None) -> None:
    """Raise `InputError` unless `per_class` is allowed.

    Args:
        per_class: Train images per class; `None` for all is always allowed.
        largest: The most that the data contain; `None` before they are read.
    """
    if per_class is None or (per_class >= 1 and (largest is None or per_class <= largest)):
        return
    allowed = "at least 1" if largest is None else f"1 to {largest}, what validation leaves of the smallest class"
    raise InputError(f"--per-class must be {allowed}, or all; got {per_class}")
