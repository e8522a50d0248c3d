import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from grid.record.store import Store

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
SCRIPTS = [path for path in EXAMPLES if path.suffix == ".py"]


@pytest.fixture
def folder(glyphs_dir: Path, tmp_path: Path) -> Path:
    """An empty folder, except for the data set, which takes seconds to render."""
    (tmp_path / "data").symlink_to(glyphs_dir)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    caches = dict.fromkeys(("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), str(folder))
    return {**os.environ, **caches, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example as its docstring says, with nothing on stderr, and return what it prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_every_example_is_tested() -> None:
    names = ["one_training.ipynb", "own_activation.py", "own_net_and_data.py", "store_in_pandas.py"]
    assert [path.name for path in EXAMPLES if not path.name.startswith("_")] == names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_its_docstring_contains_its_command(path: Path) -> None:
    source = path.read_text()
    assert f"\npython examples/{path.name}" in (ast.get_docstring(ast.parse(source)) or "")
    assert len(source.splitlines()) <= 45


def test_your_own_activation_trains(folder: Path) -> None:
    printed = run("own_activation.py", folder)
    assert [line.partition(":")[0] for line in printed.splitlines()] == ["relu", "squared_relu"]
    assert min(percentages(printed)) > 30  # chance: 2


def test_your_own_net_learns_your_own_data(folder: Path) -> None:
    printed = run("own_net_and_data.py", folder)
    assert percentages(printed)[-1] > 80  # chance: 33


def test_the_store_is_read_into_pandas(folder: Path, finished_store: Store) -> None:
    printed = run("store_in_pandas.py", folder, finished_store.uri, finished_store.experiment)
    assert re.search(r"optimizer +adam +asgd +sgd", printed)
    assert re.search(r"cnn +gelu +0\.\d+", printed)
    assert (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_one_training_runs_in_a_notebook(folder: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "one_training.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "this").mkdir()
    (folder / "this" / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "", "language": "python"}))
    manager = AsyncKernelManager(
        kernel_name="this",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder)]),
        connection_file=str(folder / "k.json"),
        transport="ipc",
    )
    client = NotebookClient(notebook, km=manager, timeout=900, resources={"metadata": {"path": str(folder)}})
    asyncio.run(
        client.async_execute(
            env=environment(folder) | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, cleanup_kc=True
        )
    )
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert all(outputs.values())
    assert not [output for shown in outputs.values() for output in shown if output.output_type == "stream"]
    assert "1,880 training and" in outputs["data"][0].data["text/plain"]
