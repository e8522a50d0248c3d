"""What the factors of a parts file do in a training, and that it can be repeated and resumed."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from grid.config import InputError, TrialConfig
from grid.parts.files import PartsFile, load
from grid.train.conformance import random_images
from grid.train.trial import Trial

FILE = """
import torch
from torch import nn
from grid import parts

@parts.on_images("noise", ("off", "0.1", "0.5"))
def noise(images, use):
    drawn = torch.randn(images.shape, generator=use.generator)
    return images + float(use.level) * drawn

@parts.on_loss("scaled", ("1", "3"))
def scaled(loss, logits, labels, use):
    assert logits.shape == (32, 5) and labels.shape == (32,)
    return float(use.level) * loss

@parts.on_net("frozen", ("no", "yes"))
def frozen(net, use):
    for parameter in list(net.parameters())[:2]:
        parameter.requires_grad_(False)
    return net

@parts.on_net("wrapped", ("no", "yes"))
def wrapped(net, use):
    return nn.Sequential(net, nn.Dropout(0.0))

parts.setting("ceiling", 0.01)

@parts.on_gradients("clipped", ("no", "yes"))
def clipped(parameters, use):
    for parameter in parameters:
        parameter.grad.clamp_(-use.config.setting("ceiling"), use.config.setting("ceiling"))

@parts.on_images("twice", ("no", "yes"))
def inverted(images, use):
    return -images

@parts.on_batch("reversed", ("no", "yes"))
def reversed_classes(images, targets, use):
    assert images.shape == (32, 1, 8, 8) and targets.shape == (32, 5)
    return images, targets.flip(1)

@parts.on_averages("swa", ("no", "yes"))
def stochastic_weight_averaging(averages, weights, step, use):
    for average, weight in zip(averages, weights):
        average.lerp_(weight, 1 / step)

@parts.on_prediction("mirrored", ("no", "yes"))
def mirrored(predict, images, use):
    return predict(images) + predict(images.flip(3))

@parts.on_loss("twice", ("no", "yes"))
def doubled(loss, logits, labels, use):
    return 2 * loss
"""
DATA = random_images((1, 8, 8), 5)


@pytest.fixture(autouse=True)
def _parts() -> None:
    load([PartsFile("own.py", FILE)])


def config(**levels: str) -> TrialConfig:
    params = {"optimizer": "sgd", "learning_rate": "0.01", "epochs": "2", "batch_size": "32", "hidden_sizes": "16"}
    return replace(TrialConfig.from_params({**params, **levels}), shared_seed=True)


def trained(**levels: str) -> list[torch.Tensor]:
    trial = Trial(config(**levels), DATA)
    for _ in range(2):
        trial.run_epoch()
    return [value.clone() for value in trial.net.state_dict().values()]


def saved_and_read(trial: Trial) -> dict[str, Any]:
    saved = io.BytesIO()
    torch.save(trial.state_dict(), saved)
    saved.seek(0)
    state: dict[str, Any] = torch.load(saved, weights_only=True)
    return state


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_first_levels_do_nothing() -> None:
    firsts = {"noise": "off", "scaled": "1", "frozen": "no", "wrapped": "no", "clipped": "no", "twice": "no"}
    firsts |= {"reversed": "no", "swa": "no", "mirrored": "no"}
    assert equal(trained(**firsts), trained())


@pytest.mark.parametrize(
    "levels", [{"noise": "0.1"}, {"noise": "0.5"}, {"scaled": "3"}, {"clipped": "yes"}, {"reversed": "yes"}]
)
def test_every_other_level_acts_and_is_repeatable(levels: dict[str, str]) -> None:
    assert not equal(trained(**levels), trained())
    assert equal(trained(**levels), trained(**levels))


def test_levels_of_a_factor_differ() -> None:
    assert not equal(trained(noise="0.1"), trained(noise="0.5"))


def test_a_factor_on_the_loss_scales_the_gradients() -> None:
    """Under plain SGD three times the loss is three times the rate; momentum is linear, too."""
    scaled = trained(scaled="3", momentum="0.0")
    faster = Trial(replace(config(momentum="0.0"), learning_rate=0.03), DATA)
    for _ in range(2):
        faster.run_epoch()
    for a, b in zip(scaled, faster.net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reported_loss_is_the_cross_entropy_whatever_is_trained() -> None:
    """With a rate so low that nothing is learned, both report the same."""
    plain, scaled = (Trial(replace(config(scaled=level), learning_rate=1e-12), DATA) for level in ("1", "3"))
    assert plain.run_epoch().train_loss == pytest.approx(scaled.run_epoch().train_loss, rel=1e-6)


@pytest.mark.parametrize("regularization", ["l1", "l2", "elastic"])
def test_weights_that_are_not_trained_are_not_penalised(regularization: str) -> None:
    trial = Trial(config(frozen="yes", regularization=regularization), DATA)
    before = next(trial.net.parameters()).clone()
    trial.run_epoch()
    assert torch.equal(next(trial.net.parameters()), before)


def test_a_level_that_a_factor_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="unknown noise '0.7'; choose from 0.1, 0.5, off"):
        Trial(config(noise="0.7"), DATA)


def test_a_factor_on_the_net_may_freeze_or_wrap_it() -> None:
    start = [value.clone() for value in Trial(config(), DATA).net.state_dict().values()]
    end = trained(frozen="yes")
    assert [torch.equal(a, b) for a, b in zip(start, end, strict=True)] == [True, True, False, False]
    assert isinstance(Trial(config(wrapped="yes"), DATA).net, nn.Sequential)
    assert equal(trained(wrapped="yes"), trained())


def test_gradients_are_clipped_by_the_setting_of_the_trial() -> None:
    ends = [trained(clipped="yes", ceiling=ceiling) for ceiling in ("0.01", "0.001", "1000.0")]
    assert not equal(ends[0], ends[1])
    assert equal(ends[2], trained())


def test_targets_are_the_labels_unless_a_factor_changes_them() -> None:
    trial = Trial(config(reversed="yes"), DATA)
    images, labels = DATA.train_images[:32].float(), DATA.train_labels[:32]
    _, targets = trial._actions.on_batch(images, labels, classes=5)
    assert torch.equal(targets.argmax(dim=1), 4 - labels)
    assert Trial(config(), DATA)._actions.on_batch(images, labels, classes=5)[1] is labels


def test_a_net_is_evaluated_with_the_averages_of_its_weights_and_trained_with_its_own() -> None:
    averaged, plain = Trial(config(swa="yes"), DATA), Trial(config(), DATA)
    path: list[list[torch.Tensor]] = []
    change = averaged._actions.on_averages

    def note(averages: list[torch.Tensor], weights: list[torch.Tensor], step: int) -> None:
        path.append([weight.clone() for weight in weights])
        assert step == len(path)
        change(averages, weights, step)

    averaged._actions.on_averages = note
    for _ in range(2):
        averaged.run_epoch()
        plain.run_epoch()
    assert equal(list(averaged.net.parameters()), list(plain.net.parameters()))
    with averaged.evaluating():
        for average, steps in zip(averaged.net.parameters(), zip(*path, strict=True), strict=True):
            torch.testing.assert_close(average.detach(), torch.stack(steps).mean(dim=0))


def test_averages_take_the_place_of_those_of_the_optimizer() -> None:
    trials = [Trial(config(swa=level, optimizer="asgd"), DATA) for level in ("no", "yes")]
    losses = [[trial.run_epoch().val_loss for _ in range(2)][-1] for trial in trials]
    assert losses[0] != losses[1]


def test_a_net_predicts_as_a_factor_says_in_validation_and_test() -> None:
    trial, plain = Trial(config(mirrored="yes"), DATA), Trial(config(), DATA)
    with trial.evaluating(), plain.evaluating():
        images = DATA.val_images
        torch.testing.assert_close(trial.logits(images), plain.logits(images) + plain.logits(images.flip(3)))
    assert trial.run_epoch().val_loss != plain.run_epoch().val_loss
    assert equal(list(trial.net.parameters()), list(plain.net.parameters()))


def test_two_factors_that_keep_averages_are_refused() -> None:
    with pytest.raises(InputError, match="swa and weight_averaging both keep averages of the weights; hold all but"):
        Trial(config(swa="yes", weight_averaging="ema"), DATA)


def test_a_factor_may_act_at_two_places() -> None:
    trial = Trial(config(twice="yes"), DATA)
    images, logits, labels = torch.ones(2, 1, 8, 8), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    changed, unchanged = trial._actions.on_batch(images, labels, classes=5)
    assert torch.equal(changed, -images)
    assert unchanged is labels
    assert trial._actions.on_loss(torch.tensor(1.5), logits, labels).item() == 3.0


def test_evaluation_sees_images_as_they_are() -> None:
    plain, noisy = Trial(config(), DATA), Trial(config(noise="0.5"), DATA)
    with plain.evaluating(), noisy.evaluating():
        assert torch.equal(plain.logits(DATA.val_images), noisy.logits(DATA.val_images))


@pytest.mark.parametrize(
    "levels",
    [
        {"noise": "0.5"},
        {"clipped": "yes", "noise": "0.1"},
        {"wrapped": "yes"},
        {"augmentation": "elastic", "mixup": "on", "label_smoothing": "on"},
        {"weight_averaging": "ema", "test_time_shifts": "on"},
    ],
)
def test_a_resumed_training_draws_on_where_it_was(levels: dict[str, str]) -> None:
    first = Trial(config(**levels), DATA)
    first.run_epoch()
    resumed = Trial(config(**levels), DATA)
    resumed.load_state_dict(saved_and_read(first))
    last = resumed.run_epoch().val_loss
    assert equal([value.clone() for value in resumed.net.state_dict().values()], trained(**levels))
    assert last == first.run_epoch().val_loss


def test_a_checkpoint_of_before_parts_were_known_can_be_resumed() -> None:
    first, again = Trial(config(), DATA), Trial(config(), DATA)
    first.run_epoch()
    state = saved_and_read(first)
    del state["own"]
    again.load_state_dict(state)
    assert again.run_epoch().val_loss == first.run_epoch().val_loss
