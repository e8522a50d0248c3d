"""The command as a user gives it, with Ray, sqlite and real trainings."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from analysis.rank import main as rank
from grid.config import FACTORS, InputError, TrialConfig
from grid.driver import experiment
from grid.driver.experiment import _as_recorded, _check_same_rule, _describe_rule
from grid.metrics import EPOCH_METRICS, STATUSES
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.plan.trials import Plan, make_plan
from grid.record.__main__ import main as replay
from grid.record.recorder import Recorder
from grid.record.store import Store
from grid.run import _parser, main, read_request
from tests.waiting import wait_until, without_waiting

TINY = ["--grid", "smoke", "--only", "model=mlp", "--only", "activation=relu", "--per-class", "20", "--epochs", "3"]


@pytest.fixture
def arguments(store_uri: str, glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*TINY, "--data-dir", str(glyphs_dir), "--store", store_uri, "--experiment", "smoke-glyphs"]


def runs(uri: str, kind: str) -> list[Run]:
    store = Store(uri, "smoke-glyphs")
    store.create()
    return list(store.client.search_runs([store.experiment_id], f"tags.kind = '{kind}'"))


@pytest.mark.slow
def test_a_grid_runs_to_its_table_the_same_command_runs_nothing_twice_and_one_more_seed_what_is_missing(
    arguments: list[str], store_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    check_finished(*capfd.readouterr(), store_uri, tmp_path)
    first = {run.info.run_id: run.data.metrics for run in runs(store_uri, "trial")}
    assert main(arguments) == 0
    assert {run.info.run_id: run.data.metrics for run in runs(store_uri, "trial")} == first
    capfd.readouterr()
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "8 left to run" in capfd.readouterr().out
    assert len(runs(store_uri, "trial")) == 16
    assert len(runs(store_uri, "grid")) == 1
    assert rank(["--experiment", "smoke-glyphs", "--store", store_uri]) == 0
    assert "8 of 8 cells shown; 16 trials" in capfd.readouterr().out


def check_finished(out: str, err: str, store_uri: str, tmp_path: Path) -> None:
    assert without_waiting(err) == ""
    assert "8/8 done | 0 running" in out
    assert re.search(r"^   1  +\d\d\.\d\d%  +3/3 +mlp cosine relu ", out, re.MULTILINE)
    (parent,) = runs(store_uri, "grid")
    trials = runs(store_uri, "trial")
    assert len(trials) == len({run.data.tags["trial_key"] for run in trials}) == 8
    for run in trials:
        check_contract(run, parent.info.run_id)
    manifest = json.loads(next((tmp_path / "mlartifacts").rglob("grid.json")).read_text())
    assert (manifest["cells"], manifest["trials"]) == (8, 8)
    assert manifest["rungs"] == {"epochs": [1], "factor": 3, "compared_within": "model"}
    assert manifest["settings"]["data_fingerprint"] == trials[0].data.params["data_fingerprint"]
    assert list(tmp_path.glob("spool/*.jsonl")) == []
    assert out.endswith(f"report     file://{tmp_path}/report.html\n")
    assert "Matters at the end" in (tmp_path / "report.html").read_text()


def check_contract(run: Run, parent_id: str) -> None:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    assert tags["mlflow.parentRunId"] == parent_id
    assert tags["status"] in STATUSES
    assert (run.info.status, tags["control"] in ("true", "false")) == ("FINISHED", True)
    config = TrialConfig.from_params(params)
    assert (config.trial_key, config.cell_key) == (tags["trial_key"], tags["cell_key"])
    assert {*FACTORS, "seed", "lr_scale", "learning_rate", "epochs", "batch_size", "dropout_rate", "precision"} <= set(
        params
    )
    final = {"final_val_accuracy"} if tags["status"] == "completed" else set()
    every = set(EPOCH_METRICS) - {"val_balanced_accuracy"}  # all classes of glyphs have one size
    assert set(metrics) == {*every, "best_val_accuracy", "epochs_run", "val_accuracy_at_1", *final}
    assert ("val_correct" in tags) == bool(final)
    assert not final or metrics["final_val_accuracy"] == metrics["val_accuracy"]
    assert ("stopped_at_epoch" in tags) == (tags["status"] == "stopped")
    assert not [name for name in metrics if "test" in name]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start the command and wait until trials run."""
    command = [sys.executable, "-m", "grid.run", *arguments]
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, text=True, start_new_session=True)
    wait_until(lambda: "left to run" in log.read_text() or process.poll() is not None, 600)
    return process


def trains(process: subprocess.Popen[str], store_uri: str) -> bool:
    """Return whether a trial has reported an epoch."""
    assert process.poll() is None
    return any("val_accuracy" in run.data.metrics for run in runs(store_uri, "trial"))


@pytest.mark.slow
def test_ctrl_c_ends_a_run_gracefully_and_a_second_driver_is_refused(
    arguments: list[str], store_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--epochs", "200"]
    process = start(arguments, tmp_path)
    try:
        assert main(arguments) == 2
        assert capfd.readouterr().err.startswith("grid.run: experiment 'smoke-glyphs' is being run by another process")
        wait_until(lambda: trains(process, store_uri), 600, explain=(tmp_path / "log-0").read_text)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
    finally:
        process.kill()
    log = (tmp_path / "log-0").read_text()
    assert f"interrupted; continue with:  python -m grid.run {' '.join(arguments)}" in log
    assert "Traceback" not in log
    assert "KILLED" in {run.info.status for run in runs(store_uri, "trial")} <= {"KILLED", "FINISHED"}
    assert list(tmp_path.glob("spool/*.jsonl")) == []


@pytest.mark.slow
def test_without_stopping_all_complete_and_a_grid_of_another_budget_or_rule_is_refused_and_changes_nothing(
    arguments: list[str], store_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--no-stopping"]) == 0
    assert {run.data.tags["status"] for run in runs(store_uri, "trial")} == {"completed"}
    before = [run.to_dictionary() for run in runs(store_uri, "trial")]
    refusals = {
        ("--epochs", "5", "--no-stopping"): "trained with other settings: epochs (3, now 5)",
        ("--seeds", "2"): "stopped early by another rule (factor 1, now 3)",
    }
    for options, reason in refusals.items():
        capfd.readouterr()
        assert main([*arguments, *options]) == 2
        assert capfd.readouterr().err.startswith(f"grid.run: experiment 'smoke-glyphs' was {reason}")
    assert [run.to_dictionary() for run in runs(store_uri, "trial")] == before
    (parent,) = runs(store_uri, "grid")
    assert (parent.info.status, parent.data.tags["driver"]) == ("FINISHED", "")


CPUS = Packing(2, 1.0, 0.0)


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        (["--no-stopping"], "factor 3, now 1"),
        (["--stop-factor", "2"], "factor 3, now 2"),
        (["--grace", "2"], "epochs [1], now [2]"),
        (["--stop-within", "model,dropout"], "compared_within 'model', now 'model,dropout'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_stopping_rule_for_an_experiment_is_refused(other: list[str], changed: str) -> None:
    with pytest.raises(InputError) as refused:
        check_rules([], other)
    assert str(refused.value) == (
        f"experiment 'tiny' was stopped early by another rule ({changed}); ask for the same --grace, --stop-factor, "
        "--stop-within and --no-stopping, or pick another --experiment"
    )


def test_the_same_stopping_rule_and_stores_that_do_not_know_theirs_are_accepted() -> None:
    check_rules(["--grace", "2"], ["--grace", "2", "--controls", "0.5"])
    _check_same_rule({}, *planned([]), "tiny")
    _check_same_rule({"rungs": "unknown"}, *planned([]), "tiny")


@pytest.mark.parametrize(
    ("options", "rungs", "grace"),
    [
        ([], {"epochs": [2, 6]}, 2),
        ([], {"epochs": [1, 3]}, 1),
        (["--grace", "3"], {"epochs": [2, 6]}, 3),
        ([], {"epochs": []}, None),
        ([], {"epochs": [0, 3]}, 1),  # edited
        ([], {"epochs": ["one"]}, None),
        ([], "unknown", None),
    ],
)
def test_an_experiment_keeps_its_first_rung_unless_another_is_asked_for(
    options: list[str], rungs: object, grace: int | None
) -> None:
    request = read_request(_parser().parse_args([*TINY, "--experiment", "tiny", *options]))
    assert _as_recorded(request, {"rungs": rungs}, CPUS).rule.grace == grace


@pytest.mark.parametrize(
    ("options", "recorded", "precision"),
    [
        ([], "bfloat16", "bfloat16"),
        (["--precision", "float32"], "bfloat16", "float32"),  # refused later, with the reason
        ([], "edited", "auto"),
        ([], "tf32", "auto"),  # CPUs lack it
    ],
)
def test_an_experiment_keeps_its_precision_unless_another_is_asked_for(
    options: list[str], recorded: str, precision: str
) -> None:
    request = read_request(_parser().parse_args([*TINY, "--experiment", "tiny", *options]))
    assert _as_recorded(request, {"settings": {"precision": recorded}}, CPUS).precision == precision


def check_rules(before: list[str], now: list[str]) -> None:
    """Check the rule of a command against the manifest of another command."""
    _check_same_rule({"rungs": _describe_rule(*planned(before))}, *planned(now), "tiny")


def planned(options: list[str]) -> tuple[Plan, Asha]:
    request = read_request(_parser().parse_args([*TINY, "--experiment", "tiny", *options]))
    return Plan([], {}, [], frozenset(), rule=request.rule), Asha.of(request.rule, request.epochs)


@pytest.mark.slow
def test_a_server_that_is_down_at_the_end_is_reported_with_the_command_that_delivers(
    arguments: list[str], store_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log_batch = MlflowClient.log_batch

    def refuse(client: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **named: Any) -> None:
        if metrics:
            raise OSError("the cable is cut")
        log_batch(client, run_id, metrics, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        patch.setattr(Recorder.close, "__kwdefaults__", {"patience_seconds": 1.0})
        assert main([*arguments, "--only", "batch_norm=on"]) == 1
    err = capfd.readouterr().err
    kept = "the rest is kept in .*/spool; deliver it with: "
    assert re.match(rf"^not everything has reached sqlite.*: the cable is cut\n{kept}", err)
    assert replay(["--replay", "--experiment", "smoke-glyphs", "--store", store_uri]) == 0
    assert [run.data.tags["status"] in STATUSES for run in runs(store_uri, "trial")] == [True] * 4


@pytest.mark.slow
def test_the_death_of_ray_ends_the_driver_with_the_command_that_continues(
    arguments: list[str], store_uri: str, tmp_path: Path
) -> None:
    process = start([*arguments, "--epochs", "200"], tmp_path)
    wait_until(lambda: trains(process, store_uri), 600, explain=(tmp_path / "log-0").read_text)
    children = psutil.Process(process.pid).children(recursive=True)
    (raylet,) = [child for child in children if child.name() == "raylet"]
    raylet.kill()
    assert process.wait(100) == 1
    log = (tmp_path / "log-0").read_text()
    assert "Ray died during the run; continue with:  python -m grid.run --grid smoke" in log


@pytest.mark.slow
def test_a_failed_trial_is_exit_code_1_and_the_others_are_done(
    arguments: list[str], store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_first_trial(*given: object, **named: object) -> Plan:
        plan = make_plan(*given, **named)  # type: ignore[arg-type]
        vanishing = {"model": "cnn", "channels": "-".join(["4"] * 6)}  # halve an image until nothing is left
        broken = TrialConfig.from_params({**plan.trials[0].to_params(), **vanishing})
        return Plan(plan.cells, plan.excluded, [broken, *plan.trials[1:]], plan.controls)

    monkeypatch.setattr(experiment, "make_plan", break_first_trial)
    assert main(arguments) == 1
    statuses = [run.data.tags["status"] for run in runs(store_uri, "trial")]
    assert (len(statuses), statuses.count("failed")) == (8, 1)
    (failed,) = [run for run in runs(store_uri, "trial") if run.data.tags["status"] == "failed"]
    assert failed.info.status == "FAILED"
    assert "Error" in failed.data.tags["error"].partition(":")[0]


@pytest.mark.slow
def test_a_dry_run_forecasts_the_full_grid_and_starts_and_writes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, grid.run, ray\n"
        "code = grid.run.main(['--dry-run', '--price-per-hour', '2'])\n"
        "assert not ray.is_initialized()\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert "1,920 cells" in found.stdout
    assert re.search(r"^epochs     1[01],\d\d\d expected of 51,840", found.stdout, re.MULTILINE)
    assert re.search(r"^time +\d", found.stdout, re.MULTILINE)
    assert re.search(r"^price +[\d.,]+ at 2 per hour", found.stdout, re.MULTILINE)
    assert found.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("EMNIST_DIR"), reason="needs EMNIST files: set EMNIST_DIR to their folder")
def test_real_images_are_learned(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = Path(os.environ["EMNIST_DIR"]).absolute()
    monkeypatch.chdir(tmp_path)
    only = ["model=mlp", "lr_schedule=cosine", "activation=gelu", "regularization=none", "batch_norm=on", "dropout=off"]
    arguments = ["--data", "emnist-bymerge", "--data-dir", str(data_dir), "--store", store_uri, "--per-class", "200"]
    arguments += [f"--only={levels}" for levels in only]
    assert main([*arguments, "--epochs", "9", "--experiment", "smoke-glyphs"]) == 0
    assert max(run.data.metrics["best_val_accuracy"] for run in runs(store_uri, "trial")) > 0.75
