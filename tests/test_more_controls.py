"""Controls drawn after a grid has ended; `train` stands in for Ray, everything else is real."""

import json
import math
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run

from analysis.store import read_experiment
from grid.config import InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.driver import experiment
from grid.driver.training import Prepared, Training
from grid.driver.watcher import restore_rungs
from grid.metrics import EpochReport
from grid.plan.asha import DEFAULT_RULE, Asha
from grid.plan.packing import Packing
from grid.plan.request import Request
from grid.plan.trials import make_plan
from grid.record.rounds import COPY, read_rounds, record_rounds
from grid.record.spool import open_spool
from grid.record.store import Store
from grid.recorded import ROUNDS, Round
from grid.run import _parser, main, read_request
from grid.train.checkpoints import Checkpoints
from grid.tune.listener import Listener

GRID = ["--grid", "smoke", "--only", "model=mlp", "--epochs", "4", "--controls", "0"]
"""16 trials, rungs after epochs 1 and 3; without a control 4 to 8 continue past the first."""


PACKING = Packing(1, 1.0, 0.0)


def accuracy(config: TrialConfig, epoch: int) -> float:
    """Return what a trial reaches: the same whenever it is trained."""
    return accuracy_of(config.trial_key, epoch)


def accuracy_of(trial_key: str, epoch: int) -> float:
    return random.Random(f"{trial_key} {epoch}").uniform(0.2, 0.4) + 0.1 * epoch


def blank_dataset() -> Dataset:
    """Return a data set of black images; no trial looks at them."""
    images, labels = np.zeros((64, 28, 28), dtype=np.uint8), np.zeros(64, dtype=np.int64)
    return Dataset("glyphs", ("a", "b"), images, labels, images, labels, fingerprint="0" * 16)


class Trainer:
    """Trains by formula, as `grid.tune.tuner.run_trials` does with Ray.

    Args:
        epochs: After so many the run is interrupted.
        diverging: Whether trials diverge in their last epoch.
    """

    def __init__(self, epochs: float = math.inf, diverging: bool = False):
        self.epochs = epochs
        self.diverging = diverging
        self.trained: list[TrialConfig] = []

    def __call__(
        self,
        trials: Sequence[TrialConfig],
        dataset: object,
        listener: Listener,
        *,
        asha: Asha,
        controls: Collection[str],
        **rest: object,
    ) -> None:
        for config in trials:
            self.trained.append(config)
            listener.started(config)
            status = self._train(config, listener, asha, config.trial_key in controls)
            if not status:
                listener.suspended(config)
                return
            listener.ended(config, status, "")

    def _train(self, config: TrialConfig, listener: Listener, asha: Asha, control: bool) -> str:
        """Return how a trial ended; empty if the run was interrupted."""
        for epoch in range(1, config.epochs + 1):
            if not self.epochs:
                listener.interrupted = True  # type: ignore[misc]
                return ""
            self.epochs -= 1
            diverged = self.diverging and epoch == config.epochs
            value = math.nan if diverged else accuracy(config, epoch)
            group = asha.rule.group_of(config.cell)
            goes_on = asha.decide(config.trial_key, group=group, epoch=epoch, value=value, control=control)
            spared = goes_on and asha.stop_epoch(config.trial_key) == epoch
            report = EpochReport(epoch=epoch, val_accuracy=value, epoch_seconds=1.0, diverged=diverged)
            listener.epoch_ended(config, report, stopped=not goes_on, spared=spared)
            if diverged or not goes_on:
                return "diverged" if diverged else "stopped"
        return "completed"


class Driver:
    """Runs the grid of this file in a folder."""

    def __init__(self, uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.uri, self.folder, self._monkeypatch = uri, folder, monkeypatch

    def request(self, *options: str) -> Request:
        return read_request(_parser().parse_args([*GRID, "--store", self.uri, "--experiment", "tiny", *options]))

    def planned(self, *options: str) -> list[TrialConfig]:
        """Return the trials of the grid."""
        return make_plan(
            self.request(*options), packing=PACKING, fingerprint=blank_dataset().fingerprint, train_images=10**6
        ).trials

    def run(self, *options: str, trainer: Trainer | None = None) -> tuple[int, Trainer]:
        """Return the exit code, and what was trained."""
        trainer = trainer or Trainer()
        self._monkeypatch.setattr("grid.tune.tuner.run_trials", trainer)
        request = self.request(*options)
        spool = open_spool(self.folder / "spool", request.store, request.experiment)
        prepared = Prepared(blank_dataset(), spool, self.store())
        training = Training(PACKING, Checkpoints(str(self.folder / "storage"), "tiny"))
        try:
            return experiment.run(request, prepared, training), trainer
        finally:
            spool.close()

    def store(self) -> Store:
        store = Store(self.uri, "tiny")
        store.create()
        return store

    def runs(self) -> dict[str, Run]:
        store = self.store()
        found = store.client.search_runs([store.experiment_id], "tags.kind = 'trial'")
        runs = {run.data.tags["trial_key"]: run for run in found}
        assert len(runs) == len(found)
        return runs

    def tags(self, name: str) -> dict[str, Any]:
        return {key: run.data.tags.get(name) for key, run in self.runs().items()}


@pytest.fixture
def driver(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.chdir(tmp_path)
    return Driver(store_uri, tmp_path, monkeypatch)


def stopped(driver: Driver) -> set[str]:
    return {key for key, status in driver.tags("status").items() if status == "stopped"}


def test_stopped_trials_are_drawn_and_trained_to_the_end_in_their_own_runs(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.run()[0] == 0
    before, among = driver.runs(), stopped(driver)
    code, trainer = driver.run("--more-controls", "3")
    assert code == 0
    assert f"controls   round 1: 3 more, drawn among {len(among)} stopped trials" in capsys.readouterr().out
    drawn = {config.trial_key for config in trainer.trained}
    assert read_rounds(driver.store()) == (Round(len(among), tuple(read_rounds(driver.store())[0].drawn)),)
    assert (len(drawn), drawn - among) == (3, set())
    after = driver.runs()
    assert {key: run.info.run_id for key, run in after.items()} == {key: run.info.run_id for key, run in before.items()}
    for key, run in after.items():
        was = before[key].data.tags
        if key not in drawn:
            assert run.to_dictionary() == before[key].to_dictionary()
            continue
        tags = run.data.tags
        assert (tags["status"], tags["control"], tags["control_chance"]) == ("completed", "true", "0.0")
        assert tags["would_stop_at_epoch"] == tags["stopped_at_epoch"] == was["stopped_at_epoch"]
        assert run.data.metrics["final_val_accuracy"] == accuracy(TrialConfig.from_params(run.data.params), 4)


def test_every_epoch_of_a_drawn_trial_is_recorded_once(driver: Driver) -> None:
    driver.run()
    _, trainer = driver.run("--more-controls", "3")
    client, runs = driver.store().client, driver.runs()
    for config in trainer.trained:
        history = client.get_metric_history(runs[config.trial_key].info.run_id, "val_accuracy")
        assert [(point.step, point.value) for point in history] == [(e, accuracy(config, e)) for e in (1, 2, 3, 4)]


def test_drawn_trials_count_at_no_later_rung(driver: Driver) -> None:
    driver.run()
    driver.run("--more-controls", "5")
    asha = Asha.of(DEFAULT_RULE, 4)
    restore_rungs(asha, driver.store().trials())
    arrived = [trial for trial in driver.store().trials().values() if trial.stop_epoch != 1]
    assert len(asha.arrivals("mlp", 1)) == 16
    assert len(asha.arrivals("mlp", 3)) == len(arrived)


@pytest.mark.parametrize("options", [["--more-controls", "3"], []])
@pytest.mark.parametrize("epochs", [1, 5])
def test_an_interrupted_round_is_finished_before_another_is_drawn(
    options: list[str], epochs: int, driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.run()
    assert driver.run("--more-controls", "3", trainer=Trainer(epochs))[0] == 130
    rounds = read_rounds(driver.store())
    left = 3 - epochs // 4
    capsys.readouterr()
    code, trainer = driver.run(*options)
    later = "; run the same command again to draw more" if options else ""
    noun = f"{left} controls"
    assert f"controls   round 1 has {noun} left to train{later}\n" in capsys.readouterr().out
    assert (code, len(trainer.trained)) == (0, left)
    assert read_rounds(driver.store()) == rounds
    statuses = driver.tags("status")
    assert {statuses[key] for key in rounds[0].drawn} == {"completed"}
    client, runs = driver.store().client, driver.runs()
    for key in rounds[0].drawn:
        history = client.get_metric_history(runs[key].info.run_id, "val_accuracy")
        assert sorted(point.step for point in history) == [1, 2, 3, 4]


def test_the_same_command_after_a_finished_round_draws_another(driver: Driver) -> None:
    driver.run()
    among = len(stopped(driver))
    for _ in range(2):
        driver.run("--more-controls", "2")
    first, second = read_rounds(driver.store())
    assert (first.among, second.among) == (among, among - 2)
    assert not set(first.drawn) & set(second.drawn)


def test_an_end_that_was_not_recorded_before_a_crash_is_recorded(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.run()
    with monkeypatch.context() as patch:
        patch.setattr("grid.driver.watcher.Watcher.ended", lambda *given: None)
        driver.run("--more-controls", "2")
    assert len(stopped(driver)) > 2
    _, trainer = driver.run()
    assert trainer.trained == []
    drawn = read_rounds(driver.store())[0].drawn
    runs = driver.runs()
    assert {(runs[key].data.tags["status"], runs[key].data.tags["control"]) for key in drawn} == {("completed", "true")}


def test_a_drawn_trial_may_diverge(driver: Driver) -> None:
    driver.run()
    driver.run("--more-controls", "2", trainer=Trainer(diverging=True))
    statuses = driver.tags("status")
    assert {statuses[key] for key in read_rounds(driver.store())[0].drawn} == {"diverged"}
    assert driver.run()[1].trained == []


def test_the_number_is_at_most_that_of_the_stopped_and_then_none_is_left(driver: Driver) -> None:
    driver.run()
    among = len(stopped(driver))
    assert len(driver.run("--more-controls", "100")[1].trained) == among
    with pytest.raises(InputError, match="^--more-controls has no trial to draw: all of 'tiny' were trained to their"):
        driver.run("--more-controls", "1")


def test_a_grid_that_has_not_ended_is_refused(driver: Driver) -> None:
    driver.run(trainer=Trainer(10))
    left = 16 - sum(status is not None for status in driver.tags("status").values())
    message = f"^--more-controls draws when a grid has ended, and {left} of 16 trials have not; run the same"
    with pytest.raises(InputError, match=message):
        driver.run("--more-controls", "1")
    assert read_rounds(driver.store()) == ()


def test_a_part_of_the_grid_is_refused(driver: Driver) -> None:
    driver.run()
    with pytest.raises(InputError, match="^--more-controls draws among all of 'tiny', and 8 were left out; ask for"):
        driver.run("--only", "dropout=on", "--more-controls", "1")


def test_chances_of_all_draws_are_combined(driver: Driver) -> None:
    driver.run("--controls", "0.25")
    for number in ("2", "3"):
        driver.run("--more-controls", number)
    (first, second), trials = read_rounds(driver.store()), read_experiment(driver.uri, "tiny").trials
    would_stop = trials["stop_epoch"].notna()
    combined = 1 - (1 - 5 / 16) * (1 - 2 / first.among) * (1 - 3 / second.among)
    assert trials.loc[would_stop, "control_chance"].tolist() == [pytest.approx(combined)] * would_stop.sum()
    assert set(trials.loc[~would_stop, "control_chance"]) == {5 / 16}
    assert (trials["control"] & would_stop).sum() >= 5


def test_rounds_before_a_trial_began_do_not_count_for_it(driver: Driver) -> None:
    driver.run()
    driver.run("--more-controls", "2")
    driver.run("--seeds", "2")
    (each,), trials = read_rounds(driver.store()), read_experiment(driver.uri, "tiny").trials
    would_stop = trials[trials["stop_epoch"].notna()]
    chances = would_stop.groupby("seed")["control_chance"].unique()
    assert [chances[0], chances[1]] == [[pytest.approx(2 / each.among)], [0]]
    before = driver.tags("controls_rounds_before")
    seeds = trials.set_index("trial_key")["seed"]
    assert {seed: {before[key] for key in seeds.index[seeds == seed]} for seed in (0, 1)} == {0: {None}, 1: {"1"}}


def test_controls_that_are_not_finished_are_noted(driver: Driver) -> None:
    driver.run()
    driver.run("--more-controls", "3", trainer=Trainer(5))
    note = "2 controls of --more-controls not trained to the end yet: run grid.run again"
    assert note in read_experiment(driver.uri, "tiny").notes


def test_another_share_keeps_what_has_begun_and_its_chance(driver: Driver) -> None:
    driver.run("--controls", "0.5", trainer=Trainer(12))
    before = {name: driver.tags(name) for name in ("control", "control_chance")}
    assert set(before["control_chance"].values()) == {"0.5"}
    driver.run("--controls", "1")
    control, chance = driver.tags("control"), driver.tags("control_chance")
    begun = before["control"].keys()
    assert {key: control[key] for key in begun} == before["control"]
    assert {key: chance[key] for key in begun} == before["control_chance"]
    assert {(control[key], chance[key]) for key in control.keys() - begun} == {("true", "1.0")}
    chances = {key: trial.control_chance for key, trial in driver.store().trials().items()}
    assert {key: chances[key] for key in before["control"]} == dict.fromkeys(before["control"], 0.5)


ROUND = Round(9, ("a", "b"))


@pytest.mark.parametrize("torn", [ROUNDS, COPY])
def test_a_crash_while_a_round_is_recorded_leaves_one_file_whole(torn: str, store: Store) -> None:
    record_rounds(store, [ROUND])
    store.attach(store.parent_id, {torn: b'[{"among": 9, "dra'})
    assert read_rounds(store) == (ROUND,)


def test_damaged_rounds_are_refused_and_noted(driver: Driver) -> None:
    driver.run()
    store = driver.store()
    store.attach(store.parent_id, {ROUNDS: b"[{}]", COPY: b"no"})
    with pytest.raises(InputError, match="^more_controls.json of experiment 'tiny' is damaged; put a whole copy"):
        driver.run()
    found = read_experiment(driver.uri, "tiny")
    assert "more_controls.json is damaged, so the chances of controls are unknown" in found.notes
    assert found.trials.loc[found.trials["stop_epoch"].notna(), "control_chance"].isna().all()


@pytest.mark.slow
def test_more_controls_with_ray(
    glyphs_dir: Path, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [*GRID, "--only", "activation=relu", "--epochs", "3", "--per-class", "20", "--data-dir", str(glyphs_dir)]
    arguments = [*small, "--store", store_uri, "--experiment", "tiny", "--address", "local"]
    assert main(arguments) == 0
    driver = Driver(store_uri, tmp_path, monkeypatch)
    among = stopped(driver)
    assert main([*arguments, "--more-controls", "2"]) == 0
    assert "2 left to run" in capfd.readouterr().out
    ((each),) = read_rounds(driver.store())
    assert (each.among, len(among & set(each.drawn))) == (len(among), 2)
    trials = read_experiment(store_uri, "tiny").trials
    assert trials["control"].sum() == (trials["control"] & (trials["status"] == "completed")).sum() == 2
    content = driver.store().artifact(ROUNDS)
    assert json.loads(content or b"") == [{"among": len(among), "drawn": list(each.drawn)}]
