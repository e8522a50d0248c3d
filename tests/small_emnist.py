"""A small EMNIST of random images, as bytes and as files."""

import struct
from pathlib import Path

import numpy as np

CLASS_COUNT, TRAIN_PER_CLASS, TEST_PER_CLASS = 47, 12, 3


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def made_files(split: str, class_count: int, first_label: int = 0) -> dict[str, bytes]:
    """Return a small EMNIST of random images: file name -> content."""
    files = {}
    for part, per_class in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        labels = np.tile(np.arange(class_count), per_class) + first_label
        images = np.random.default_rng(per_class).integers(256, size=(len(labels), 28, 28))
        files[f"emnist-{split}-{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"emnist-{split}-{part}-labels-idx1-ubyte"] = idx_bytes(labels)
    return files


def write_files(data_dir: Path, files: dict[str, bytes]) -> Path:
    raw = data_dir / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return data_dir


BALANCED = made_files("balanced", CLASS_COUNT)
TRAIN_IMAGES = "emnist-balanced-train-images-idx3-ubyte"
TRAIN_LABELS = "emnist-balanced-train-labels-idx1-ubyte"
