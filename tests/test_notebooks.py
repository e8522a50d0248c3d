import ast
import asyncio
import json
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random

import matplotlib as mpl
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from analysis.stopping.figures import audit_stopping
from analysis.store import read_experiment
from grid.config import TrialConfig, cell_name
from grid.metrics import EpochReport
from grid.parts.registry import DATASETS
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

FOLDER = Path(__file__).parents[1] / "analysis" / "notebooks"
NAMES = ("01_data", "02_ranking", "03_effects", "04_stopping")
EPOCHS, RUNGS, MODELS, EXPERIMENT = 9, (1, 3), ("mlp", "cnn"), "planted"
GAIN = {"cnn": 0.1, "adam": 0.2, "gelu": 0.02}
"""What a level adds to the accuracy; the optimizer matters most."""
FINALISTS = [TrialConfig(optimizer="adam", seed=seed, learning_rate=1e-3, epochs=EPOCHS) for seed in (1000, 1001)]


@pytest.fixture(params=NAMES)
def notebook(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=nbformat.NO_CONVERT)


def test_every_notebook_is_tested() -> None:
    assert tuple(path.stem for path in sorted(FOLDER.glob("*.ipynb"))) == NAMES


def test_a_notebook_is_valid_and_carries_no_outputs(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert list(notebook.metadata) == ["kernelspec"]
    assert all((cell.outputs, cell.execution_count) == ([], None) for cell in code_cells(notebook))


def test_a_notebook_is_short_and_defines_nothing(notebook: NotebookNode) -> None:
    assert len(code_cells(notebook)) <= 12
    nodes = [type(node) for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))]
    assert not {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}.intersection(nodes)


def test_every_look_is_introduced(notebook: NotebookNode) -> None:
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown"] + ["markdown", "code"] * (len(kinds) // 2)


@pytest.fixture(scope="module")
def store_uri(_migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with a grid of stopped, completed and diverged trials, unstopped controls, and finalists."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(_migrated_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    store = Store(uri, EXPERIMENT)
    store.create()
    record(store, "trial", folder, dict(planted_trials()))
    record(store, "confirm", folder, dict.fromkeys(FINALISTS, ("completed", EPOCHS, False)))
    for run_id in store.run_ids("confirm").values():
        store.client.log_metric(run_id, "test_accuracy", 0.4321)
    return uri


def planted_trials() -> Iterator[tuple[TrialConfig, tuple[str, int, bool]]]:
    """Yield each trial with how it ended, after how many epochs, and whether it is a control."""
    techniques = list(product(("relu", "gelu"), ("sgd", "adam"), (False, True), (0, 1)))
    for model in MODELS:
        trials = [
            TrialConfig(
                model=model,
                activation=activation,
                optimizer=optimizer,
                batch_norm=batch_norm,
                seed=seed,
                learning_rate=1e-3,
                epochs=EPOCHS,
            )
            for activation, optimizer, batch_norm, seed in techniques
        ]
        trials.sort(key=lambda config: -accuracy(config, 1))
        for place, config in enumerate(trials):
            if place in (0, 1, 9, 12):
                yield config, ("completed", EPOCHS, place in (9, 12))
            elif place == len(trials) - 1:
                yield config, ("diverged", 2, False)
            else:
                yield config, ("stopped", RUNGS[place < 6], False)


def accuracy(config: TrialConfig, epoch: int) -> float:
    gains = sum(GAIN.get(level, 0) for level in config.cell.values())
    return (0.3 + gains + Random(config.trial_key).uniform(0, 0.01)) * epoch / (epoch + 1)


def record(store: Store, kind: str, folder: Path, ends: dict[TrialConfig, tuple[str, int, bool]]) -> None:
    recorder = Recorder(store, Spool(folder / f"{kind}.jsonl"), kind)
    recorder.begin({"grid.json": json.dumps({"data": {"val_images": 2350}, "rungs": {"factor": 3}}).encode()}, {})
    for config, (status, epochs_run, control) in ends.items():
        recorder.started(config, control=control)
        finite = epochs_run - (status == "diverged")
        accuracies = [accuracy(config, epoch) for epoch in range(1, finite + 1)]
        for epoch, value in enumerate(accuracies, 1):
            report = EpochReport(epoch=epoch, val_accuracy=value, epoch_seconds=2.0)
            spared = control and epoch == RUNGS[0]
            recorder.epoch_ended(config, report, is_rung=epoch in RUNGS, spared=spared)
        recorder.ended(config, status, epochs_run=epochs_run, best_val_accuracy=max(accuracies))
    assert recorder.close(finished=True, patience_seconds=120)


@pytest.fixture(scope="module")
def executed(
    request: pytest.FixtureRequest, store_uri: str, glyphs_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> NotebookNode:
    """A notebook after every cell has run, in a kernel that is reached through files, not through a port."""
    folder = tmp_path_factory.mktemp("kernel")
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "this").mkdir()
    (folder / "this" / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "", "language": "python"}))
    manager = AsyncKernelManager(
        kernel_name="this",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder)]),
        connection_file=str(folder / "k.json"),
        transport="ipc",
    )
    places = dict.fromkeys(("XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"), str(folder))
    settings = {"GRID_STORE": store_uri, "GRID_EXPERIMENT": EXPERIMENT, "GRID_DATA_DIR": str(glyphs_dir)}
    environment = {**os.environ, **places, **settings, "MPLCONFIGDIR": mpl.get_cachedir(), "OMP_NUM_THREADS": "1"}
    notebook = nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=nbformat.NO_CONVERT)
    client = NotebookClient(
        notebook, km=manager, timeout=900, startup_timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    asyncio.run(client.async_execute(env=environment, cleanup_kc=True))
    return notebook


def executing(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("executed", names, indirect=True)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: NotebookNode, cell_id: str, kind: str) -> list[str]:
    """Return what a cell shows in one kind of output."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow
@executing(*NAMES)
def test_a_notebook_shows_something_everywhere_and_warns_of_nothing(executed: NotebookNode) -> None:
    assert all(cell.outputs for cell in code_cells(executed) if cell.id != "settings")
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert [output.text for output in outputs if output.output_type == "stream"] == []


@pytest.mark.slow
@executing("01_data")
def test_the_data_are_counted_and_seen(executed: NotebookNode) -> None:
    (sizes,) = shown(executed, "load", "text/html")
    assert [f"<td>{size}</td>" in sizes for size in DATASETS["glyphs"].sizes.split_sizes()] == [True, True]
    assert [len(shown(executed, name, "image/png")) for name in ("balance", "samples", "means")] == [1, 1, 1]


@pytest.mark.slow
@executing("02_ranking")
def test_the_ranking_names_the_winner_and_its_test_accuracy(executed: NotebookNode) -> None:
    (verdict,) = shown(executed, "sure", "text/markdown")
    assert verdict.startswith(f"**{cell_name(FINALISTS[0].cell)}**: ")
    (best,) = shown(executed, "best", "text/html")
    assert best.count("finalist") == 1
    assert "43.21%" in "".join(shown(executed, "finalists", "text/html"))


@pytest.mark.slow
@executing("03_effects")
def test_the_effects_are_drawn_and_the_planted_one_comes_first(executed: NotebookNode) -> None:
    drawings = ("differences", "levels", "first", "variance")
    assert all(shown(executed, name, "image/svg+xml")[0].startswith("<svg") for name in drawings)
    (levels,) = shown(executed, "numbers", "text/html")
    assert levels.index(">optimizer<") < min(levels.index(">model<"), levels.index(">activation<"))
    (tests,) = shown(executed, "tests", "text/html")
    assert tests.index(">optimizer<") < min(tests.index(">model<"), tests.index(">activation<"))
    (rates,) = shown(executed, "divergence", "text/html")
    assert rates.index(">sgd<") < rates.index(">adam<")


@pytest.mark.slow
@executing("04_stopping")
def test_the_audit_says_what_was_saved_and_draws_every_model(executed: NotebookNode, store_uri: str) -> None:
    saved = audit_stopping(read_experiment(store_uri, EXPERIMENT).trials).savings["saved"]
    (savings,) = shown(executed, "saved", "text/html")
    assert all(f">{share:.2%}<" in savings for share in saved)
    assert len(shown(executed, "curves", "image/svg+xml")) == len(MODELS)
    assert len(shown(executed, "ends", "image/png")) == len(RUNGS)
