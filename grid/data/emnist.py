"""EMNIST's files: found in a folder, downloaded from NIST if missing, unpacked, and checked before they are read.

A file is written completely or not at all; an interrupted download continues. Glyphs are stored in the same format.
"""

import gzip
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

from torchvision.datasets import EMNIST
from torchvision.datasets.utils import USER_AGENT, check_md5

from grid.config import InputError
from grid.data.dataset import Labels
from grid.files import rename_durably

IMAGE_SIZE = 28
CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30
"""How long to wait for a server that sends nothing."""
HINT = "delete it and run again"


def idx_files(raw: Path, split: str, part: str) -> tuple[Path, Path]:
    """Return the paths of the images and of the labels of one part, `train` or `test`."""
    prefix = f"emnist-{split}-{part}"
    return raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"


def check_pair(images_file: Path, labels_file: Path) -> None:
    """Check the headers of two IDX files before torchvision reads them.

    Raises:
        InputError: A file is damaged, or the two files do not match.
    """
    count, height, width = _read_header(images_file, axes=3)
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(f"{images_file}: the images are {height}x{width}, not 28x28; {HINT}")
    (label_count,) = _read_header(labels_file, axes=1)
    if label_count != count:
        raise InputError(f"{labels_file}: {label_count} labels for {count} images; delete both files and run again")


def _read_header(path: Path, *, axes: int) -> tuple[int, ...]:
    """Return the sizes declared by an IDX file of bytes, after a check of its magic number and its length."""
    header_bytes = 4 + 4 * axes
    try:
        with path.open("rb") as file:
            header, file_bytes = file.read(header_bytes), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    magic = bytes([0, 0, 8, axes])
    if header[:4] != magic[: len(header)]:
        raise InputError(f"{path}: not an IDX file, it begins with {header[:4].hex()} and not {magic.hex()}; {HINT}")
    if len(header) < header_bytes:
        raise InputError(f"{path}: truncated, {file_bytes} bytes are less than a header; {HINT}")
    sizes = struct.unpack(f">{axes}I", header[4:])
    expected_bytes = header_bytes + math.prod(sizes)
    if file_bytes != expected_bytes:
        problem = "truncated" if file_bytes < expected_bytes else "too long"
        raise InputError(f"{path}: {problem}, {file_bytes} bytes where its header declares {expected_bytes}; {HINT}")
    return sizes


def check_labels(labels: Labels, class_count: int, path: Path) -> None:
    """Check that all labels, shifted to start from 0, are below `class_count`.

    Raises:
        InputError: One is not; the text names the file, `path`, and the label as the file has it.
    """
    wrong = labels[(labels < 0) | (labels >= class_count)]
    if wrong.size:
        shift = 1 if "-letters-" in path.name else 0
        allowed = f"{shift}..{class_count - 1 + shift}"
        raise InputError(f"{path}: label {wrong[0] + shift} is outside {allowed}; {HINT}")


def download_if_missing(raw: Path, split: str, part: str) -> None:
    """Download and unpack the two files of one part of EMNIST to `raw` if they are missing.

    Each file is written completely or not at all.

    Raises:
        InputError: They can't be downloaded, unpacked or written.
    """
    if not missing_files(raw, split, part):
        return
    made = _make_folder(raw, split)
    for path in missing_files(raw, split, part):
        packed = path.with_name(f"{path.name}.gz")
        if packed.is_file():
            _unpack(packed, path, packed)
    if missing_files(raw, split, part):
        try:
            archive = _fetch_archive(raw, split, part)
        except InputError:
            _remove_empty(made)
            raise
        _unpack_archive(archive, [*missing_files(raw, split, "train"), *missing_files(raw, split, "test")])


def missing_files(raw: Path, split: str, part: str) -> list[Path]:
    """Return those of `idx_files` that do not exist."""
    return [path for path in idx_files(raw, split, part) if not path.is_file()]


def _make_folder(raw: Path, split: str) -> list[Path]:
    """Make the folder if it is missing; return the folders that were made, innermost first."""
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
    """Unpack these files only: torchvision would unpack all six splits, and leave half a file if interrupted."""
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
        rename_durably(unfinished, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{packed}: damaged ({_reason(error)}); {HINT}") from error
    except OSError as error:
        raise InputError(
            f"cannot unpack {packed} to {path} ({_reason(error)}); make room or choose another data folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _fetch_archive(raw: Path, split: str, part: str) -> Path:
    """Return the path of NIST's archive of all six splits, downloaded if missing, its checksum verified."""
    archive, unfinished = raw / "gzip.zip", raw / "gzip.zip.part"
    if archive.is_file():
        if not check_md5(archive, EMNIST.md5):
            raise InputError(f"{archive}: wrong checksum, the download was damaged or cut short; {HINT}")
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
    return rename_durably(unfinished, archive)


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, continuing after the bytes that are there if the server supports it."""
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
    """Copy the rest of a download, `done` of `total` bytes being there already; show progress on a terminal."""
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
    """Return the text of an error on one line, without `<urlopen error ...>`."""
    text = str(error) if isinstance(error, HTTPError) else str(getattr(error, "reason", error))
    return " ".join(text.split()) or type(error).__name__
