"""A process that lacks a home folder or a user name, as `docker run --user 1234` starts it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from grid.record.store import Store
from tests.waiting import without_waiting

SMALL = ("--grid=smoke", "--only=lr_schedule=constant", "--only=dropout=off", "--per-class=10", "--epochs=1")
UNKNOWN_USER = """
import getpass, json, os, pathlib, grid
os.setgroups([])
os.setuid(12345)  # after the imports: this user may not be able to read them
grid.surroundings.make_do()
print(json.dumps([getpass.getuser(), str(pathlib.Path.home())]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("home", "found"), [(None, "/"), ("/nonexistent", "/nonexistent")])
def test_a_user_whom_the_machine_does_not_know_has_a_name_and_a_home(home: str | None, found: str) -> None:
    unset = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {} if home is None else {"HOME": home}
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN_USER], env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert json.loads(done.stdout or "null") == ["12345", found], done.stderr


def test_who_has_a_name_and_a_home_keeps_them() -> None:
    code = "import os; before = dict(os.environ); import grid; print(dict(os.environ) == before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("problem", "exit_code", "said"),
    [
        ("MemoryError('no room\\nfor it')", 70, "can't start: MemoryError: no room for it; GRID_DEBUG=1 shows"),
        ("ImportError('libcuda.so is missing')", 70, "can't start: ImportError: libcuda.so is missing; GRID_DEBUG"),
        ("KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_a_command_that_cannot_be_imported_says_so_in_one_line(
    problem: str, exit_code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "pandas.py").write_text(f"import warnings\nwarnings.warn('old')\nraise {problem}\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-m", "analysis.rank", "--experiment=x"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith(f"analysis.rank: {said}")) == (exit_code, True), line
    done = subprocess.run(
        command, env={**variables, "GRID_DEBUG": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert "Traceback" in done.stderr


def test_what_a_library_warns_of_is_no_error() -> None:
    code = "import os, sys, warnings; sys.argv = ['-m']; import grid; warnings.warn('old'); print(dict(os.environ))"
    variables = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert (done.returncode, done.stderr, "PYTHONWARNINGS" in done.stdout) == (0, "", False)


def test_ray_is_not_started_without_its_docstrings() -> None:
    code = "import grid, os, subprocess, sys; subprocess.run([sys.executable, '-c', 'import ray.util.state.common'])"
    variables = {**os.environ, "PYTHONOPTIMIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert "NoneType" not in done.stderr


def as_unknown_user(*command: str, cwd: Path, home: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python as a user without name and home, who may read everything and write nothing but `cwd`."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become another user")
    able = "-all,+dac_read_search"
    limits = [f"--inh-caps={able}", f"--ambient-caps={able}", f"--bounding-set={able}"]
    become = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *limits]
    unset = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[1])} | ({} if home is None else {"HOME": home})
    return subprocess.run(
        [*become, sys.executable, *command],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter and write."""
    with TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("home", [None, "/root"])
def test_a_user_without_a_home_reads_a_store(home: str | None, finished_store: Store, open_folder: Path) -> None:
    shutil.copy(finished_store.uri.removeprefix("sqlite:///"), open_folder / "mlflow.db")
    (open_folder / "mlflow.db").chmod(0o666)
    done = as_unknown_user("-m", "analysis.report", "--experiment=finished", cwd=open_folder, home=home)
    assert (done.returncode, without_waiting(done.stderr)) == (0, "")


@pytest.mark.slow
def test_a_user_without_a_home_trains(open_folder: Path, glyphs_dir: Path) -> None:
    shutil.copytree(glyphs_dir, open_folder / "data")
    done = as_unknown_user("-m", "grid.run", *SMALL, "--address=local", cwd=open_folder, home="/nonexistent")
    assert (done.returncode, done.stderr) == (0, "")
    assert "16/16 done" in done.stdout
