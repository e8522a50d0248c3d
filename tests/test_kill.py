"""A real grid on a real Ray, killed in the middle and continued: what every other promise rests on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from grid.config import TrialConfig
from grid.data.load import load
from grid.record.store import Store
from grid.train.trial import DeviceData, train

TINY = ("--grid", "smoke", "--only", "model=mlp", "--only", "activation=relu", "--per-class", "60", "--epochs", "9")


def recorded(store: Store) -> dict[str, list[tuple[int, float]]]:
    """Return trial key -> (epoch, validation accuracy), failing on a second run of any trial."""
    runs = store.client.search_runs([store.experiment_id], "tags.kind = 'trial'")
    keys = [run.data.tags["trial_key"] for run in runs]
    assert len(keys) == len(set(keys))
    histories = [store.client.get_metric_history(run.info.run_id, "val_accuracy") for run in runs]
    return {key: [(point.step, point.value) for point in history] for key, history in zip(keys, histories, strict=True)}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # the driver, its Ray and its workers
    process.wait()


def test_a_killed_grid_continues_and_its_numbers_are_those_of_plain_trainings(
    store_uri: str, glyphs_dir: Path, tmp_path: Path
) -> None:
    shared = ("--controls", "1", "--data-dir", str(glyphs_dir), "--store", store_uri, "--experiment", "tiny")
    command = [sys.executable, "-m", "grid.run", *TINY, *shared, "--address", "local"]
    store = Store(store_uri, "tiny")
    store.create()
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        while sum(map(len, recorded(store).values())) < 10:  # of 72 epochs
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        kill_group(first)
    assert sum(map(len, recorded(store).values())) < 72
    again = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=1200)
    assert again.returncode == 0, again.stderr
    epochs = recorded(store)
    assert [sorted(step for step, _ in points) for points in epochs.values()] == [list(range(1, 10))] * 8
    trial = next(iter(store.trials().values()))
    data = DeviceData.from_dataset(load("glyphs", glyphs_dir, per_class=60))
    assert epochs[trial.config.trial_key] == plain(trial.config, data)


def plain(config: TrialConfig, data: DeviceData) -> list[tuple[int, float]]:
    return [(report.epoch, report.val_accuracy) for report in train(config, data).reports]
