"""Compares every fast path with the plain way: float32, contiguous, pooling last, penalties as terms of the loss."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fast_paths import CELLS, compare, configs, main
from grid.config import TrialConfig
from grid.data.load import load
from grid.parts.registry import LR_SCHEDULES, OPTIMIZERS
from grid.train import trial as trial_module
from grid.train.techniques.penalties import penalised_weights
from grid.train.trial import DeviceData, Trial
from nets.dropout import SeededDropout
from nets.pooling import PooledActivation

STEPS, BATCH = 200, 32
TOLERANCES = {"float32": 0.005, "bfloat16": 0.05}
"""Largest difference between mean losses of 20 steps, in nats; a loss starts near log 47 = 3.85."""
LATER = 0.05
"""The same for the last 100 steps: rounding grows from step to step, on some CPUs to 0.02."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DeviceData:
    """Glyphs; an epoch has 40 steps of 32 images."""
    dataset = load("glyphs", tmp_path_factory.mktemp("glyphs"), per_class=28)
    return DeviceData.from_dataset(dataset)


def config(precision: str, **levels: object) -> TrialConfig:
    """Return a small net with the settings that `grid.run` chooses, at a fifth of the base rate unless given.

    A rate is given where the loss falls so steeply at a fifth that rounding alone moves it by the tolerance.
    """
    rate = OPTIMIZERS[str(levels.get("optimizer", "adam"))].base_learning_rate / 5
    small = {"hidden_sizes": "64-32", "channels": "6-8", "dense_size": 32, "batch_size": BATCH, "epochs": 5}
    strengths = {"l1_strength": 1e-3, "l2_strength": 1e-2}
    fast = {"precision": precision, "memory_format": "channels_last", "fused": True}
    return TrialConfig(**{"learning_rate": rate, **small, **strengths, **fast, **levels})


@contextmanager
def losses_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Collect the loss of every training step of a `Trial`."""
    losses: list[float] = []

    def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        if loss.requires_grad:
            losses.append(loss.item())
        return loss

    functions = type("functions", (), {"cross_entropy": staticmethod(cross_entropy)})
    with monkeypatch.context() as patch:
        patch.setattr(trial_module, "F", functions)
        yield losses


def plain_layers(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers with torch's own norm, activation and pooling, in this order."""
    for layer in net.layers:
        if isinstance(layer, PooledActivation):
            yield from filter(None, (layer.norm, layer.activation, nn.MaxPool2d(2)))
        else:
            yield layer


def plain_losses(config: TrialConfig, data: DeviceData) -> list[float]:
    """Train the way a textbook does, from the same weights and with the same batches and dropout masks."""
    trial = Trial(config, data)
    net = trial.net.to(memory_format=torch.contiguous_format)
    layers, weights = list(plain_layers(net)), penalised_weights(net)
    optimizer_spec = OPTIMIZERS[config.optimizer]
    optimizer = optimizer_spec.build(
        net.parameters(), lr=config.learning_rate, foreach=False, **optimizer_spec.options(config)
    )
    steps = len(data.train_labels) // BATCH
    scheduler = LR_SCHEDULES[config.lr_schedule](config, optimizer, config.epochs * steps)
    losses = []
    for _ in range(config.epochs):
        order = torch.randperm(len(data.train_labels), generator=trial._order)
        for batch in order.split(BATCH)[:steps]:
            features = (data.train_images[batch].float() - data.mean) / data.std
            for layer in layers:
                if isinstance(layer, SeededDropout) and features.ndim == 4:  # masks are drawn in the order of memory
                    features = features.contiguous(memory_format=torch.channels_last)
                features = layer(features).contiguous()
            loss = F.cross_entropy(features, data.train_labels[batch])
            penalty = 0.0
            if config.regularization in ("l1", "elastic"):
                penalty = penalty + config.l1_strength * sum(weight.abs().sum() for weight in weights)
            if config.regularization in ("l2", "elastic"):
                penalty = penalty + config.l2_strength / 2 * sum(weight.square().sum() for weight in weights)
            optimizer.zero_grad()
            (loss + penalty).backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses


@pytest.fixture(
    scope="module",
    params=[
        {"model": "mlp"},
        {"model": "mlp", "batch_norm": True, "dropout": True, "activation": "gelu", "regularization": "elastic"},
        {"model": "mlp", "optimizer": "rmsprop", "regularization": "l1", "lr_schedule": "one_cycle"},
        {"model": "mlp", "optimizer": "adagrad", "regularization": "l2", "lr_schedule": "cosine"},
        {"model": "cnn", "learning_rate": 3e-4},
        {"model": "cnn", "batch_norm": True, "dropout": True, "activation": "elu", "regularization": "elastic"},
        {"model": "cnn", "optimizer": "sgd", "activation": "leaky_relu", "regularization": "l2", "learning_rate": 3e-3},
        {"model": "cnn", "optimizer": "nadam", "activation": "silu", "batch_norm": True, "lr_schedule": "step"},
    ],
    ids=lambda levels: " ".join(map(str, levels.values())),
)
def plain(request: pytest.FixtureRequest, data: DeviceData) -> tuple[dict[str, object], list[float]]:
    """Levels, and the losses of the plain way, which are those of both precisions."""
    return request.param, plain_losses(config("float32", **request.param), data)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_loss_curve_of_200_steps_equals_the_plain_one(plain, precision, data, monkeypatch):
    levels, plain_curve = plain
    fast = config(precision, **levels)
    with losses_recorded(monkeypatch) as losses:
        trial = Trial(fast, data)
        for _ in range(fast.epochs):
            trial.run_epoch()
    assert len(losses) == len(plain_curve) >= STEPS
    ours, theirs = ([statistics.mean(chunk) for chunk in chunks(curve)] for curve in (losses, plain_curve))
    assert theirs[-1] < theirs[0] - 0.2  # the loss falls, so there is something to compare
    half = len(ours) // 2
    assert ours[:half] == pytest.approx(theirs[:half], abs=TOLERANCES[precision])
    assert ours[half:] == pytest.approx(theirs[half:], abs=max(LATER, TOLERANCES[precision]))


def chunks(losses: list[float], size: int = 20) -> list[list[float]]:
    return [losses[begin : begin + size] for begin in range(0, len(losses), size)]


def test_the_benchmark_compares_trials_that_differ_only_in_their_numerics():
    plain, fast = configs(CELLS[0], seed=3, epochs=2, precision="bfloat16", name="glyphs")
    assert (plain.precision, plain.memory_format, plain.fused) == ("float32", "contiguous", False)
    assert (fast.precision, fast.memory_format, fast.fused) == ("bfloat16", "channels_last", True)
    assert plain.cell == fast.cell
    assert plain.seed == fast.seed == 3


def test_the_benchmark_finds_a_difference_where_there_is_one():
    same = compare([0.5, 0.6, 0.55], [0.51, 0.59, 0.55])
    different = compare([0.5, 0.6, 0.55], [0.4, 0.5, 0.451])
    assert same.within_noise
    assert not different.within_noise
    assert different.mean == pytest.approx(-0.0997, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "cifar"], "unknown data set 'cifar'; choose from"),
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
    ],
)
def test_a_wrong_argument_is_reported_in_one_line_with_exit_code_2(arguments, problem, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.fast_paths: {problem}")
