"""The images of a data set as plain arrays, as they are sent to workers. Imports no torch, unlike `grid.data.load`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


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
