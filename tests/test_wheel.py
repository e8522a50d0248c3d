"""The wheel, as a user installs it: into another environment, used in an empty folder, away from the source tree."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("analysis", "grid", "nets")
NOT_INSTALLED = ("benchmarks", "examples", "tests")
TINY = (
    "--grid=smoke",
    "--only=model=mlp",
    "--only=activation=relu",
    "--only=dropout=off",
    "--per-class=10",
    "--epochs=2",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the tree builds."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, *NOT_INSTALLED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(source)]
    subprocess.run([sys.executable, *build], check=True, timeout=1800)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # Seven gigabytes are borrowed, not installed again. What makes this project importable here is a .pth file of its
    # own, which Python does not read in a folder that is borrowed like this.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=1800)
    return python


def test_the_wheel_holds_every_module_and_page_and_nothing_else(wheel: Path) -> None:
    files = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {file for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    assert files == {str(file.relative_to(ROOT)) for file in modules} | {"analysis/page/report.html"}


@pytest.mark.slow
def test_an_installed_wheel_runs_a_grid_confirms_and_reports_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import analysis, grid, nets; print(analysis.__file__, grid.__file__, nets.__file__)")
    assert all(Path(file).is_relative_to(python.parents[1]) for file in where.split())
    assert run("-c", "import importlib.util; print(importlib.util.find_spec('benchmarks'))") == "None\n"
    assert "4/4 done" in run("-m", "grid.run", *TINY, "--address=local", "--experiment=tiny")
    assert "tested" in run("-m", "grid.confirm", "--experiment=tiny", "--top=1", "--seeds=1", "--address=local")
    assert "finalists" in run("-m", "analysis.rank", "--experiment=tiny")
    run("-m", "analysis.report", "--experiment=tiny")
    assert "Best cell" in (tmp_path / "report.html").read_text()
