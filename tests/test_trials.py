from dataclasses import replace
from pathlib import Path

import pytest

from grid.config import InputError
from grid.parts.registry import OPTIMIZERS
from grid.plan.packing import Packing
from grid.plan.trials import Plan, check_comparable, make_plan
from grid.run import _parser, read_request


def plan(*arguments: str) -> Plan:
    return make_plan(
        read_request(_parser().parse_args(arguments)),
        packing=Packing(1, 1.0, 0.0),
        fingerprint="abc",
        train_images=10**6,
    )


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_full_grid_is_1920_trials_and_192_controls() -> None:
    full = plan()
    assert (len(full.cells), len(full.trials), len(full.controls)) == (1920, 1920, 192)
    assert full.control_chance == 192 / 1920


@pytest.mark.parametrize(
    ("images", "options", "rungs"),
    [
        (94_000, [], (1, 3)),  # 734 steps in an epoch
        (40 * 128, [], (1, 3)),
        (40 * 128 - 1, [], (2, 6)),
        (2820, [], (2, 6)),
        (2820, ["--epochs", "27"], (2, 6, 18)),
        (2820, ["--epochs", "3"], (1,)),
        (2820, ["--epochs", "5"], (1, 3)),
        (100, [], (3,)),
        (100, ["--grace", "1"], (1, 3)),
        (2820, ["--set", "batch_size=32"], (1, 3)),
        (2820, ["--vary", "batch_size=32,128"], (2, 6)),
        (2820, ["--no-stopping"], (2, 6)),  # where accuracies are recorded; nobody is stopped
    ],
)
def test_the_first_rung_is_after_enough_steps_and_within_a_third(
    images: int, options: list[str], rungs: tuple[int, ...]
) -> None:
    request = read_request(_parser().parse_args(["--grid", "smoke", *options]))
    planned = make_plan(request, packing=Packing(1, 1.0, 0.0), fingerprint="abc", train_images=images)
    assert planned.rule.rungs(request.epochs) == rungs


def test_eighty_cells_of_the_mlp() -> None:
    assert len(plan("--only", "model=mlp", "--only", "lr_schedule=cosine", "--only", "regularization=none").cells) == 80


def test_every_trial_has_the_base_rate_of_its_optimizer_times_its_scale() -> None:
    for trial in plan("--grid", "smoke", "--lr-scales", "0.5,1").trials:
        assert trial.learning_rate == OPTIMIZERS[trial.optimizer].base_learning_rate * trial.lr_scale


def test_trials_carry_budget_data_and_device() -> None:
    trial = plan("--grid", "smoke", "--epochs", "5").trials[0]
    assert (trial.epochs, trial.data, trial.data_fingerprint, trial.device) == (5, "glyphs", "abc", "cpu")


def test_the_precision_can_be_chosen() -> None:
    assert {trial.precision for trial in plan("--grid", "smoke", "--precision", "float32").trials} == {"float32"}


def test_settings_are_those_of_all_trials_and_part_of_the_name_only_if_they_change_something() -> None:
    options = ["--grid", "smoke", "--set", "batch_size=64", "--set", "momentum=0.50", "--set", "beta1=0.9"]
    trials = plan(*options).trials
    assert {(trial.batch_size, trial.momentum, trial.beta1) for trial in trials} == {(64, 0.5, 0.9)}
    request = read_request(_parser().parse_args(options))
    assert request.experiment == "smoke-glyphs-batch_size-64-momentum-0.5"
    with pytest.raises(InputError, match=r"other settings: momentum \(0.9, now 0.5\);"):
        check_comparable(trials, plan("--grid", "smoke", "--set", "batch_size=64").trials, "x")


def test_a_setting_becomes_a_factor_and_runs_from_before_are_those_with_their_value() -> None:
    before = plan("--grid", "smoke")
    grown = plan("--grid", "smoke", "--vary", "batch_size=128,64", "--stop-within", "model,batch_size")
    assert len(grown.trials) == 2 * len(before.trials)
    assert {trial.trial_key for trial in before.trials} < {trial.trial_key for trial in grown.trials}
    assert len({trial.cell_key for trial in grown.trials}) == len(grown.cells) == 64
    assert {grown.rule.group_of(trial.cell) for trial in grown.trials} == {"mlp 128", "mlp 64", "cnn 128", "cnn 64"}
    check_comparable(grown.trials, before.trials, "x")
    check_comparable(before.trials, grown.trials, "x")
    with pytest.raises(InputError, match=r"other settings: batch_size \(128, now 64\);"):
        check_comparable(plan("--grid", "smoke", "--set", "batch_size=64").trials, before.trials, "x")


def test_a_setting_is_varied_only_where_it_matters() -> None:
    """Of the 32 cells of the smoke grid, half have sgd, a half dropout, and a half are of the MLP."""
    grown = plan("--grid", "smoke", "--vary", "momentum=0.5,0.9,0.95", "--vary", "dropout_rate=0.1,0.5")
    assert len(grown.cells) == 8 * 3 * 2 + 8 * 3 + 8 * 2 + 8
    assert len({trial.cell_key for trial in grown.trials}) == len(grown.cells)
    assert {trial.momentum for trial in grown.trials if trial.optimizer == "adam"} == {0.9}
    assert {trial.dropout_rate for trial in grown.trials if not trial.dropout} == {0.25}
    assert sum(grown.excluded.values()) == 32 * 6 - len(grown.cells)
    assert set(grown.excluded) == {
        "momentum matters only with optimizer=sgd",
        "dropout_rate matters only with dropout=on",
    }


def test_controls_keep_the_values_of_varied_settings_in_balance() -> None:
    grown = plan("--grid", "smoke", "--vary", "batch_size=128,64,32")
    sizes = [trial.batch_size for trial in grown.trials if trial.trial_key in grown.controls]
    assert [sizes.count(size) for size in (128, 64, 32)] == pytest.approx([len(sizes) / 3] * 3, abs=2)


def test_the_same_request_is_the_same_plan() -> None:
    assert plan("--grid", "smoke") == plan("--grid", "smoke")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"epochs": 27}, r"epochs \(27, now 9\)"),
        ({"data": "emnist-digits"}, r"data \(emnist-digits, now glyphs\)"),
        ({"data_fingerprint": "def"}, r"other images or another split \(def, now abc\)"),
        ({"numerics_version": 0}, r"code that yields other numbers \(0, now \d+\)"),
        (
            {"precision": "float32", "batch_size": 64},
            r"batch_size \(64, now 128\); .*precision \(float32, now bfloat16\)",
        ),
        ({"learning_rate": 0.5}, r"base rate of \w+ \(0.5, now [\d.]+\)"),
    ],
)
def test_trials_that_cannot_be_compared_are_refused_with_the_difference(
    changes: dict[str, object], difference: str
) -> None:
    trials = plan("--grid", "smoke", "--precision", "bfloat16").trials
    recorded = [replace(trials[0], **changes)]  # type: ignore[arg-type]
    message = rf"^experiment 'x' was trained with other settings: {difference}; ask for the same, or pick another --exp"
    with pytest.raises(InputError, match=message):
        check_comparable(trials, recorded, "x")


def test_more_seeds_levels_and_learning_rate_scales_can_be_compared() -> None:
    recorded = plan("--grid", "smoke").trials
    check_comparable(plan("--grid", "full", "--data", "glyphs", "--epochs", "9", "--seeds", "3").trials, recorded, "x")
    check_comparable(plan("--grid", "smoke", "--lr-scales", "0.5,2").trials, recorded, "x")
    check_comparable(recorded, [], "x")


def resume(before: Plan, *arguments: str) -> Plan:
    """Return the plan of another command, once every trial of a plan has begun."""
    begun = {trial.trial_key: trial.trial_key in before.controls for trial in before.trials}
    request = read_request(_parser().parse_args(arguments))
    return make_plan(request, packing=Packing(1, 1.0, 0.0), fingerprint="abc", train_images=10**6, begun=begun)


def test_a_grown_grid_keeps_the_controls_that_have_begun_and_draws_among_the_others() -> None:
    small = plan("--grid", "smoke")
    keys = {trial.trial_key for trial in small.trials}
    grown = resume(small, "--grid", "smoke", "--seeds", "3")
    assert grown.controls & keys == small.controls
    assert grown.controls - keys == plan("--grid", "smoke", "--seeds", "3").controls - keys
    assert (small.control_chance, grown.control_chance) == (10 / 32, 32 / 96)


def test_another_share_changes_nothing_for_the_trials_that_have_begun() -> None:
    small = plan("--grid", "smoke")
    assert resume(small, "--grid", "smoke", "--controls", "1").controls == small.controls
    grown = resume(small, "--grid", "smoke", "--controls", "0", "--lr-scales", "0.5,1")
    assert (grown.controls, grown.control_chance) == (small.controls, 0)
