"""Fixtures that several files share: glyphs, an empty store, a finished grid.

Everything that the tests call has its tensor shapes checked, and torch has one thread, as in a trial on a CPU.
"""

import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)  # other work must not fail an example
settings.load_profile("busy machine")
install_import_hook(["nets", "grid.train"], "beartype.beartype")

from grid import store_client  # noqa: E402
from grid.config import OWN, TrialConfig, withdraw  # noqa: E402
from grid.data.glyphs import render_if_missing  # noqa: E402
from grid.driver.pictures import confusion_picture, mistake_sheet, sample_sheet  # noqa: E402
from grid.metrics import EpochReport  # noqa: E402
from grid.parts.files import loaded, unload  # noqa: E402
from grid.plan.asha import Asha  # noqa: E402  (after the hook)
from grid.record.commands import record_command  # noqa: E402
from grid.record.recorder import Recorder  # noqa: E402
from grid.record.spool import Spool  # noqa: E402
from grid.record.store import Store  # noqa: E402
from grid.train.evaluation import confused_pairs, per_class  # noqa: E402
from grid.tune.private_ray import listen_on  # noqa: E402

os.environ.pop("MLFLOW_TRACKING_URI", None)  # keep tests out of the user's store


@pytest.fixture(autouse=True)
def _no_word_while_a_store_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a busy machine from adding lines to what is printed here."""
    monkeypatch.setattr(store_client, "QUIET_SECONDS", 1e6)


@pytest.fixture(autouse=True)
def _no_store_of_another_test() -> Iterator[None]:
    """Undo `mlflow.set_tracking_uri`, which sets the environment of this process and of all that it starts."""
    yield
    mlflow.set_tracking_uri(None)


BUILT_IN = set(OWN)


def forget_parts() -> None:
    """Forget parts files and what stores declare; they are known to the whole process."""
    for file in loaded():
        unload(file.name)
    for name in OWN.keys() - BUILT_IN:
        withdraw(name)


@pytest.fixture(autouse=True)
def _no_parts_of_users() -> Iterator[None]:
    yield
    forget_parts()


@pytest.fixture(autouse=True, scope="module")
def _fresh_ray() -> Iterator[None]:
    """Make Ray forget its access token and its address after each file of tests; it would keep them for the process."""
    mode = os.environ.get("RAY_AUTH_MODE")
    yield
    if "ray" in sys.modules:
        os.environ.pop("RAY_AUTH_MODE", None)
        if mode is not None:
            os.environ["RAY_AUTH_MODE"] = mode
        listen_on(loopback=False)
        raylet = sys.modules["ray"]._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers keep what they have read in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def glyphs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the glyphs in it, rendered once; tests do not write to it."""
    folder = tmp_path_factory.mktemp("data")
    render_if_missing(folder)
    return folder


@pytest.fixture(scope="session")
def _migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, for copying: MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Store(f"sqlite:///{path}", "unused").create()
    return path


@pytest.fixture
def store_uri(_migrated_database: Path, tmp_path: Path) -> str:
    """URI of an empty sqlite store, one for each test."""
    shutil.copy(_migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def store(store_uri: str) -> Store:
    """An experiment without trials in a store of its own."""
    store = Store(store_uri, "some grid")
    store.create()
    return store


POINTS_GAINED = {"cnn": 6, "adam": 8, "asgd": -4, "gelu": 2, "on": 5}
"""Level -> percentage points that it adds to the accuracy of `play`."""
CHARACTERS = tuple("0123456789AB")
"""The classes of `finished_store`."""


def play(recorder: Recorder, config: TrialConfig, asha: Asha, *, control: bool = False) -> None:
    """Record a trial that learns by formula: better levels gain points, and ASHA stops the others.

    With `asgd`, `gelu` and an odd seed it diverges in its second epoch.
    """
    gained = sum(POINTS_GAINED.get(level, 0) for level in config.cell.values())
    luck = random.Random(config.trial_key).gauss(0, 0.5)
    recorder.started(config, control=control)
    status, accuracies, epoch = "", [math.nan], 0
    while not status:
        epoch += 1
        diverged = epoch == 2 and (config.optimizer, config.activation, config.seed % 2) == ("asgd", "gelu", 1)
        accuracy = math.nan if diverged else (60 + gained + luck) / 100 * epoch / (epoch + 0.5)
        accuracies.append(accuracy)
        continues = asha.decide(config.trial_key, group=config.model, epoch=epoch, value=accuracy, control=control)
        status = "diverged" if diverged else "" if continues else "stopped"
        status = status or ("completed" if epoch == config.epochs else "")
        report = EpochReport(epoch=epoch, val_accuracy=accuracy, epoch_seconds=2.0, diverged=diverged)
        spared = control and asha.stop_epoch(config.trial_key) == epoch
        recorder.epoch_ended(config, report, is_rung=epoch in asha.rungs, stopped=status == "stopped", spared=spared)
    recorder.ended(config, status, epochs_run=epoch, best_val_accuracy=float(np.nanmax(accuracies)))


def finalist_files() -> Mapping[str, bytes]:
    """Return what `grid.confirm` attaches to a finalist; this net reads every tenth character as the next one."""
    count = len(CHARACTERS)
    confusion = np.eye(count, dtype=np.int64) * 90 + np.roll(np.eye(count, dtype=np.int64), 1, axis=1) * 10
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels, predictions = np.arange(6), np.full(6, 7)
    return {
        "test/confusion.png": confusion_picture(confusion, CHARACTERS, "a net"),
        "test/mistakes.png": mistake_sheet(images, labels, predictions, np.linspace(0.9, 0.4, 6), CHARACTERS),
        "test/per_class.csv": pd.DataFrame(per_class(confusion, CHARACTERS)).to_csv(index=False).encode(),
        "test/confused_pairs.csv": pd.DataFrame(confused_pairs(confusion, CHARACTERS, 9)).to_csv(index=False).encode(),
    }


@pytest.fixture(scope="session")
def finished_store(_migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The experiment `finished`, with everything that a grid and its finalists leave in a store. Tests only read it.

    48 trials of 9 epochs with rungs after 1 and 3: two models, two activations, three optimizers, batch norm off and
    on, two seeds. Some are stopped, some diverge, every fourth is an unstopped control. The parent run has `grid.json`
    and `samples.png`. All cells with `adam` are finalists, with three seeds each, tested, with the files of
    `finalist_files`. No image is real and nothing is trained.
    """
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(_migrated_database, folder / "mlflow.db")
    store = Store(f"sqlite:///{folder}/mlflow.db", "finished")
    store.create()
    configs = _shuffled_configs()
    _record_grid(store, folder, configs)
    _confirm(store, folder, [config for config in configs if config.optimizer == "adam" and config.seed == 0])
    return store


def _shuffled_configs() -> list[TrialConfig]:
    crossed = product(("mlp", "cnn"), ("relu", "gelu"), ("sgd", "adam", "asgd"), (False, True), range(2))
    names = ("model", "activation", "optimizer", "batch_norm", "seed")
    settings = [dict(zip(names, levels, strict=True)) for levels in crossed]
    configs = [TrialConfig(learning_rate=0.1, epochs=9, **levels) for levels in settings]
    random.Random(0).shuffle(configs)
    return configs


def _record_grid(store: Store, folder: Path, configs: list[TrialConfig]) -> None:
    data = {"name": "glyphs", "train_images": 1200, "val_images": 600}
    manifest = {"data": data, "rungs": {"epochs": [1, 3], "factor": 3}, "commit": "0123456789ab"}
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    samples = sample_sheet(images, np.arange(60) % len(CHARACTERS), CHARACTERS)
    asha = Asha((1, 3))
    recorder = Recorder(store, Spool(folder / "grid.jsonl"))
    command = record_command(store, {"commit": "0123456789ab", "command": ["python", "-m", "grid.run"]})
    recorder.begin({"grid.json": json.dumps(manifest).encode(), "samples.png": samples}, {}, command=command)
    for number, config in enumerate(configs):
        play(recorder, config, asha, control=number % 4 == 0)
    assert recorder.close(finished=True)


def _confirm(store: Store, folder: Path, finalists: list[TrialConfig]) -> None:
    recorder = Recorder(store, Spool(folder / "confirm.jsonl"), "confirm")
    recorder.begin({}, {})
    for config, seed in product(finalists, range(3)):
        play(recorder, replace(config, seed=1000 + seed), Asha(()))
    assert recorder.close(finished=True)
    files = finalist_files()
    for trial in store.trials("confirm").values():
        store.attach(trial.run_id, files)
        accuracy = trial.metrics["best_val_accuracy"] - 0.01
        store.log_test(trial.run_id, {"test_accuracy": accuracy, "test_loss": 0.5, "test_images": 1200.0})
