"""The images: EMNIST or glyphs from disk, checked, upright, and cut into train and validation.

Plain numpy arrays, so that a data set is loaded once and shipped to every worker. Missing EMNIST is downloaded.
"""

import gzip
import hashlib
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import EMNIST
from torchvision.datasets.utils import USER_AGENT, check_md5

from grid.config import InputError
from grid.datasets import DATASETS, NAMES, VALIDATION_SHARE, check_name, check_per_class
from grid.glyphs import Glyphs, ensure
from grid.images import Dataset, Images, Labels

__all__ = ["NAMES", "Dataset", "check_name", "check_per_class", "is_here", "load", "load_test", "split_indices"]

Indices = NDArray[np.int64]

IMAGE_SIZE = 28
CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30
"""How long a silent server is waited for."""
MEND = "delete it and run again"


def load(name: str, data_dir: Path, *, per_class: int | None = None, split_seed: int = 0) -> Dataset:
    """Load train and validation, both cut from the train file; fetch or render the files if they are missing.

    Args:
        name: One of `NAMES`.
        data_dir: Folder that holds, or is to hold, `EMNIST/raw` or `Glyphs/raw`.
        per_class: Train images per class, a balanced subset that is contained in any larger one; `None` for all.
        split_seed: Seed of the choice of validation and of the subset, at least 0.

    Raises:
        InputError: Unknown name, a setting out of range, or files that are damaged or can't be had.
    """
    check_name(name)
    check_per_class(per_class)
    if split_seed < 0:
        raise InputError(f"the split seed must be at least 0, not {split_seed}")
    images, labels = _read(name, data_dir, "train")
    classes = _classes(name)
    train, val = split_indices(labels, len(classes), per_class=per_class, split_seed=split_seed)
    arrays = images[train], labels[train], images[val], labels[val]
    return Dataset(name, classes, *arrays, fingerprint=_fingerprint(name, classes, arrays))


def is_here(name: str, data_dir: Path) -> bool:
    """Say whether `load` finds the train files on the disk."""
    raw = data_dir / _source(name).__name__ / "raw"
    return not _missing(raw, DATASETS[name].split, "train")


def load_test(name: str, data_dir: Path) -> tuple[Images, Labels]:
    """Load the test set. Only `grid.confirm` may call this: the test set guides no choice.

    Returns:
        Upright images, uint8 `[image, 28, 28]`, and labels from 0, int64 `[image]`.

    Raises:
        InputError: Unknown name, or files that are damaged or can't be had.
    """
    check_name(name)
    return _read(name, data_dir, "test")


def split_indices(
    labels: Labels, class_count: int, *, per_class: int | None = None, split_seed: int = 0
) -> tuple[Indices, Indices]:
    """Choose train and validation, validation first: it is the same for every `per_class`.

    Args:
        labels: Classes of the images in the train file, `[image]`, from 0.
        class_count: Number of classes.
        per_class: Train images per class; `None` for all that validation leaves.
        split_seed: Seed of the choice, at least 0.

    Returns:
        Increasing positions in `labels` of train and of validation, which has a sixth of the smallest class per class.

    Raises:
        InputError: `per_class` is out of range, or a class is too small to be cut.
    """
    smallest = int(np.bincount(labels, minlength=class_count).min())
    if smallest < VALIDATION_SHARE:
        raise InputError(f"each class needs {VALIDATION_SHARE} train images or more; the smallest has {smallest}")
    held_out = smallest // VALIDATION_SHARE
    check_per_class(per_class, largest=smallest - held_out)
    rng = np.random.default_rng(split_seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(class_count)]
    end = None if per_class is None else held_out + per_class
    train = np.sort(np.concatenate([positions[held_out:end] for positions in shuffled]))
    return train, np.sort(np.concatenate([positions[:held_out] for positions in shuffled]))


def _classes(name: str) -> tuple[str, ...]:
    """Return the class names; torchvision's list for Letters begins with a class without images."""
    source = _source(name)
    return tuple(label for label in source.classes_split_dict[DATASETS[name].split] if label != "N/A")


def _source(name: str) -> type[EMNIST]:
    return Glyphs if name == "glyphs" else EMNIST


def _fingerprint(name: str, classes: tuple[str, ...], arrays: Iterable[NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(repr((name, classes)).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read(name: str, data_dir: Path, part: str) -> tuple[Images, Labels]:
    """Return the upright images and the labels of the `train` or the `test` file."""
    source, split = _source(name), DATASETS[name].split
    raw = data_dir / source.__name__ / "raw"
    if source is Glyphs:
        ensure(data_dir)
    else:
        _obtain(raw, split, part)
    images_file, labels_file = _files(raw, split, part)
    _check_pair(images_file, labels_file)
    torch_set = source(data_dir, split=split, train=part == "train")
    labels = torch_set.targets.numpy() - (1 if split == "letters" else 0)
    _check_labels(labels, len(_classes(name)), labels_file)
    return np.ascontiguousarray(torch_set.data.numpy().transpose(0, 2, 1)), labels


def _files(raw: Path, split: str, part: str) -> tuple[Path, Path]:
    prefix = f"emnist-{split}-{part}"
    return raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"


def _check_pair(images_file: Path, labels_file: Path) -> None:
    """Check all that the headers tell, before torchvision reads the files."""
    count, height, width = _read_header(images_file, axes=3)
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(f"{images_file}: the images are {height}x{width}, not 28x28; {MEND}")
    (label_count,) = _read_header(labels_file, axes=1)
    if label_count != count:
        raise InputError(f"{labels_file}: {label_count} labels for {count} images; delete both files and run again")


def _read_header(path: Path, *, axes: int) -> tuple[int, ...]:
    """Return the sizes that an IDX file of bytes declares, once its magic number and its length are right."""
    header_bytes = 4 + 4 * axes
    try:
        with path.open("rb") as file:
            header, file_bytes = file.read(header_bytes), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    magic = bytes([0, 0, 8, axes])
    if header[:4] != magic[: len(header)]:
        raise InputError(f"{path}: not an IDX file, it begins with {header[:4].hex()} and not {magic.hex()}; {MEND}")
    if len(header) < header_bytes:
        raise InputError(f"{path}: truncated, {file_bytes} bytes are less than a header; {MEND}")
    sizes = struct.unpack(f">{axes}I", header[4:])
    expected_bytes = header_bytes + math.prod(sizes)
    if file_bytes != expected_bytes:
        fault = "truncated" if file_bytes < expected_bytes else "too long"
        raise InputError(f"{path}: {fault}, {file_bytes} bytes where its header tells of {expected_bytes}; {MEND}")
    return sizes


def _check_labels(labels: Labels, class_count: int, path: Path) -> None:
    wrong = labels[(labels < 0) | (labels >= class_count)]
    if wrong.size:
        shift = 1 if "-letters-" in path.name else 0
        allowed = f"{shift}..{class_count - 1 + shift}"
        raise InputError(f"{path}: label {wrong[0] + shift} is outside {allowed}; {MEND}")


def _obtain(raw: Path, split: str, part: str) -> None:
    """Bring the two files of one part of EMNIST into `raw` if they are missing; each appears whole or not at all."""
    if not _missing(raw, split, part):
        return
    made = _make_folder(raw, split)
    for path in _missing(raw, split, part):
        packed = path.with_name(f"{path.name}.gz")
        if packed.is_file():
            _unpack(packed, path, packed)
    if _missing(raw, split, part):
        try:
            archive = _fetch_archive(raw, split, part)
        except InputError:
            _remove_empty(made)
            raise
        _unpack_archive(archive, [*_missing(raw, split, "train"), *_missing(raw, split, "test")])


def _missing(raw: Path, split: str, part: str) -> list[Path]:
    return [path for path in _files(raw, split, part) if not path.is_file()]


def _make_folder(raw: Path, split: str) -> list[Path]:
    """Make the folder if it is missing; return those that had to be made, innermost first."""
    missing = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {raw} ({error.strerror}); choose another data folder") from error
    if not os.access(raw, os.W_OK):
        raise InputError(f"cannot write to {raw}, where emnist-{split} files are missing; choose another data folder")
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def _unpack_archive(archive: Path, paths: Iterable[Path]) -> None:
    """Unpack these files only: torchvision would unpack all six splits, and leave half of a file if interrupted."""
    with zipfile.ZipFile(archive) as members:
        for path in paths:
            with members.open(f"gzip/{path.name}.gz") as stream:
                _unpack(stream, path, archive)


def _unpack(stream: IO[bytes] | Path, path: Path, packed: Path) -> None:
    """Decompress `stream`, which is the file `packed` or a member of it, to `path`."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with gzip.open(stream) as source, unfinished.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        unfinished.replace(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{packed}: damaged ({_reason(error)}); {MEND}") from error
    except OSError as error:
        raise InputError(
            f"cannot unpack {packed} to {path} ({_reason(error)}); make room or choose another data folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _fetch_archive(raw: Path, split: str, part: str) -> Path:
    """Return the path of NIST's archive of all six splits, downloaded if need be, its checksum verified."""
    archive, unfinished = raw / "gzip.zip", raw / "gzip.zip.part"
    if archive.is_file():
        if not check_md5(archive, EMNIST.md5):
            raise InputError(f"{archive}: wrong checksum, the download was damaged or cut short; {MEND}")
        return archive
    try:
        _download(EMNIST.url, unfinished)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"no emnist-{split}-{part}-*-ubyte in {raw} and the download failed ({_reason(error)}); "
            "put them there or run again with a network, which continues the download"
        ) from error
    if not check_md5(unfinished, EMNIST.md5):
        unfinished.unlink()
        raise InputError(f"{EMNIST.url}: wrong checksum, the damaged download was deleted; run again")
    return unfinished.replace(archive)


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, continuing after the bytes that are there if the server can."""
    done = path.stat().st_size if path.exists() else 0
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)  # noqa: S310 (torchvision's https)
    except HTTPError as error:
        error.close()
        if done and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; the checksum decides
        raise
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0
        total = None if response.length is None else done + response.length
        with path.open("ab" if done else "wb") as sink:
            _copy(response, sink, done, total)


def _copy(source: IO[bytes], sink: IO[bytes], done: int, total: int | None) -> None:
    """Copy a download of `total` bytes, `done` of which are there, showing the progress on a terminal."""
    try:
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
            done += len(chunk)
            _show(f"\rdownloading EMNIST: {done / 1e6:.1f} of {'?' if total is None else f'{total / 1e6:.1f}'} MB")
    finally:
        _show("\n")
    if total is not None and done < total:
        raise ConnectionError(f"the connection was lost after {done} of {total} bytes")


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    """Return what an error says, on one line; `<urlopen error ...>` is taken off."""
    text = str(error) if isinstance(error, HTTPError) else str(getattr(error, "reason", error))
    return " ".join(text.split()) or type(error).__name__
