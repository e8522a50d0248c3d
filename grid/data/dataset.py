"""The images of a data set as plain arrays, as they are sent to workers. Imports no torch, unlike `grid.data.load`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grid.config import InputError
from grid.data.catalogue import VALIDATION_DIVISOR

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Labelled:
    """One part of a data set, as a source of `grid.data.sources` returns it."""

    images: Images
    """As in `Dataset`."""
    labels: Labels
    classes: tuple[str, ...]


def check_sizes(labels: Labels, classes: Sequence[str], where: str, remedy: str, *, first_label: int = 0) -> None:
    """Check that there are enough train images of every class.

    Args:
        labels: From 0, below the number of classes.
        classes: Their names.
        where: Names the source in the error.
        remedy: What to do.
        first_label: Label that the source gives to the first class.

    Raises:
        InputError: A class has fewer; the text names it.
    """
    sizes = np.bincount(labels, minlength=len(classes))
    few = np.flatnonzero(sizes < VALIDATION_DIVISOR)
    if few.size:
        named = ", ".join(f"'{classes[label]}' (label {label + first_label}): {sizes[label]}" for label in few[:3])
        more = f" and {len(few) - 3} more classes" if len(few) > 3 else ""
        problem = f"too few images of {named}{more}; each class needs {VALIDATION_DIVISOR} train images or more"
        raise InputError(f"{where}: {problem}; {remedy}")


@dataclass(frozen=True)
class DataShape:
    """What time and memory of a training depend on, of the images."""

    image: tuple[int, int, int]
    """Channels, height and width of an image."""
    classes: int
    train_images: int
    """How many there are."""


@dataclass(frozen=True)
class Dataset:
    """Train and validation images of one data set, without its test set."""

    name: str
    classes: tuple[str, ...]
    """Class names; a label is a position in them."""
    train_images: Images
    """Grey `[image, row, column]` or of several channels `[image, channel, row, column]`.

    Those of EMNIST and of the glyphs are 28 x 28, white (255) on black (0), upright.
    """
    train_labels: Labels
    """`[image]`, from 0."""
    val_images: Images
    val_labels: Labels
    fingerprint: str
    """16 hexadecimal digits that change with any byte of the fields above."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        *channels, height, width = self.train_images.shape[1:]
        return (*channels, height, width) if channels else (1, height, width)

    @property
    def shape(self) -> DataShape:
        """Its shape, without the images."""
        return DataShape(self.image_shape, len(self.classes), len(self.train_labels))
