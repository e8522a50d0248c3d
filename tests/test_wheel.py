"""The wheel, installed into a fresh environment, in an empty folder: a grid, its confirmation, and the report."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("grid", "nets", "analysis")
BESIDE = ("tests", "benchmarks", "examples", "pyproject.toml", "README.md", "LICENSE")
"""What a build finds beside the code."""
SMALL = ("--only=activation=relu", "--only=optimizer=adam", "--only=dropout=off", "--per-class=10", "--epochs=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, so that the build leaves nothing in it."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (*CODE, *BESIDE):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(tree)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which finds the packages of this one, but not this checkout.

    A path in a .pth file is searched for packages, but .pth files in it, such as that of an editable install, are not
    read.
    """
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Run Python in a folder, without the variables that would let it find this checkout; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_code_and_the_page_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {str(file.relative_to(ROOT)) for name in CODE for file in (ROOT / name).rglob("*.py")}
    assert names == code | {"analysis/page/report.html"}


def test_an_installed_wheel_runs_a_grid_confirms_it_and_writes_the_report(python: Path, tmp_path: Path) -> None:
    imported = run(python, tmp_path, "-c", "import grid, nets, analysis; print(grid.__file__)")
    assert Path(imported.strip()).is_relative_to(python.parents[1])
    run(python, tmp_path, "-m", "grid.run", "--grid=smoke", "--experiment=e", "--address=local", *SMALL)
    run(python, tmp_path, "-m", "grid.confirm", "--experiment=e", "--top=1", "--seeds=2", "--address=local")
    run(python, tmp_path, "-m", "analysis.report", "--experiment=e")
    assert "</html>" in (tmp_path / "report.html").read_text()
