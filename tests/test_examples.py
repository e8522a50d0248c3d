import ast
import asyncio
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from grid.config import TrialConfig
from grid.plan.asha import Asha
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.conftest import play

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PARTS = [path for path in EXAMPLES if path.name.startswith("own_")]
FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = {"T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"}
SCRIPTS = [path for path in EXAMPLES if path.suffix == ".py"]


@pytest.fixture
def folder(glyphs_dir: Path, tmp_path: Path) -> Path:
    """An empty folder, except for the data set, which takes seconds to render."""
    (tmp_path / "data").symlink_to(glyphs_dir)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    caches = dict.fromkeys(("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), str(folder))
    return {**os.environ, **caches, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}


def python(*arguments: str, folder: Path, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command, used = [sys.executable, *arguments], variables or environment(folder)
    return subprocess.run(command, cwd=folder, env=used, capture_output=True, text=True, check=False)


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example as its docstring says, with nothing on stderr, and return what it prints."""
    done = python(str(ROOT / "examples" / name), *arguments, folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_every_example_is_tested() -> None:
    names = ["one_training.ipynb", "own_activation.py", "own_factor.py", "own_net_and_data.py", "store_in_pandas.py"]
    assert [path.name for path in EXAMPLES if not path.name.startswith("_")] == names


def command_of(path: Path) -> str:
    """Return the command in the docstring of an example."""
    (command,) = re.findall(r"^python .*", ast.get_docstring(ast.parse(path.read_text())) or "", re.MULTILINE)
    return command


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_how_it_is_run(path: Path) -> None:
    assert f"examples/{path.name}" in command_of(path)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_each_part_takes_15_lines_at_most(path: Path) -> None:
    tree = ast.parse(path.read_text())
    parts = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Expr)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in parts[1:]]  # the first is the docstring
    assert max(lengths) <= 15


HELD = [word for held in ("model=mlp", "dropout=off", "optimizer=adam") for word in ("--only", held)]


def run_grid(path: Path, folder: Path, *options: str) -> str:
    """Run the command of an example of parts with further options, and return what it prints."""
    words = shlex.split(command_of(path).replace(f"examples/{path.name}", str(path)))
    options = ("--address", "local", "--per-class", "20", "--epochs", "3", *options)
    done = python(*words[1:], *options, folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [("own_activation.py", "squared_relu"), ("own_factor.py", "clipping=0.1")],
)
def test_an_activation_and_a_factor_of_your_own_are_trained_ranked_and_reported(
    name: str, found: str, folder: Path
) -> None:
    printed = run_grid(ROOT / "examples" / name, folder, *HELD)
    cells = int(re.findall(r"(\d+) cells", printed)[0])
    assert f"\n{cells}/{cells} done" in printed
    assert found in printed.partition("rank")[2]
    assert found.partition("=")[0] in (folder / "report.html").read_text()
    assert percentages(printed.partition("rank")[2])[0] > 30  # chance: 2


def cut_fashion(folder: Path, **images: int) -> None:
    """Write the first images of Fashion-MNIST, 28 x 28 bytes each, as its own files have them."""
    folder.mkdir()
    for part, number in zip(("train", "t10k"), images.values(), strict=True):
        for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            name = f"{part}-{kind}-ubyte.gz"
            with gzip.open(FASHION / name) as whole:
                content = whole.read(header + number * size)
            (folder / name).write_bytes(gzip.compress(content, 1))


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_a_net_and_data_of_your_own_are_confirmed_and_read_images_without_the_project(folder: Path) -> None:
    path, images = ROOT / "examples" / "own_net_and_data.py", folder / "fashion"
    cut_fashion(images, train=2000, test=500)
    held = ["--only", "activation=relu", "--only", "batch_norm=on"]
    printed = run_grid(path, folder, *held, "--data-dir", str(images))
    assert "small_resnet one_cycle relu" in printed
    experiment = re.findall(r"--experiment (\S+)", printed)[0]
    options = ["--experiment", experiment, "--top", "1", "--seeds", "2", "--register", "clothes", "--address", "local"]
    confirm = ["-m", "grid.confirm", *options, "--data-dir", str(images)]
    refused = python(*confirm, folder=folder)
    assert refused.returncode == 2
    assert (
        "unknown model 'small_resnet'; choose from cnn, mlp, resnet, or add it with --parts FILE.py" in refused.stderr
    )
    done = python(*confirm, "--parts", str(path), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    words = read_without_the_project(folder)
    assert len(words) == 2
    assert set(words) <= CLOTHES


def read_without_the_project(folder: Path) -> list[str]:
    """Return what the registered model takes two black images for, in a process that sees no file of the project."""
    code = (
        "import mlflow, numpy as np\n"
        f"mlflow.set_tracking_uri('sqlite:///{folder}/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/clothes/1')\n"
        "print(model.predict(np.zeros((2, 28, 28), dtype=np.uint8)))\n"
    )
    (folder / "elsewhere").mkdir()
    alone = {name: value for name, value in environment(folder).items() if name != "PYTHONPATH"}
    read = python("-P", "-c", code, folder=folder / "elsewhere", variables=alone)
    assert read.returncode == 0, read.stderr
    words: list[str] = ast.literal_eval(read.stdout.strip().splitlines()[-1])
    return words


def test_the_store_is_read_into_pandas_whatever_its_first_rung_is(folder: Path, store: Store) -> None:
    recorder, asha = Recorder(store, Spool(folder / "spool.jsonl")), Asha((2, 6))
    recorder.begin({}, {})
    for seed in range(6):
        config = TrialConfig(learning_rate=0.1, epochs=9, seed=seed, optimizer=("adam", "sgd")[seed % 2])
        play(recorder, config, asha)
    assert recorder.close(finished=True)
    assert re.search(r"optimizer +adam +sgd", run("store_in_pandas.py", folder, store.uri, store.experiment))


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
