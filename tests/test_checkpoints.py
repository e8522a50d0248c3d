import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from fsspec import AbstractFileSystem, register_implementation

from grid.train.checkpoints import Checkpoints, StorageError, _reason


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(str(tmp_path), "some grid")


def test_a_trial_that_was_never_saved_has_no_state(checkpoints: Checkpoints) -> None:
    assert checkpoints.load("key", "cpu") is None


def test_a_state_is_restored(checkpoints: Checkpoints) -> None:
    checkpoints.save("key", {"epoch": 3, "weights": torch.arange(4.0)})
    state = checkpoints.load("key", "cpu")
    assert state is not None
    assert state["epoch"] == 3
    assert torch.equal(state["weights"], torch.arange(4.0))


def test_the_last_state_wins_and_no_other_file_is_left(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for epoch in (1, 3):
        checkpoints.save("key", {"epoch": epoch})
    assert (checkpoints.load("key", "cpu") or {})["epoch"] == 3
    assert [path.name for path in (tmp_path / "some grid" / "checkpoints").iterdir()] == ["key.pt"]


def test_a_deleted_state_is_gone_and_may_be_deleted_again(checkpoints: Checkpoints) -> None:
    checkpoints.save("key", {"epoch": 1})
    checkpoints.delete("key")
    checkpoints.delete("key")
    assert checkpoints.load("key", "cpu") is None


def test_only_states_ahead_of_what_is_recorded_are_deleted_as_newer(checkpoints: Checkpoints) -> None:
    checkpoints.delete_newer({"nothing saved yet": 0})
    for key in ("ahead", "recorded", "never recorded", "of another grid"):
        checkpoints.save(key, {"epoch": 9})
    checkpoints.delete_newer({"ahead": 8, "recorded": 9, "never recorded": 0, "never saved": 3})
    left = [checkpoints.load(key, "cpu") is not None for key in ("ahead", "recorded", "never recorded")]
    assert left == [False, True, False]
    assert checkpoints.load("of another grid", "cpu") is not None


def test_a_storage_that_can_not_be_read_is_reported_in_one_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "some grid").mkdir()
    (tmp_path / "some grid" / "checkpoints").write_text("no folder")
    with pytest.raises(StorageError, match="^can't read the storage '"):
        checkpoints.delete_newer({})


def test_clearing_deletes_everything_and_may_be_repeated(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.clear()
    checkpoints.save("key", {"epoch": 1})
    (tmp_path / "some grid" / "checkpoints" / "other.part").touch()
    checkpoints.clear()
    assert list((tmp_path / "some grid" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", bytes(5000), b"\x80\x02}q\x00."])
def test_a_damaged_file_counts_as_no_checkpoint(content: bytes, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save("key", {"epoch": 1})
    (tmp_path / "some grid" / "checkpoints" / "key.pt").write_bytes(content)
    assert checkpoints.load("key", "cpu") is None


class Unknown:
    """A class of unknown code in a pickle."""


def test_unknown_code_is_not_loaded(checkpoints: Checkpoints) -> None:
    checkpoints.save("key", {"code": Unknown()})
    assert checkpoints.load("key", "cpu") is None


def test_a_uri_works_like_a_folder(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path.as_uri(), "some grid")
    checkpoints.save("key", {"epoch": 1})
    assert (tmp_path / "some grid" / "checkpoints" / "key.pt").exists()


class Broken(AbstractFileSystem):
    """A file system of fsspec that raises what no OSError is, as those of clouds do."""

    protocol = "broken"

    def _open(self, path: str, mode: str = "rb", **settings: object) -> NoReturn:
        raise RuntimeError("SlowDown: please reduce your request rate")

    def mkdir(self, path: str, create_parents: bool = True, **settings: object) -> None:
        pass

    def info(self, path: str, **settings: object) -> dict[str, object]:
        return {"name": path, "size": 1, "type": "file"}

    def ls(self, path: str, detail: bool = True, **settings: object) -> NoReturn:
        raise TimeoutError("the endpoint does not answer")


def test_whatever_a_storage_raises_is_one_kind_of_error_that_names_it() -> None:
    register_implementation("broken", Broken, clobber=True)
    checkpoints = Checkpoints("fsspec+broken://bucket", "some grid")
    for use in (lambda: checkpoints.save("key", {}), lambda: checkpoints.load("key", "cpu"), checkpoints.clear):
        with pytest.raises(StorageError, match=r"^can't (write to|read) the storage 'fsspec\+broken://bucket': \w+"):
            use()


def test_a_full_disk_keeps_the_last_state_and_no_part_of_the_next(small_disk: Path) -> None:
    checkpoints = Checkpoints(str(small_disk), "some grid")
    checkpoints.save("key", {"epoch": 1})
    for _ in range(3):
        with pytest.raises(StorageError, match="No space left on device"):
            checkpoints.save("key", {"weights": torch.zeros(2**20)})
    assert checkpoints.load("key", "cpu") == {"epoch": 1}
    assert [path.name for path in (small_disk / "some grid" / "checkpoints").iterdir()] == ["key.pt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_of_many_reasons_the_last_is_given_without_its_file() -> None:
    text = "Got the following 2 errors when deleting objects in S3 bucket 'grid':\n- key 'a/b.pt': Access Denied\n"
    assert _reason(OSError(f"{text}- key 'a/c.pt': Access Denied")) == "Access Denied"
    assert _reason(OSError("it ends so:")) == "it ends so:"
