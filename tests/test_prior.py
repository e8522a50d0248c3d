"""A real store with grids of several kinds: which one does a dry run learn from, and what?"""

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from analysis.estimates.final_effects import measure_spread
from analysis.prior import Prior, find_prior
from analysis.store import read_experiment
from grid.config import TrialConfig
from grid.parts import LEVELS
from grid.parts.registry import GRIDS
from grid.plan.asha import DEFAULT_RULE, Asha
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.run import main
from tests.conftest import play

SMOKE = GRIDS["smoke"]
WANTED = {"data": SMOKE.data, "per_class": SMOKE.per_class, "epochs": SMOKE.epochs, "models": {"mlp"}}


def train(store: Store, folder: Path, experiment: str, models: tuple[str, ...] = ("mlp",), **described: object) -> None:
    """Record a grid of made-up curves, half of whose trials are controls."""
    store = Store(store.uri, experiment)
    store.create()
    data = {"name": SMOKE.data, "per_class": SMOKE.per_class, "val_images": 600} | described
    manifest = {"data": data, "settings": {"epochs": str(SMOKE.epochs)}, "rungs": {"factor": 3}}
    recorder = Recorder(store, Spool(folder / f"{experiment}.jsonl"))
    asha = Asha.of(DEFAULT_RULE, SMOKE.epochs)
    recorder.begin({"grid.json": json.dumps(manifest).encode()}, {})
    cells = list(product(models, LEVELS["activation"][:3], LEVELS["optimizer"][:3], (False, True)))
    random.Random(0).shuffle(cells)
    plain = TrialConfig(learning_rate=0.1, epochs=SMOKE.epochs)
    for number, (model, activation, optimizer, norm) in enumerate(cells):
        config = replace(plain, model=model, activation=activation, optimizer=optimizer, batch_norm=norm)
        play(recorder, config, asha, control=number % 2 == 0)
    assert recorder.close(finished=True)


def test_the_latest_grid_of_the_same_data_and_models_is_measured(store: Store, tmp_path: Path) -> None:
    train(store, tmp_path, "old")
    train(store, tmp_path, "new", ("mlp", "cnn"))
    train(store, tmp_path, "other data", name="emnist-mnist")
    train(store, tmp_path, "other images", per_class=7)
    trials = read_experiment(store.uri, "new").trials
    assert find_prior(store.uri, **WANTED) == Prior("new", *measure_spread(trials[trials["model"] == "mlp"]))
    both = find_prior(store.uri, **WANTED | {"models": {"mlp", "cnn"}})
    assert both == Prior("new", *measure_spread(trials))
    for other in ({"epochs": 99}, {"data": "emnist-letters"}, {"models": {"mlp", "resnet"}}):
        assert find_prior(store.uri, **WANTED | other) is None


def test_a_grid_with_too_few_controls_and_a_damaged_manifest_are_passed_over(store: Store, tmp_path: Path) -> None:
    train(store, tmp_path, "good")
    for name, content in {"damaged": b"{", "a list": b"[]", "strange": b'{"data": 3, "settings": []}'}.items():
        other = Store(store.uri, name)
        other.create()
        other.attach(other.parent_id, {"grid.json": content})
    empty = Store(store.uri, "empty")
    empty.create()
    manifest = read_experiment(store.uri, "good").manifest
    empty.attach(empty.parent_id, {"grid.json": json.dumps(dict(manifest)).encode()})
    prior = find_prior(store.uri, **WANTED)
    assert prior is not None
    assert prior.experiment == "good"
    assert 0 < prior.around_levels < 0.05


def test_a_trial_whose_kind_was_changed_is_no_description_of_its_grid(store: Store, tmp_path: Path) -> None:
    train(store, tmp_path, "edited")
    edited = Store(store.uri, "edited")
    edited.create()
    edited.client.set_tag(next(iter(edited.run_ids().values())), "kind", "grid")
    prior = find_prior(store.uri, **WANTED)
    assert prior is not None
    assert prior.experiment == "edited"


def test_without_a_store_there_is_no_prior_and_none_is_created(tmp_path: Path) -> None:
    assert find_prior(f"sqlite:///{tmp_path}/none.db", **WANTED) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_says_from_where_it_knows_the_width_of_the_effects(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--grid", "smoke", "--only", "model=mlp", "--dry-run", "--store", store.uri, "--data-dir", "data"]
    assert main(command) == 0
    assert "around their forecast (assumed)" in " ".join(capsys.readouterr().out.split())
    train(store, tmp_path, "before")
    assert main(command) == 0
    assert "around their forecast in experiment 'before'" in " ".join(capsys.readouterr().out.split())
