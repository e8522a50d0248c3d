"""Writes files that survive a power loss, after which a file that was only renamed may be empty.

Standard library only.
"""

import errno
import os
import shutil
from pathlib import Path
from uuid import uuid4


def write_durably(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; return once it is on the disk.

    Raises:
        OSError: It can't be written; an earlier file of that name stays.
    """
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        unfinished.write_bytes(content)
        rename_durably(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def rename_durably(unfinished: Path, path: Path) -> Path:
    """Move a file that was just written to its place; return the new path once it is on the disk."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)
    return path


def copy_folder_durably(source: Path, path: Path) -> Path:
    """Copy a folder completely or not at all; return the new path once it is on the disk.

    Raises:
        OSError: It can't be read or written; what there is of the copy is replaced by the next one.
    """
    unfinished = path.with_name(f"{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, symlinks=True)
    for copied in unfinished.rglob("*"):
        if not copied.is_symlink():
            sync(copied)
    return rename_durably(unfinished, path)


def sync(path: Path) -> None:
    """Return once the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that sync no folder
            raise
    finally:
        os.close(descriptor)
