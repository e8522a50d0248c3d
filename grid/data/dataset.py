"""The images of a data set as plain arrays: what travels to workers. Light to import, which `grid.data.load` is not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Train and validation images of one data set; the test set is not in it."""

    name: str
    classes: tuple[str, ...]
    """Class names; the label is the position."""
    train_images: Images
    """`[image, row, column]`, 28 x 28, white (255) on black (0), upright."""
    train_labels: Labels
    """`[image]`, from 0."""
    val_images: Images
    val_labels: Labels
    fingerprint: str
    """16 hexadecimal digits that change with any byte of the above."""
