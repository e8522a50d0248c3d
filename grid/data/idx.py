"""The IDX files in which EMNIST comes and glyphs are stored: read, gzipped or not, and checked.

Reference: http://yann.lecun.com/exdb/mnist (the format)
"""

import gzip
import io
import math
import string
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from grid.config import InputError
from grid.data.dataset import Images, Labels, check_sizes

IMAGE_SIZE = 28
GZIP_MAGIC = b"\x1f\x8b"
BYTES = 0x08
"""Third byte of an IDX file of bytes, as EMNIST's are."""
ELEMENTS = {0x09: "signed bytes", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
"""Third byte of an IDX file -> what else it may hold."""
CHUNK_BYTES = 1 << 20
HINT = "delete it and run again"
PRINTABLE = frozenset(string.printable.encode())


def read_pair(images_file: Path, labels_file: Path, *, size: int | None = None) -> tuple[Images, Labels]:
    """Return the images and labels of two IDX files, gzipped or not, as they are stored.

    Args:
        images_file: Their pixels.
        labels_file: Their classes.
        size: That they must have in both directions; None for any.

    Raises:
        InputError: A file is damaged, or the two files do not match.
    """
    images = _read_idx(images_file, axes=3)
    if size is not None and images.shape[1:] != (size, size):
        height, width = images.shape[1:]
        raise InputError(f"{images_file}: the images are {height}x{width}, not {size}x{size}; {HINT}")
    labels = _read_idx(labels_file, axes=1)
    if len(labels) != len(images):
        raise InputError(
            f"{labels_file}: {len(labels)} labels for {len(images)} images; delete both files and run again"
        )
    return images, labels.astype(np.int64)


def _read_idx(path: Path, *, axes: int) -> NDArray[np.uint8]:
    """Return the values of an IDX file after a check of its header; its content says whether it is gzipped."""
    try:
        with path.open("rb") as file:
            start = file.read(len(GZIP_MAGIC))
            file.seek(0)
            if start != GZIP_MAGIC:
                return _parse_idx(file, path, axes)
            with gzip.open(file) as content:
                return _parse_idx(content, path, axes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged ({reason_of(error)}); {HINT}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error


def _parse_idx(content: io.BufferedIOBase, path: Path, axes: int) -> NDArray[np.uint8]:
    header = content.read(4 + 4 * axes)
    _check_magic(header, path, axes)
    sizes = struct.unpack(f">{axes}I", header[4:])
    expected = math.prod(sizes)
    values = _read_at_most(content, expected + 1)
    if len(values) < expected:
        problem = f"truncated, {len(values)} bytes of values where its header declares {expected}"
        raise InputError(f"{path}: {problem}; {HINT}")
    if len(values) > expected:
        raise InputError(f"{path}: too long, more than the {expected} bytes of values that its header declares; {HINT}")
    return np.frombuffer(values, np.uint8).reshape(sizes)


def _read_at_most(content: io.BufferedIOBase, limit: int) -> bytearray:
    """Return so many bytes or as many as there are; the limit may be a damaged number larger than the memory."""
    values = bytearray()
    while len(values) < limit and (chunk := content.read(min(CHUNK_BYTES, limit - len(values)))):
        values += chunk
    return values


def _check_magic(header: bytes, path: Path, axes: int) -> None:
    """Check that a file begins as an IDX file of bytes with so many axes."""
    if header[:2] != b"\0\0"[: len(header)]:
        raise InputError(f"{path}: {describe_start(header)}, where an IDX file begins with two zeros; {HINT}")
    if len(header) < 4 + 4 * axes:
        raise InputError(f"{path}: truncated, {len(header)} bytes are less than a header; {HINT}")
    if header[2] != BYTES:
        raise InputError(f"{path}: holds {ELEMENTS.get(header[2], 'unknown values')}, not bytes; {HINT}")
    if header[3] != axes:
        mixed_up = "are images and labels mixed up?"
        raise InputError(f"{path}: has {header[3]} axes, not {axes}: {mixed_up} Put the right file there; or {HINT}")


def describe_start(start: bytes) -> str:
    """Return how a file of another kind begins, for people."""
    if not start:
        return "empty"
    if all(byte in PRINTABLE for byte in start):
        return f"text that begins with '{' '.join(start.decode().split())}'"
    return f"begins with the bytes {start[:4].hex()}"


def check_labels(labels: Labels, class_count: int, path: Path) -> None:
    """Check that all labels, shifted to start from 0, are below `class_count`.

    Raises:
        InputError: One is not; the text names the file, `path`, and the label as the file has it.
    """
    wrong = labels[(labels < 0) | (labels >= class_count)]
    if wrong.size:
        shift = _first_label(path)
        allowed = f"{shift}..{class_count - 1 + shift}"
        raise InputError(f"{path}: label {wrong[0] + shift} is outside {allowed}; {HINT}")


def check_classes(labels: Labels, classes: Sequence[str], path: Path) -> None:
    """Check that a train file has enough images of every class; see `grid.data.dataset.check_sizes`."""
    check_sizes(labels, classes, str(path), f"get the whole file: {HINT}", first_label=_first_label(path))


def _first_label(path: Path) -> int:
    return 1 if "-letters-" in path.name.lower() else 0


def reason_of(error: BaseException) -> str:
    """Return the text of an error on one line, without `<urlopen error ...>`."""
    text = str(error) if isinstance(error, HTTPError) else str(getattr(error, "reason", error))
    return " ".join(text.split()) or type(error).__name__
