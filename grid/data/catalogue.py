"""The data sets and their published sizes: all that is known before a file is read.

Standard library only, so that a wrong name is refused, and a run forecast, at once and without data.
"""

from dataclasses import dataclass

from grid.config import InputError

VALIDATION_SHARE = 6
"""Validation takes a sixth of the smallest class, and as many images of every other: 400 per class of Balanced."""


@dataclass(frozen=True)
class DatasetSpec:
    """Published facts about one data set.

    Reference: Cohen et al. 2017, EMNIST: an extension of MNIST to handwritten letters, https://arxiv.org/abs/1702.05373
    """

    split: str
    """Name of the split in torchvision and in the names of its files."""
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
        return class_size - class_size // VALIDATION_SHARE if self.balanced else None

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
        val_size = class_size // VALIDATION_SHARE * self.class_count if self.balanced else 0
        train_size = self.train_size - val_size
        return (train_size if per_class is None else min(train_size, per_class * self.class_count)), val_size


# Letters: the sizes of the files that NIST distributes, 145,600 images in total.
DATASETS: dict[str, DatasetSpec] = {
    "emnist-balanced": DatasetSpec("balanced", 112_800, 18_800, 47),
    "emnist-bymerge": DatasetSpec("bymerge", 697_932, 116_323, 47, balanced=False),
    "emnist-byclass": DatasetSpec("byclass", 697_932, 116_323, 62, balanced=False),
    "emnist-letters": DatasetSpec("letters", 124_800, 20_800, 26),
    "emnist-digits": DatasetSpec("digits", 240_000, 40_000, 10),
    "emnist-mnist": DatasetSpec("mnist", 60_000, 10_000, 10),
    "glyphs": DatasetSpec("glyphs", 14_100, 2_820, 47),
}

NAMES: tuple[str, ...] = tuple(DATASETS)


def check_name(name: str) -> None:
    """Raise `InputError` unless `name` is a data set."""
    if name not in DATASETS:
        raise InputError(f"unknown data set '{name}'; choose from {', '.join(NAMES)}")


def check_per_class(per_class: int | None, *, largest: int | None = None) -> None:
    """Raise `InputError` unless `per_class` is allowed.

    Args:
        per_class: Train images per class; `None` for all is always allowed.
        largest: The most that the data contain; `None` before they are read.
    """
    if per_class is None or (per_class >= 1 and (largest is None or per_class <= largest)):
        return
    allowed = "at least 1" if largest is None else f"1 to {largest}, what validation leaves of the smallest class"
    raise InputError(f"--per-class must be {allowed}; got {per_class}")
