"""Checkpoints: one small file per unfinished trial, on storage that all nodes reach."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pyarrow import fs

from grid.config import InputError
from grid.files import rename_durably
from grid.masking import mask
from grid.train.device_errors import DeviceError
from grid.wording import first_line, last_line


class StorageError(InputError, OSError):
    """The storage has failed: it is full, throttled, or away. Another try may succeed."""


class Checkpoints:
    """The checkpoints of one experiment.

    A file is written completely or not at all, and read with `weights_only=True`: tensors and plain values, no code.

    Args:
        storage: Absolute folder, or a URI that pyarrow knows, such as s3://BUCKET/FOLDER.
        experiment: Name of the subfolder.

    Raises:
        InputError: Pyarrow does not know this kind of storage.
    """

    def __init__(self, storage: str, experiment: str):
        self._storage = storage
        try:
            filesystem, root = fs.FileSystem.from_uri(storage) if "://" in storage else (fs.LocalFileSystem(), storage)
        except (OSError, ValueError) as error:
            raise InputError(
                f"unknown storage '{mask(storage)}' ({first_line(error)}); give a folder or s3://BUCKET"
            ) from error
        self._filesystem = filesystem
        self._folder = f"{root}/{experiment}/checkpoints"

    def __str__(self) -> str:
        return mask(self._storage)

    def check(self) -> None:
        """Write a file and delete it again.

        Raises:
            StorageError: The storage can't be written.
        """
        self.save("probe", {})
        self.delete("probe")

    def save(self, trial_key: str, state: dict[str, Any]) -> None:
        """Save a trial, replacing its earlier checkpoint.

        Raises:
            StorageError: The storage has failed; nothing has changed.
        """
        import torch  # noqa: PLC0415  (takes a second, and the driver needs this module earlier)

        buffer = io.BytesIO()
        torch.save(state, buffer)
        unfinished = f"{self._folder}/{trial_key}.{uuid4().hex}.part"
        with self._using("write to"):
            try:
                self._filesystem.create_dir(self._folder, recursive=True)
                with self._filesystem.open_output_stream(unfinished) as file:
                    file.write(buffer.getvalue())
                self._move(unfinished, self._path(trial_key))
            except BaseException:
                with suppress(Exception):  # on a full disk it would be in the way of the next try
                    self._filesystem.delete_file(unfinished)
                raise

    def load(self, trial_key: str, device: str) -> dict[str, Any] | None:
        """Return the state of a trial on `device`; None if it was never saved or its file is damaged.

        Raises:
            StorageError: The storage has failed.
        """
        import torch  # noqa: PLC0415

        with self._using("read"):
            try:
                with self._filesystem.open_input_stream(self._path(trial_key)) as file:
                    content = file.read()
            except FileNotFoundError:
                return None
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        except Exception as error:
            if DeviceError.of(error):
                raise
            return None  # a damaged file: the trial starts over and yields the same numbers
        return state

    def delete(self, trial_key: str) -> None:
        """Delete the checkpoint of a trial; no error if there is none.

        Raises:
            StorageError: The storage has failed.
        """
        with self._using("write to"), suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(trial_key))

    def delete_newer(self, epochs: Mapping[str, int]) -> None:
        """Delete checkpoints whose epochs were not all recorded: a trial that resumed there would lack them.

        Args:
            epochs: Recorded epochs by trial key; other trials are left alone.

        Raises:
            StorageError: The storage has failed.
        """
        for trial_key in self._saved() & epochs.keys():
            state = self.load(trial_key, "cpu")
            if state is not None and state["epoch"] > epochs[trial_key]:
                self.delete(trial_key)

    def clear(self) -> None:
        """Delete all checkpoints, and files that killed workers left half-written.

        Raises:
            StorageError: The storage has failed.
        """
        with self._using("write to"):
            self._filesystem.delete_dir_contents(self._folder, missing_dir_ok=True)

    def take_over(self, former: "Checkpoints", *, keep: bool) -> None:
        """Take the checkpoints of the same experiment under another name, if they are missing here.

        Args:
            former: On the same storage.
            keep: Whether it keeps its own.

        Raises:
            StorageError: The storage has failed.
        """
        for trial_key in former._saved() - self._saved():
            with self._using("write to"):
                self._filesystem.create_dir(self._folder, recursive=True)
                unfinished = f"{self._folder}/{trial_key}.{uuid4().hex}.part"
                self._filesystem.copy_file(former._path(trial_key), unfinished)
                self._move(unfinished, self._path(trial_key))
        if not keep:
            former.clear()

    @contextmanager
    def _using(self, purpose: str) -> Iterator[None]:
        """Turn whatever a file system raises into a `StorageError`."""
        try:
            yield
        except Exception as error:  # an S3 client of pyarrow or fsspec raises more than OSErrors
            raise StorageError(f"can't {purpose} the storage '{self}': {_reason(error)}") from error

    def _move(self, unfinished: str, path: str) -> None:
        if isinstance(self._filesystem, fs.LocalFileSystem):
            rename_durably(Path(unfinished), Path(path))
        else:
            self._filesystem.move(unfinished, path)

    def _saved(self) -> set[str]:
        folder = fs.FileSelector(self._folder, allow_not_found=True)
        with self._using("read"):
            files = self._filesystem.get_file_info(folder)
            return {file.base_name.removesuffix(".pt") for file in files if file.extension == "pt"}

    def _path(self, trial_key: str) -> str:
        return f"{self._folder}/{trial_key}.pt"


def _reason(error: Exception) -> str:
    """Return why a file system failed, without the name of the file: the same for all trials."""
    text = first_line(error)
    if text.endswith(":"):  # a list of keys follows, each with its own reason
        text = last_line(error).rpartition("': ")[2]
    found = re.search(r"(?:Detail: (?:\[errno \d+\] )?|(?=AWS Error ))(.+)", text)
    return found[1] if found else text
