import subprocess
import sys

import numpy as np
import pytest

from grid.config import InputError
from grid.data.catalogue import DATASETS, check_name, check_per_class
from grid.data.load import split_indices


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.balanced])
@pytest.mark.parametrize("per_class", [None, 1, 100])
def test_forecast_sizes_equal_those_of_the_split(name: str, per_class: int | None) -> None:
    spec = DATASETS[name]
    labels = np.arange(spec.train_size) % spec.class_count
    train, val = split_indices(labels, spec.class_count, per_class=per_class)
    assert spec.split_sizes(per_class) == (len(train), len(val))


def test_forecast_of_an_unbalanced_set_is_an_upper_bound() -> None:
    assert DATASETS["emnist-bymerge"].split_sizes() == (697_932, 0)
    assert DATASETS["emnist-bymerge"].split_sizes(100) == (4_700, 0)


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"^unknown data set 'mnist'; choose from emnist-balanced, .*, glyphs$"):
        check_name("mnist")


def test_names_are_checked_without_importing_torch() -> None:
    heavy = "any(name in sys.modules for name in ('torch', 'torchvision', 'numpy'))"
    code = f"import sys, grid.data.catalogue; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_images_per_class_are_always_allowed() -> None:
    check_per_class(None)
    check_per_class(None, largest=3)
    check_per_class(3, largest=3)
