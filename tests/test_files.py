import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from grid.files import copy_folder_durably, rename_durably, sync, write_durably

ROOT = Path(__file__).parents[1]


def watch_the_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which every fsync and rename is added, with the name of its file or folder."""
    seen: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        seen.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.split('.')[0]}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        seen.append(f"rename {self.name.split('.')[0]}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    return seen


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "folder").mkdir()
    (folder / "state.json").write_bytes(b"old")
    seen = watch_the_disk(monkeypatch)
    write_durably(folder / "state.json", b"new")
    assert seen == ["sync state", "rename state", "sync folder"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"state.json": b"new"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_bytes(b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "state.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"state.json": b"old"}


def test_a_file_system_that_syncs_no_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)


def test_a_file_is_moved_to_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"new")
    assert rename_durably(tmp_path / "x.part", tmp_path / "x").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_on_the_disk_before_its_copy_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old" / "inner").mkdir(parents=True)
    (tmp_path / "old" / "inner" / "file.txt").write_bytes(b"content")
    (tmp_path / "old" / "link").symlink_to("nowhere")
    (tmp_path / "new.part" / "rest").mkdir(parents=True)
    seen = watch_the_disk(monkeypatch)
    copy_folder_durably(tmp_path / "old", tmp_path / "new")
    assert {*seen[:2]} == {"sync inner", "sync file"}
    assert seen[2:] == ["sync new", "rename new", f"sync {tmp_path.name}"]
    copied = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*")}
    assert copied == {"inner", "inner/file.txt", "link"}
    assert (tmp_path / "old" / "inner" / "file.txt").exists()


def renames(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that rename a file: `path.replace(x)`, `path.rename(x)`, and those of `os` and `shutil`."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            of_module = isinstance(call.func.value, ast.Name) and call.func.value.id in ("os", "shutil")
            if call.func.attr in ("replace", "rename", "renames", "move") and (
                of_module or (len(call.args) == 1 and not call.keywords)
            ):
                yield call


def test_files_are_renamed_in_one_place_which_syncs_them() -> None:
    found = {}
    for path in sorted(path for folder in ("grid", "nets", "analysis") for path in (ROOT / folder).rglob("*.py")):
        calls = [ast.unparse(call) for call in renames(ast.parse(path.read_text()))]
        of_files = [call for call in calls if not (call.endswith(".rename('ends')") or ".rename('trials')" in call)]
        if of_files:
            found[str(path.relative_to(ROOT))] = of_files
    assert found == {
        "analysis/curves.py": ["unfinished.replace(path)"],  # a cache, which is read again if it is damaged
        "grid/files.py": ["unfinished.replace(path)"],
    }
