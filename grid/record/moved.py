"""A sqlite store that was moved or copied since it was last written: what it left elsewhere is taken over.

MLflow records artifact places as absolute paths, and checkpoints and reports are named after the store's own path. A
store that was moved takes all of them along; a copy gets its own, and the original stays as it is.
"""

import errno
import fcntl
import glob
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from grid.config import InputError
from grid.files import copy_folder_durably, rename_durably, write_durably
from grid.record.spool import driven_from_here
from grid.store_uri import BUSY_SECONDS, artifact_location, local_path, slug, sqlite_path
from grid.train.checkpoints import Checkpoints
from grid.wording import first_line

PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database names places of artifacts; older ones lack some."""


@dataclass(frozen=True)
class Move:
    """How an experiment of a store came to where it is now; see `find_move`."""

    uri: str
    """Of the store now."""
    experiment: str
    location: str
    """Of its artifacts, as the store has it."""
    former_uri: str | None
    """Of the store when the experiment was begun or last taken over; None if unknown."""
    is_copy: bool
    """Whether the original is still there, or may be."""

    def take_reports(self, folder: Path) -> None:
        """Give what waits in a folder of spools, undelivered, the names that it has for this store.

        Raises:
            InputError: Another process is delivering it, or it can't be written.
        """
        with self._explained("the reports that wait for it", folder):
            for old, new in self._names():
                with _locked(folder / f"{old}.lock", self.experiment):
                    self._take_reports(folder, old, new)

    def take_rest(self, storage: str) -> None:
        """Take over artifacts and checkpoints, and record their new places; only who holds the lease may.

        Raises:
            InputError: They can't be read or written.
        """
        with self._explained("its artifacts", self.location):
            self._take_artifacts()
        with self._explained("its checkpoints", storage):
            for old, new in self._names():
                Checkpoints(storage, new).take_over(Checkpoints(storage, old), keep=self.is_copy)
        with self._explained("their places", self.uri):
            self._record_places()
        print(f"the store was {self}; it has its artifacts and checkpoints here now", file=sys.stderr)

    def __str__(self) -> str:
        return f"{'copied' if self.is_copy else 'moved'} from {local_path(self.location).parent.parent}"

    def _names(self) -> Iterator[tuple[str, str]]:
        """Yield the former and the present name of what belongs to the grid, and to its finalists."""
        yield local_path(self.location).name, slug(self.uri, self.experiment)
        if self.former_uri is not None:
            finalists = f"{self.experiment} confirm"
            yield slug(self.former_uri, finalists), slug(self.uri, finalists)

    def _take_reports(self, folder: Path, old: str, new: str) -> None:
        """Copy the files, the reports themselves last: once they are there, so is the rest.

        Folders with what was set aside keep their names: nothing is delivered from them.
        """
        if (folder / f"{new}.jsonl").exists():
            return
        found = [path for path in folder.glob(f"{glob.escape(old)}.*") if path.is_file()]
        files = sorted(found, key=lambda file: file.name == f"{old}.jsonl")
        for file in files:
            write_durably(folder / f"{new}{file.name.removeprefix(old)}", file.read_bytes())
        for file in files if not self.is_copy else ():
            file.unlink()

    def _take_artifacts(self) -> None:
        recorded, target = local_path(self.location), local_path(str(artifact_location(self.uri, self.experiment)))
        beside = target.with_name(recorded.name)
        came_along = beside.is_dir() and not (recorded.is_dir() and beside.samefile(recorded))
        source = beside if came_along else recorded
        if target.exists() or not source.is_dir():
            return
        target.parent.mkdir(exist_ok=True)
        is_ours = self._is_same_file_name() if came_along else not self.is_copy
        if is_ours and _renamed(source, target):
            return
        copy_folder_durably(source, target)
        if is_ours:
            shutil.rmtree(source, ignore_errors=True)

    def _is_same_file_name(self) -> bool:
        """Return whether no other store of this folder can have the artifacts that came along."""
        former = None if self.former_uri is None else sqlite_path(self.former_uri)
        return former is not None and former.name == Path(str(sqlite_path(self.uri))).name

    def _record_places(self) -> None:
        new = str(artifact_location(self.uri, self.experiment))
        with closing(sqlite3.connect(str(sqlite_path(self.uri)), timeout=BUSY_SECONDS)) as database, database:
            for table, column in PLACES:
                if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608  (names of ours)
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (new, len(self.location) + 1, self.location, len(self.location) + 1, f"{self.location}/"),
                    )

    @contextmanager
    def _explained(self, what: str, where: object) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            problem = f"the store was {self}, and {what} can't be taken over: {where}: {first_line(error)}"
            raise InputError(f"{problem}; fix it and run the same command again") from error


def find_move(uri: str, experiment: str) -> Move | None:
    """Return where an experiment was before its store was moved or copied; None if it is where it was begun.

    Nothing is written.

    Args:
        uri: Of the store, from `check_store_uri`; only sqlite files are moved or copied with what belongs to them.
        experiment: Its name.
    """
    path = sqlite_path(uri)
    location = None if path is None else _location(path, experiment)
    if path is None or location is None or location == artifact_location(uri, experiment):
        return None
    folder = local_path(location)
    if folder.parent.name != "mlartifacts" or folder.name[:-8] != slug(uri, experiment)[:-8]:
        return None  # an experiment that somebody else made
    begun = (file for file in _candidates(folder.parent.parent, path) if folder.name in _names(file, experiment))
    former = next(begun, None)
    if former is None:
        return Move(uri, experiment, location, None, is_copy=True)
    is_there = _exists(former)
    if is_there and former.samefile(path):
        return None  # by another path, such as a link
    return Move(uri, experiment, location, _names(former, experiment)[folder.name], is_copy=is_there)


def _location(path: Path, experiment: str) -> str | None:
    query = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as database:
            (found,) = database.execute(query, (experiment,)).fetchone() or (None,)
    except sqlite3.Error:  # no database yet; else MLflow says what is wrong
        return None
    return found if isinstance(found, str) and found.startswith("file:///") else None


def _names(path: Path, experiment: str) -> dict[str, str]:
    """Return name of the experiment's artifacts -> URI of a store, for the ways in which its URI may be written."""
    uris = (f"sqlite:///{path}", f"sqlite:///{path}".replace("%", "%25").replace("?", "%3F"))
    return {slug(uri, experiment): uri for uri in uris}


def _candidates(folder: Path, path: Path) -> Iterator[Path]:
    """Yield the files that may have been the store: of this name, of the usual name, all that are still there."""
    yield folder / path.name
    yield folder / "mlflow.db"
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _renamed(source: Path, target: Path) -> bool:
    """Rename a folder, and return whether that was possible: not to another disk."""
    try:
        rename_durably(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # not for us to see


@contextmanager
def _locked(path: Path, experiment: str) -> Iterator[None]:
    """Keep out who delivers the reports of a spool, by the lock of that spool, if it has one."""
    if not path.exists():
        yield
        return
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise driven_from_here(experiment) from error
        yield
