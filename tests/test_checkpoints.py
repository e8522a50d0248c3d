from pathlib import Path

import pytest
import torch

from grid.train.checkpoints import Checkpoints


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


def test_clearing_deletes_everything_and_may_be_repeated(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.clear()
    checkpoints.save("key", {"epoch": 1})
    (tmp_path / "some grid" / "checkpoints" / "other.part").touch()
    checkpoints.clear()
    assert list((tmp_path / "some grid" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", b"\0" * 4096])
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
