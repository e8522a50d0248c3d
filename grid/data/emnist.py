"""EMNIST's files: found in a folder, downloaded from NIST if missing, unpacked, and checked while they are read.

A file is written completely or not at all; an interrupted download continues. Glyphs are stored in the same format.
"""

import errno
import gzip
import os
import shlex
import shutil
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torchvision.datasets import EMNIST
from torchvision.datasets.utils import USER_AGENT, check_md5

from grid.config import InputError
from grid.data.idx import HINT, describe_start, reason_of
from grid.files import rename_durably

CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30
"""How long to wait for a server that sends nothing."""
STARTING_BYTES = 64
"""Of a file of another kind, shown to people."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ZIP_MAGIC = b"PK"
DEEPEST = 3
"""Folders below the data folder in which files are looked for."""
MOST_FOLDERS = 1000
"""That are looked into."""


def idx_files(raw: Path, split: str, part: str) -> tuple[Path, Path]:
    """Return the paths of the images and of the labels of one part, `train` or `test`."""
    prefix = f"emnist-{split}-{part}"
    return raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"


def find_files(data_dir: Path, split: str, part: str) -> tuple[Path, Path] | None:
    """Return the images and the labels of one part if both are anywhere in the data folder, packed or not.

    `EMNIST/raw` comes first. Capitals and a dot before `idx` count as the same name, as some unpackers write them.

    Raises:
        InputError: The folder can't be read, is none, or has a broken link of that name.
    """
    wanted = idx_files(data_dir / "EMNIST" / "raw", split, part)
    try:
        found = {path.name: path for path in wanted if path.is_file()}
        if len(found) < len(wanted):
            _check_folders(data_dir)
            found = _lying_around(data_dir, {path.name for path in wanted}) | found
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from error
    images, labels = (found.get(path.name) for path in wanted)
    return None if images is None or labels is None else (images, labels)


def find_in(data_dir: Path, name: str) -> Path | None:
    """Return a file if it is anywhere in the data folder.

    Raises:
        InputError: It is a broken link.
    """
    return _lying_around(data_dir, {name}).get(name) if data_dir.is_dir() else None


def _check_folders(data_dir: Path) -> None:
    for folder in (data_dir, data_dir / "EMNIST", data_dir / "EMNIST" / "raw"):
        if folder.is_symlink() and not folder.exists():
            raise InputError(f"{folder}: a broken link to {folder.readlink()}; restore it, or pass another --data-dir")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file where a folder is wanted; move it, or pass another --data-dir")
        if folder.exists():
            os.scandir(folder).close()  # raises if it can't be read


def check_above(data_dir: Path, split: str, part: str) -> None:
    """Raise `InputError` if the files lie above the data folder, so that they need not be downloaded."""
    above = data_dir.absolute().parent
    names = {path.name for path in idx_files(above, split, part)}
    for folder in (above / "EMNIST" / "raw", above / "raw", above):
        with suppress(OSError):
            if names <= {_plain_name(path) for path in folder.iterdir()}:
                problem = f"no emnist-{split}-{part}-* in {data_dir}, but in {folder}"
                right = above if folder.name == "raw" and folder.parent.name == "EMNIST" else folder
                raise InputError(f"{problem}; pass --data-dir {shlex.quote(str(right))}")


def _lying_around(data_dir: Path, names: Collection[str]) -> dict[str, Path]:
    """Return name -> file for the wanted names that are in the folder or a few levels below; unpacked ones first."""
    found: dict[str, Path] = {}
    for path in sorted(_walk(data_dir, names), key=lambda path: (_is_packed(path), len(path.parts), path)):
        if not path.exists():
            raise InputError(f"{path}: a broken link to {path.readlink()}; restore or delete it")
        found.setdefault(_plain_name(path), path)
    return found


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _plain_name(path: Path) -> str:
    """Return the name that NIST gives a file: in small letters, with `-idx`, without `.gz`."""
    return path.name.lower().removesuffix(".gz").replace(".idx", "-idx")


def _walk(data_dir: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield the files of these names in a folder and `DEEPEST` levels below, but for folders that can't be read."""
    for number, (folder, below, files) in enumerate(os.walk(data_dir, followlinks=True)):
        is_deep = len(Path(folder).relative_to(data_dir).parts) >= DEEPEST
        below[:] = [] if is_deep or number >= MOST_FOLDERS else sorted(name for name in below if name[0] != ".")
        yield from (path for name in files if _plain_name(path := Path(folder, name)) in names)


def download(data_dir: Path, split: str, part: str) -> None:
    """Download and unpack the files of a split that `EMNIST/raw` lacks.

    Each file is written completely or not at all.

    Args:
        data_dir: Folder that holds, or is to hold, `EMNIST/raw`.
        split: Which of the six.
        part: That is missing, for messages.

    Raises:
        InputError: They can't be downloaded, unpacked or written.
    """
    raw = data_dir / "EMNIST" / "raw"
    made = _make_folder(raw, split)
    try:
        archive = _fetch_archive(raw, split, part)
    except InputError:
        _remove_empty(made)
        raise
    paths = [*idx_files(raw, split, "train"), *idx_files(raw, split, "test")]
    _unpack_archive(archive, [path for path in paths if not path.is_file()])


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
    """Unpack these files only, to these paths, whatever paths the archive names."""
    with zipfile.ZipFile(archive) as members:
        for path in paths:
            with members.open(f"gzip/{path.name}.gz") as stream:
                _unpack(stream, path, archive)


def _unpack(stream: IO[bytes], path: Path, packed: Path) -> None:
    """Decompress `stream`, a member of the archive `packed`, to `path`."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with gzip.open(stream) as source, unfinished.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        rename_durably(unfinished, path)
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise InputError(f"{packed}: damaged ({reason_of(error)}); {HINT}") from error
    except OSError as error:
        raise InputError(
            f"cannot unpack {packed} to {path} ({reason_of(error)}); make room or choose another data folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _fetch_archive(raw: Path, split: str, part: str) -> Path:
    """Return the path of NIST's archive of all six splits, downloaded if missing, its checksum verified."""
    archive, unfinished = raw / "gzip.zip", raw / "gzip.zip.part"
    for folder in (raw.parents[1], raw.parent, raw):  # this one last: it counts if there are several
        archive = folder / "gzip.zip" if (folder / "gzip.zip").is_file() else archive
    if archive.is_file():
        if not check_md5(archive, EMNIST.md5):
            raise InputError(f"{archive}: {_describe_archive(archive, split)}")
        return archive
    try:
        _download(EMNIST.url, unfinished)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"no emnist-{split}-{part}-*-ubyte in {raw} and the download failed ({reason_of(error)}); "
            "put them there or run again with a network, which continues the download"
        ) from error
    if not check_md5(unfinished, EMNIST.md5):
        unfinished.unlink()
        raise InputError(f"{EMNIST.url}: wrong checksum, the damaged download was deleted; run again")
    return rename_durably(unfinished, archive)


def _describe_archive(archive: Path, split: str) -> str:
    """Say what a file is that should be NIST's archive, and what to do."""
    with archive.open("rb") as file:
        start = file.read(STARTING_BYTES)
    if not start.startswith(ZIP_MAGIC):
        return f"not a zip archive but {describe_start(start)}; {HINT}"
    try:
        with zipfile.ZipFile(archive) as members:
            names = members.namelist()
    except (zipfile.BadZipFile, OSError):
        return f"wrong checksum, the download was damaged or cut short; {HINT}"
    if any(Path(name).name.lower().startswith(f"emnist-{split}-") for name in names):
        return f"wrong checksum, so not NIST's archive; if you trust it, unpack its emnist-{split}-* here; else {HINT}"
    return f"wrong checksum and no emnist-{split}-* among its {len(names)} files, so not NIST's archive; {HINT}"


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, continuing after the bytes that are there if the server supports it."""
    if path.exists() and not _begins_as_zip(path):
        path.unlink()
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
        elif not response.headers.get("Content-Range", f"bytes {done}-").startswith(f"bytes {done}-"):
            path.unlink()
            raise ConnectionError("the server continued at another place; it begins again")
        total = None if response.length is None else done + response.length
        start = b"" if done else _check_answer(response, url)
        with _writing(path), path.open("ab" if done else "wb") as sink:
            sink.write(start)
            _copy(response, sink, done + len(start), total)


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _check_answer(response: HTTPResponse, url: str) -> bytes:
    """Return the first bytes of an answer.

    Raises:
        InputError: They are not a zip archive but the page of a proxy or of a server in trouble.
    """
    start = response.read(STARTING_BYTES)
    if start.startswith(ZIP_MAGIC):
        return start
    size = "" if response.length is None else f" of {len(start) + response.length:,} bytes"
    kind = response.headers.get_content_type()
    problem = f"did not send a zip archive but {kind}{size}, {describe_start(start)}"
    raise InputError(f"{url} {problem}; get gzip.zip with a browser and put it into EMNIST/raw of the data folder")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell a disk that is full from a connection that is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"cannot write {path} ({error.strerror}); make room and run again, which continues the download"
        ) from error


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
