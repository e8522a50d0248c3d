"""EMNIST as Kaggle distributes it: `emnist-<split>-train.csv` and `-test.csv`, a line per image and no header.

A line has the label, then 784 pixels of the transposed image, as NIST's own files store it.

Reference: https://www.kaggle.com/datasets/crawford/emnist
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grid.config import InputError
from grid.data.dataset import Images, Labels
from grid.data.idx import IMAGE_SIZE, describe_start

COLUMNS = 1 + IMAGE_SIZE**2
HINT = "get the file from Kaggle again"


def csv_file(split: str, part: str) -> str:
    """Return the name of the file of one part, `train` or `test`."""
    return f"emnist-{split}-{part}.csv"


def read_csv(path: Path) -> tuple[Images, Labels]:
    """Return images, as they are stored, and labels.

    Raises:
        InputError: The file can't be read, or is none of Kaggle's.
    """
    try:
        with path.open("rb") as file:
            first_line = file.readline(100 * COLUMNS)
        _check_first_line(first_line, path)
        table = _parse(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    return _images(table), table[:, 0].astype(np.int64)


def _parse(path: Path) -> NDArray[np.uint8]:
    try:
        return np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)
    except ValueError as error:
        problem = _first_wrong_line(path) or " ".join(str(error).split())
        raise InputError(f"{path}: {problem}; {HINT}") from error


def _images(table: NDArray[np.uint8]) -> Images:
    return table[:, 1:].reshape(-1, IMAGE_SIZE, IMAGE_SIZE)


def _check_first_line(line: bytes, path: Path) -> None:
    wanted = f"a label and {COLUMNS - 1} pixels, without a header"
    fields = line.strip().split(b",")
    if not all(field.strip().isdigit() for field in fields):
        raise InputError(f"{path} line 1: {describe_start(line[:40])}, where {wanted} is wanted; {HINT}")
    if len(fields) != COLUMNS:
        raise InputError(f"{path} line 1: {len(fields)} columns, where {wanted} is wanted; {HINT}")


def _first_wrong_line(path: Path) -> str:
    """Return what is wrong with the first line that can't be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.strip().split(b",")
            if len(fields) != COLUMNS:
                return f"line {number} has {len(fields)} columns, not {COLUMNS}"
            for column, field in enumerate(fields, 1):
                if not field.strip().isdigit() or int(field) > 255:
                    text = field[:20].decode(errors="replace")
                    return f"line {number}, column {column}: '{text}' is not a whole number from 0 to 255"
    return ""
