"""What reads each kind of data set: finds its files in the data folder, or fetches them, and returns one part of it.

A row of `grid.data.catalogue.DATASETS` names one of these readers. None is called before the files are needed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets import EMNIST

from grid.config import InputError
from grid.data import kaggle
from grid.data.dataset import Images, Labelled, Labels, Split
from grid.data.emnist import check_above, download, find_files, find_in, idx_files
from grid.data.glyphs import CLASSES, render_if_missing
from grid.data.idx import IMAGE_SIZE, check_classes, check_labels, read_pair
from grid.wording import first_line

MNIST_LIKE = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
"""Name -> torchvision's class, which knows the names of the classes and where the files are to be had."""
TRANSPOSED = (0, 2, 1)
"""How the images of EMNIST and the glyphs are stored."""
MNIST_FILES = {"train": "train", "test": "t10k"}


def read_emnist(name: str, data_dir: Path, part: Split) -> Labelled:
    """Read a split of EMNIST from NIST's files or Kaggle's; download NIST's if there are neither.

    Raises:
        InputError: The files are damaged or can't be obtained.
    """
    split = name.removeprefix("emnist-")
    found = find_files(data_dir, split, part)
    table = None if found else find_in(data_dir, kaggle.csv_file(split, part))
    if table is not None:
        images, labels = kaggle.read_csv(table)
        labels_file = table
    else:
        if found is None:
            check_above(data_dir, split, part)
            download(data_dir, split, part)
            found = idx_files(data_dir / "EMNIST" / "raw", split, part)
        images_file, labels_file = found
        images, labels = read_pair(images_file, labels_file, size=IMAGE_SIZE)
    labels = labels - (1 if split == "letters" else 0)
    # torchvision's list for Letters begins with an empty class
    classes = [label for label in EMNIST.classes_split_dict[split] if label != "N/A"]
    return _checked(images.transpose(TRANSPOSED), labels, classes, labels_file, part)


def has_emnist(name: str, data_dir: Path) -> bool:
    """Return whether the train files of a split are on disk."""
    split = name.removeprefix("emnist-")
    return (
        find_files(data_dir, split, "train") is not None
        or find_in(data_dir, kaggle.csv_file(split, "train")) is not None
    )


def read_glyphs(name: str, data_dir: Path, part: Split) -> Labelled:
    """Read the glyphs; render them if they are missing."""
    images_file, labels_file = idx_files(render_if_missing(data_dir), name, part)
    images, labels = read_pair(images_file, labels_file, size=IMAGE_SIZE)
    return _checked(images.transpose(TRANSPOSED), labels, CLASSES, labels_file, part)


def has_glyphs(name: str, data_dir: Path) -> bool:
    """Return whether the train files are on disk."""
    return all(path.is_file() for path in idx_files(data_dir / "Glyphs" / "raw", name, "train"))


def read_mnist_like(name: str, data_dir: Path, part: Split) -> Labelled:
    """Read MNIST or a data set of the same form; torchvision downloads it if it is missing.

    Raises:
        InputError: The files are damaged or can't be obtained.
    """
    source = MNIST_LIKE[name]
    found = _find_mnist_like(name, data_dir, part)
    if found is None:
        try:
            source(str(data_dir), download=True)
        except (OSError, RuntimeError) as error:
            wanted = f"{MNIST_FILES['train']}-images-idx3-ubyte.gz and the other three files"
            raise InputError(
                f"no {name} in {data_dir}, and it can't be downloaded ({first_line(error)}); put {wanted} into "
                f"{data_dir / name}"
            ) from error
        found = _find_mnist_like(name, data_dir, part)
    if found is None:
        raise InputError(f"torchvision did not put {name} into {data_dir}; download its four files by hand")
    images, labels = read_pair(*found)
    classes = [each.partition(" - ")[0] for each in source.classes]  # MNIST's are like `0 - zero`
    return _checked(images, labels, classes, found[1], part)


def has_mnist_like(name: str, data_dir: Path) -> bool:
    """Return whether the train files are on disk."""
    return _find_mnist_like(name, data_dir, "train") is not None


def _find_mnist_like(name: str, data_dir: Path, part: Split) -> tuple[Path, Path] | None:
    """Return images and labels, from torchvision's folder or one named like the data set.

    The files of all these data sets have the same names, so the name of their folder has to say which they are.
    """
    prefix, plain = MNIST_FILES[part], MNIST_LIKE[name].__name__.lower()
    own = [data_dir] if data_dir.absolute().name.lower() in (name, plain) else []
    for folder in (data_dir / MNIST_LIKE[name].__name__ / "raw", data_dir / name, *own):
        pair = [
            next((path for path in _spellings(folder, f"{prefix}-{kind}") if path.is_file()), None)
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def _spellings(folder: Path, name: str) -> Sequence[Path]:
    return [folder / each for plain in (name, name.replace("-idx", ".idx")) for each in (plain, f"{plain}.gz")]


def _checked(images: Images, labels: Labels, classes: Sequence[str], labels_file: Path, part: Split) -> Labelled:
    check_labels(labels, len(classes), labels_file)
    if part == "train":
        check_classes(labels, classes, labels_file)
    return Labelled(np.ascontiguousarray(images), labels, tuple(classes))
