import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.audit import format_audit, main, summarise_loss, tidy
from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.audited_trials import CONTINUED, GRID, audit, control, trial


def test_the_text_has_at_most_80_columns_and_leaves_unknown_figures_empty() -> None:
    text = format_audit(audit(*GRID * 120))
    assert max(map(len, text.splitlines())) <= 80
    assert "better (at most)" in text
    assert "nan" not in format_audit(audit(*GRID))


@pytest.mark.parametrize("within", [(), ("model", "lr_schedule", "activation", "optimizer")], ids=len)
def test_the_text_has_at_most_80_columns_whatever_is_compared(within: tuple[str, ...]) -> None:
    slow = [trial(0.1, lr_schedule="one_cycle") for _ in range(60)]
    fast = [trial(0.5, 0.6, 0.7, lr_schedule="step") for _ in range(60)]
    text = format_audit(audit(*GRID, *slow, *fast, within=within))
    assert "of lr_schedule=one_cycle continued" in text.replace("\n  ", " ")
    assert max(map(len, text.splitlines())) <= 80


def test_the_first_sentence_says_what_stopping_may_have_lost() -> None:
    tried = [control(0.05, 0.3, at) for at in np.linspace(0.1, 0.4, 39)]
    better = control(0.05, 0.3, 0.75)
    (loss,) = summarise_loss(found := audit(*[trial(0.1)] * 100, *CONTINUED, *tried, better))
    (lost,) = found.lost_winners.to_dict("records")
    assert loss == (
        f"mlp: of 40 controls that would have been stopped, 1 ended above the winner ({40 / 3:.2f} expected from coin "
        f"flips); at most {lost['at_most']} of 101 stopped trials would have (95%)"
    )
    assert loss[:75] in format_audit(found).replace("\n  ", " ")


def test_what_is_unknown_is_left_out_of_the_first_sentence() -> None:
    assert summarise_loss(audit(*CONTINUED)) == []
    assert summarise_loss(audit(*GRID)) == [
        "mlp: of 2 controls that would have been stopped, none ended above the winner (0.67 expected from coin flips); "
        "at most 3 of 5 stopped trials would have (95%)"
    ]
    verdict = {"control_chance": 0.5, "stop_epoch": 1.0}
    (loss,) = summarise_loss(audit(*CONTINUED[:2], control(0.1, 0.2, 0.3, **verdict), within=()))
    assert loss == (
        "of 1 control that would have been stopped, none ended above the winner (0.33 expected from coin flips)"
    )


def test_a_single_trial_has_a_text() -> None:
    assert "What stopping saved" in format_audit(audit(GRID[5]))


def test_the_text_names_the_confidence() -> None:
    assert "90% interval" in format_audit(replace(audit(*GRID), confidence=0.9))


def test_the_file_has_every_figure_on_a_line() -> None:
    found = audit(*GRID)
    values = tidy(found).groupby(["table", "quantity"])["value"].agg(list)
    assert values["regret", "winner"] == [0.72]
    assert values["lost_winners", "by_chance"] == [pytest.approx(2 / 3)]
    assert values["correlations", "spearman"] == pytest.approx(found.correlations["spearman"].tolist(), nan_ok=True)


def record(store: Store, folder: Path, manifest: bytes, verdict: int | None = None) -> None:
    """Record a grid; with a verdict, its controls would have been stopped at that epoch."""
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({"grid.json": manifest}, {})
    for seed, row in enumerate(GRID):
        config = TrialConfig(learning_rate=1e-3, epochs=9, seed=seed)
        recorder.started(config, control=bool(row["control"]))
        for epoch in (1, 3)[: 1 if row["epochs_run"] == 1 else 2]:
            accuracy = float(str(row[f"val_accuracy_at_{epoch}"]))
            report, spared = EpochReport(epoch=epoch, val_accuracy=accuracy), bool(row["control"]) and epoch == verdict
            recorder.epoch_ended(config, report, is_rung=True, spared=spared)
        if not math.isnan(final := float(str(row["final_val_accuracy"]))):
            recorder.epoch_ended(config, EpochReport(epoch=9, val_accuracy=final), is_rung=False)
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


def test_a_grid_is_audited_by_the_verdicts_that_are_recorded(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, tmp_path, b'{"rungs": {"factor": 3, "compared_within": ""}}', verdict=3)
    file = tmp_path / "audit.csv"
    assert main(["--experiment", "some grid", "--store", store.uri, "--csv", str(file)]) == 0
    out = capsys.readouterr().out.replace("\n  ", " ")
    assert "the best 1 in 3 of all trials that reached it continue; ASHA's verdict on controls is recorded" in out
    figures = pd.read_csv(file).set_index(["table", "quantity"])["value"]
    assert float(figures["baseline", "epochs"]) == 4 + 9 + 9 + 3 + 3 + 3
    assert float(figures["regret", "best_stopped_control"]) == 0.71


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.audit: can't open the store")
    assert list(tmp_path.iterdir()) == []
