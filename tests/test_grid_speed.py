import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from torch import Tensor, nn

from benchmarks import grid_speed
from benchmarks.grid_speed import (
    CELLS,
    DEFAULT_CONTENDERS,
    Images,
    Job,
    installed,
    isolate,
    main,
    our_arguments,
    peer_arguments,
    rotate,
    time_command,
)
from benchmarks.grid_speed_table import Row, append_row, compare, paired, read_rows, read_store, report
from benchmarks.peers import common
from grid.config import InputError, TrialConfig
from grid.parts.registry import OPTIMIZERS
from grid.run import _parser, read_request
from grid.train.trial import _generator, assemble_net
from nets.pooling import PooledActivation

ROW = Row(
    model="mlp",
    contender="ours",
    repeat=0,
    wall_seconds=20.0,
    trials=4,
    epochs=8,
    epoch_seconds=24.0,
    best_val_accuracy=0.75,
    cells=4,
    seeds=1,
    budget=3,
    data="glyphs",
    train_images=1000,
    val_images=500,
    slots=2,
    commit="abc",
)
IMAGES = Images("glyphs", Path("/data"), 20, Path("/split.npz"), 940, 2350)


def peer(repeat: int, wall: float, epochs: int = 8) -> Row:
    return replace(ROW, contender="tune", repeat=repeat, wall_seconds=wall, epochs=epochs, best_val_accuracy=0.74)


def test_seconds_samples_and_overhead_are_of_the_whole_run() -> None:
    assert ROW.seconds_per_epoch == 2.5
    assert ROW.samples_per_second == 1000 * 8 / 20
    assert ROW.overhead == (20 - 24 / 2) / 4


def test_ratios_pair_the_runs_of_one_repeat() -> None:
    rows = [ROW, replace(ROW, repeat=1, wall_seconds=10.0), peer(1, 80.0), peer(0, 40.0), peer(2, 1.0)]
    pairs = paired(rows, "ours", "tune")
    assert [(ours.repeat, theirs.wall_seconds) for ours, theirs in pairs] == [(0, 40.0), (1, 80.0)]
    head, fast, whole, accuracy, learning = compare("tune", pairs)
    assert head == "ours against tune, 2 paired repeats: median (min to max)"
    assert fast.endswith("5.00 (2.00 to 8.00) times")
    assert whole.endswith("5.00 (2.00 to 8.00) times")
    assert accuracy.endswith("+1.00 (+1.00 to +1.00) points")
    assert learning.endswith("yes (mean +1.00, 95% interval +1.00 to +1.00)")


def test_the_ratio_per_epoch_does_not_penalise_a_contender_that_trains_more() -> None:
    _, fast, whole, *_ = compare("tune", [(ROW, peer(0, 40.0, epochs=16))])
    assert "1.00 (1.00 to 1.00)" in fast
    assert "2.00 (2.00 to 2.00)" in whole


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((0.75,), "not known from one repeat"),
        ((0.75, 0.76, 0.77), "open (mean +2.00, 95% interval -0.48 to +4.48)"),
        ((0.75, 0.752, 0.754), "yes (mean +1.20, 95% interval +0.70 to +1.70)"),
        ((0.71, 0.712, 0.714), "no (mean -2.80, 95% interval -3.30 to -2.30)"),
    ],
)
def test_learning_is_judged_by_an_interval_over_the_repeats(accuracies: Sequence[float], verdict: str) -> None:
    """Student's 2.5 % point with 2 degrees of freedom is 4.303."""
    pairs = [(replace(ROW, best_val_accuracy=accuracy), peer(0, 1.0)) for accuracy in accuracies]
    assert compare("tune", pairs)[-1].endswith(verdict)


def test_report_fits_eighty_columns() -> None:
    rows = [
        replace(row, wall_seconds=1234.5, train_images=697_932, val_images=116_323) for row in (ROW, peer(0, 1.0))
    ] + [replace(ROW, model="cnn")]
    lines = report(rows).splitlines()
    assert max(map(len, lines)) <= 80
    (ours,) = [line for line in lines if line.startswith("ours ") and "1234.5" in line]
    assert ours.split() == ["ours", "1234.5", "(1234-1234)", "4", "8", "154.31", "4,523", "305.62", "s", "75.00%"]
    assert lines[-1] == "commit abc"


def test_report_says_when_cells_are_missing() -> None:
    assert "ours, repeat 0: 3 trials for 4 cells" in report([replace(ROW, trials=3)])
    assert "ours, repeat 0: 4 trials for 4 cells x 2 seeds" in report([replace(ROW, seeds=2)])
    assert "trials for" not in report([replace(ROW, seeds=2, trials=8)])
    assert "trials for" not in report([ROW])


def test_rows_with_different_settings_are_not_put_into_one_table() -> None:
    with pytest.raises(InputError, match="mlp has runs with different settings"):
        report([ROW, replace(ROW, budget=9)])
    report([ROW, replace(ROW, model="cnn", budget=9)])


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ROW, peer(0, 0.1 + 0.2)]
    for row in rows:
        append_row(tmp_path / "speed.csv", row)
    assert read_rows(tmp_path / "speed.csv") == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a,b\n1,2\n", "its header line differs"), (None, "No such file")],
)
def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "speed.csv").write_text(text)
    with pytest.raises(InputError, match=problem):
        read_rows(tmp_path / "speed.csv")


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    append_row(path, ROW)
    path.write_text(path.read_text().replace("20.0", "soon"))
    with pytest.raises(InputError, match="has a damaged line: .*'soon'"):
        read_rows(path)


def test_a_store_is_read_as_mlflow_wrote_it(store_uri: str) -> None:
    client = mlflow.MlflowClient(store_uri)
    experiment = client.create_experiment("grid")
    runs = [client.create_run(experiment).info.run_id for _ in range(4)]
    for run, accuracies in zip(runs, ((0.5, 0.7), (0.6, float("nan")), (), (0.9,)), strict=True):
        for epoch, accuracy in enumerate(accuracies, start=1):
            client.log_metric(run, "val_accuracy", accuracy, step=epoch)
            client.log_metric(run, "epoch_seconds", 2.0, step=epoch)
    client.delete_run(runs[-1])
    stored = read_store(Path(store_uri.removeprefix("sqlite:///")))
    assert (stored.trials, stored.epochs, stored.epoch_seconds, stored.best_val_accuracy) == (2, 4, 8.0, 0.7)


def test_a_store_without_a_trial_is_refused(store_uri: str) -> None:
    with pytest.raises(InputError, match="holds no trial"):
        read_store(Path(store_uri.removeprefix("sqlite:///")))


def test_each_contender_takes_each_place_in_the_order() -> None:
    orders = [rotate(("a", "b", "c"), repeat) for repeat in range(3)]
    assert {tuple(sorted(place)) for place in zip(*orders, strict=True)} == {("a", "b", "c")}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--contenders", "ours,rely"], "unknown contender 'rely'; choose from ours, tune, optuna, ours_f32"),
        (["--contenders", "ours,ours"], "--contenders must differ, got ours,ours"),
        (["--data", "cifar"], "unknown data set 'cifar'"),
        (["--report", "/nowhere/speed.csv"], "cannot read /nowhere/speed.csv"),
    ],
)
def test_a_wrong_argument_is_reported_in_one_line_with_exit_code_2(
    arguments: Sequence[str], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--data-dir", str(tmp_path)] if "--report" not in arguments else arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.grid_speed: {problem}")


@pytest.mark.parametrize(
    "arguments", [("--model", "rnn"), ("--repeats", "0"), ("--epochs", "0"), ("--per-class", "0")], ids=" ".join
)
def test_what_the_parser_refuses_is_one_line(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_contender_that_is_not_installed_is_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grid_speed.NEEDED, "optuna", ("no_such_package",))
    assert installed(DEFAULT_CONTENDERS.split(",")) == ["ours", "tune"]
    message = 'optuna is skipped: no_such_package not installed; run: pip install -e ".[bench]"\n'
    assert capsys.readouterr().err == message
    with pytest.raises(InputError, match="no contender is left"):
        installed(["optuna"])


def test_the_environment_of_a_contender_names_no_cluster_and_no_store() -> None:
    environment = isolate(
        {"RAY_ADDRESS": "1.2.3.4:5", "MLFLOW_TRACKING_URI": "http://x", "HOME": "/h", "PYTHONPATH": "/a"}
    )
    assert "RAY_ADDRESS" not in environment
    assert "MLFLOW_TRACKING_URI" not in environment
    assert environment["HOME"] == "/h"
    assert environment["PYTHONPATH"] == f"{grid_speed.ROOT}:/a"


def test_the_error_of_a_command_that_fails_holds_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(grid_speed.subprocess.CalledProcessError) as caught:
        time_command([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path, "a title")
    assert (caught.value.returncode, caught.value.output) == (3, "why")


@pytest.mark.parametrize("model", CELLS)
def test_both_sides_train_the_same_cells(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(model, CELLS[model], IMAGES, 3, seeds=2)
    request = read_request(_parser().parse_args(our_arguments(job, "auto")))
    monkeypatch.setattr(sys, "argv", ["script", *peer_arguments(job, slots=2, repeat=3), "--store", "sqlite:///x.db"])
    task = common.read_task()
    assert request.levels["model"] == (task.model,)
    assert sorted(request.levels["optimizer"]) == sorted(task.optimizers)
    assert sorted(request.levels["activation"]) == sorted(task.activations)
    assert all(
        len(request.levels[factor]) == 1 for factor in ("lr_schedule", "batch_norm", "regularization", "dropout")
    )
    assert (request.seeds, task.seeds) == (2, (6, 7))
    assert (request.epochs, request.data, request.data_dir) == (task.epochs, task.data, task.data_dir)


def kinds(layers: Iterable[nn.Module]) -> list[str]:
    """Return the names of torch's layers that do the same, in the order of the forward pass."""
    plain: list[nn.Module] = []
    for layer in layers:
        plain += [layer.norm, layer.activation, nn.MaxPool2d(2)] if isinstance(layer, PooledActivation) else [layer]
    return [type(layer).__name__.removeprefix("Seeded").removesuffix("Pixels") for layer in plain]


def with_parameters(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the layers that have parameters of their own."""
    return [layer for layer in layers if any(True for _ in layer.parameters())]


def our_layers(model: str, activation: str, initialization: str) -> nn.Sequential:
    cell = {"model": model, "activation": activation, "batch_norm": "on", "dropout": "on"}
    config = TrialConfig.from_params({**cell, "initialization": initialization, "learning_rate": "1.0", "epochs": "1"})
    net = assemble_net(config, image_shape=(1, 28, 28), classes=47, dropout=_generator(config, "dropout", "cpu"))
    assert isinstance(net.layers, nn.Sequential)
    return net.layers


@pytest.mark.parametrize("activation", common.ACTIVATIONS)
@pytest.mark.parametrize("model", CELLS)
def test_the_nets_of_the_peers_are_ours(model: str, activation: str) -> None:
    ours = our_layers(model, activation, "torch")
    torch.manual_seed(0)  # the weights below are a sample: a fixed one, or the test would fail now and then
    theirs = common.build_net(model, activation, 47)
    assert kinds(theirs) == kinds(ours)
    for our_layer, their_layer in zip(with_parameters(ours), with_parameters(theirs), strict=True):
        for our_weights, their_weights in zip(our_layer.parameters(), their_layer.parameters(), strict=True):
            assert our_weights.shape == their_weights.shape
            assert_equal_deviations(our_weights, their_weights)


def assert_equal_deviations(first: Tensor, second: Tensor) -> None:
    """Assert that two samples of n uniform weights have one standard deviation, within 4.5 standard errors.

    The standard error of the logarithm of one sample deviation is about sqrt(1 / 5 / (n - 1)), of the difference of two
    sqrt(2) times that: a tolerance of 17 % for the 288 weights of the first convolution, and of 0.6 % for 200,704.
    """
    stds = [float(weights.detach().std()) for weights in (first, second)]
    if 0 in stds:  # the scale or shift of a batch norm: constants
        assert stds == [0, 0]
    else:
        assert math.log(stds[0] / stds[1]) == pytest.approx(0, abs=4.5 * math.sqrt(0.4 / (first.numel() - 1)))


def test_nets_with_other_initial_weights_would_be_noticed() -> None:
    ours, torchs = our_layers("cnn", "elu", "he"), common.build_net("cnn", "elu", 47)
    for our_layer, torch_layer in zip(with_parameters(ours), with_parameters(torchs), strict=True):
        if isinstance(our_layer, nn.Linear | nn.Conv2d):
            with pytest.raises(AssertionError):
                assert_equal_deviations(our_layer.weight, torch_layer.weight)


@pytest.mark.parametrize("name", common.OPTIMIZERS)
def test_learning_rates_of_the_peers_are_ours(name: str) -> None:
    (group,) = common.OPTIMIZERS[name](common.build_net("mlp", "relu", 47).parameters()).param_groups
    assert group["lr"] == OPTIMIZERS[name].base_learning_rate
    assert group["weight_decay"] == 0
    assert group.get("momentum", 0) == (0.9 if name == "sgd" else 0)


@pytest.mark.slow
def test_real_runs_are_timed_and_paired(glyphs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "speed.csv"
    arguments = ["--quick", "--model", "mlp", "--contenders", "ours,tune", "--data-dir", str(glyphs_dir)]
    assert main([*arguments, "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out
    assert "ours against tune, 1 paired repeat:" in printed
    ours, tune = read_rows(csv)
    assert (ours.contender, tune.contender) == ("ours", "tune")
    for row in (ours, tune):
        assert (row.trials, row.train_images, row.val_images) == (2, 940, 2350)
        assert row.trials <= row.epochs <= row.trials * row.budget
        assert 0 < row.epoch_seconds / row.slots < row.wall_seconds
        assert row.best_val_accuracy > 5 / 47
    assert main(["--report", str(csv)]) == 0
    assert capsys.readouterr().out == printed
