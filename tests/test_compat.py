"""The lower bounds in pyproject.toml, which `make compat` proves."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import compat

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_every_dependency_has_a_lower_bound_and_no_other() -> None:
    assert len(compat.lower_bounds(PYPROJECT)) == len(tomllib.loads(PYPROJECT)["project"]["dependencies"])


@pytest.mark.parametrize("name", compat.lower_bounds(PYPROJECT))
def test_this_environment_is_within_the_bounds(name: str) -> None:
    lowest = [int(part) for part in compat.lower_bounds(PYPROJECT)[name].split(".")]
    assert [int(part) for part in version(name).split("+")[0].split(".")] >= lowest


def test_a_bound_is_installed_with_what_belongs_to_it() -> None:
    assert compat.pinned("ray", "2.52") == ["ray==2.52"]
    assert compat.pinned("mlflow", "3.10") == ["mlflow==3.10", "mlflow-skinny==3.10", "mlflow-tracing==3.10"]
