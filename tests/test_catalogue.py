import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grid.config import InputError
from grid.data.catalogue import check_per_class, find_dataset, locate
from grid.data.load import split_indices
from grid.parts.registry import DATASETS


@pytest.mark.parametrize("name", [name for name, source in DATASETS.items() if source.sizes and source.sizes.balanced])
@pytest.mark.parametrize("per_class", [None, 1, 100])
def test_forecast_sizes_equal_those_of_the_split(name: str, per_class: int | None) -> None:
    sizes = DATASETS[name].sizes
    labels = np.arange(sizes.train_size) % sizes.class_count
    train, val = split_indices(labels, sizes.class_count, per_class=per_class)
    assert sizes.split_sizes(per_class) == (len(train), len(val))


def test_forecast_of_an_unbalanced_set_is_an_upper_bound() -> None:
    sizes = DATASETS["emnist-bymerge"].sizes
    assert sizes.split_sizes() == (697_932, 0)
    assert sizes.split_sizes(100) == (4_700, 0)


@pytest.mark.parametrize("name", ["cifar", "", ".", ".."])
def test_an_unknown_name_is_refused_with_the_choices(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^unknown data set '{name}'; choose from emnist-balanced, .*, a file.npz"):
        find_dataset(name, tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there is no file .*/missing.npz; pass another --data or --data-dir$"):
        find_dataset("missing.npz", tmp_path)


def test_a_file_or_folder_is_found_from_here_or_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes.npz").touch()
    for given in ("shapes.npz", "data/shapes.npz", str(tmp_path / "data" / "shapes.npz")):
        assert locate(given, tmp_path / "data") == ("shapes.npz", tmp_path / "data")
    assert locate("glyphs", tmp_path / "data") == ("glyphs", tmp_path / "data")
    assert locate("cifar", tmp_path / "data") == ("cifar", tmp_path / "data")


def test_names_are_checked_without_importing_torch() -> None:
    heavy = "any(name in sys.modules for name in ('torch', 'torchvision', 'numpy'))"
    code = f"import sys, grid.data.catalogue; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_images_per_class_are_always_allowed() -> None:
    check_per_class(None)
    check_per_class(None, largest=3)
    check_per_class(3, largest=3)
