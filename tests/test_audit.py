from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.audit import format_audit, main, tidy
from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.test_stopping import GRID, audit


def test_the_text_has_at_most_80_columns_and_leaves_unknown_figures_empty() -> None:
    text = format_audit(audit(*GRID * 120))
    assert max(map(len, text.splitlines())) <= 80
    assert "better (at most)" in text
    assert "nan" not in format_audit(audit(*GRID))


def test_a_single_trial_has_a_text() -> None:
    assert "What stopping saved" in format_audit(audit(GRID[5]))


def test_the_text_names_the_confidence() -> None:
    assert "90% interval" in format_audit(replace(audit(*GRID), confidence=0.9))


def test_the_file_has_every_figure_on_a_line() -> None:
    found = audit(*GRID)
    values = tidy(found).groupby(["table", "quantity"])["value"].agg(list)
    assert values["regret", "winner"] == [0.72]
    assert values["correlations", "spearman"] == pytest.approx(found.correlations["spearman"].tolist(), nan_ok=True)


def record(store: Store, folder: Path, manifest: bytes) -> None:
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({"grid.json": manifest}, {})
    for seed, row in enumerate(GRID):
        config = TrialConfig(learning_rate=1e-3, epochs=9, seed=seed)
        recorder.started(config, control=bool(row["control"]))
        for epoch in (1, 3)[: 1 if row["epochs_run"] == 1 else 2]:
            accuracy = float(str(row[f"val_accuracy_at_{epoch}"]))
            recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=True)
        best, ran = float(str(row["best_val_accuracy"])), int(str(row["epochs_run"]))
        recorder.ended(config, str(row["status"]), epochs_run=ran, best_val_accuracy=best)
    recorder.close(finished=True)


def test_a_recorded_grid_is_audited_with_the_factor_of_its_manifest(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, tmp_path, b'{"rungs": {"factor": 2}}')
    file = tmp_path / "audit.csv"
    assert main(["--experiment", "some grid", "--store", store.uri, "--csv", str(file)]) == 0
    assert "the best 1 in 2 of a model's trials" in capsys.readouterr().out.replace("\n  ", " ")
    figures = pd.read_csv(file).set_index(["table", "quantity"])["value"]
    assert float(figures["savings", "epochs_run"]) == 4 + 9 + 9 + 3 + 18


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.audit: can't open the store")
    assert list(tmp_path.iterdir()) == []
