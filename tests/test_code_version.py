"""What counts as other code: every edit that can change a number, and no other."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grid.train.code_version import PACKAGES, NumericCode, package_versions

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code."""
    for name in ("grid", "nets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("grid/config.py", "momentum: float = _later(0.9)", "momentum: float = _later(0.0)"),
        ("grid/train/techniques/schedules.py", "(STEP_PARTS - 1)", "STEP_PARTS"),
        ("grid/train/trial.py", "(levels - mean) ** 2", "levels**2"),
        ("nets/blocks.py", "bias=", "bias=not "),
        ("grid/parts/builtin.py", "torch.nn:SiLU", "torch.nn:GELU"),
        ("grid/data/load.py", "split_seed=split_seed,", "split_seed=split_seed + 1,"),
        ("grid/config.py", "STEP_PARTS = 3", "STEP_PARTS = 4"),
        ("grid/plan/asha.py", " < ", " <= "),
    ],
)
def test_an_edit_that_may_change_numbers_is_found_and_its_file_named(tree: Path, file: str, old: str, new: str) -> None:
    before = NumericCode.of(tree, "2.11.0")
    edit(tree / file, old, new)
    after = NumericCode.of(tree, "2.11.0")
    assert after.differing_files(before) == before.differing_files(after) == [file]
    assert not after.matches(before)
    assert after.digest != before.digest


def test_a_new_file_a_missing_file_and_a_move_are_found(tree: Path) -> None:
    before = NumericCode.of(tree, "2.11.0")
    (tree / "nets" / "new.py").write_text("x = 1\n")
    assert NumericCode.of(tree, "2.11.0").differing_files(before) == ["nets/new.py"]
    (tree / "nets" / "new.py").unlink()
    (tree / "nets" / "mlp.py").rename(tree / "nets" / "perceptron.py")
    assert NumericCode.of(tree, "2.11.0").differing_files(before) == ["nets/mlp.py", "nets/perceptron.py"]


def test_comments_docstrings_and_layout_do_not_count(tree: Path) -> None:
    before = NumericCode.of(tree, "2.11.0")
    for file in before.files:
        text = (tree / file).read_text()
        changed = re.sub(r'^( *""")(?=\w)', r"\1Now: ", text, flags=re.M).replace(":\n    ", ":  # changed\n\n    ")
        (tree / file).write_text(f'{changed}\n"another docstring"\n')
    assert NumericCode.of(tree, "2.11.0").matches(before)


@pytest.mark.parametrize("file", ["grid/driver/messages.py", "grid/plan/forecast.py", "grid/tune/tuner.py"])
def test_code_that_does_not_train_does_not_count(tree: Path, file: str) -> None:
    before = NumericCode.of(tree, "2.11.0")
    (tree / file).write_text("x = 1\n")
    assert NumericCode.of(tree, "2.11.0").matches(before)


def test_every_module_that_trains_counts(tree: Path) -> None:
    folders = ("nets", "grid/train", "grid/data")
    files = {str(file.relative_to(tree)) for folder in folders for file in (tree / folder).rglob("*.py")}
    assert files - {"grid/train/code_version.py"} < NumericCode.of(tree, "2.11.0").files.keys()


@pytest.mark.parametrize(
    ("torch", "same"),
    [("2.11.0", True), ("2.11.3+cu128", True), ("2.12.0", False), ("2.1.0", False), ("3.11.0", False)],
)
def test_another_minor_version_of_torch_is_other_code(torch: str, same: bool) -> None:
    before = NumericCode({"nets/mlp.py": "0123"}, "2.11.0+cpu")
    assert replace(before, torch=torch).matches(before) == same


def test_the_code_of_this_process_is_that_of_this_tree() -> None:
    versions = package_versions()
    assert NumericCode.here() == NumericCode.of(ROOT, versions["torch"])
    assert set(versions) == set(PACKAGES)
