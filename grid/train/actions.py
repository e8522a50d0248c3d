"""What factors beside those of every grid do in a training, each at its place; some are built in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from grid.config import InputError, TrialConfig
from grid.parts.registry import ACTIONS, Code, Site

Predict = Callable[[Tensor], Tensor]
"""From scaled images `[batch, channel, height, width]` to logits `[batch, class]`."""


@dataclass(frozen=True)
class Use:
    """How a trial uses a factor; the last argument of every action."""

    level: str
    """Of the factor; never its first one, with which nothing is done."""
    config: TrialConfig
    """Of the trial; `config.setting(name)` is any of its settings."""
    generator: torch.Generator
    """Belongs to the trial and the factor; draw from no other, or the trial could not be repeated."""


class Actions:
    """All that such factors do to one training, beside changing its net.

    Args:
        config: Of the trial.
        generators: By factor, on the device that trains; part of the trial's state.

    Raises:
        InputError: Two factors keep averages of the weights.
    """

    def __init__(self, config: TrialConfig, generators: Mapping[str, torch.Generator]):
        self.generators = generators
        self._images = _find("images", config, generators)
        self._batch = _find("batch", config, generators)
        self._loss = _find("loss", config, generators)
        self._gradients = _find("gradients", config, generators)
        self._averages = _find("averages", config, generators)
        self._prediction = _find("prediction", config, generators)
        if len(self._averages) > 1:
            names = " and ".join(name for name in generators if "averages" in ACTIONS[name])
            raise InputError(
                f"{names} both keep averages of the weights; hold all but one of them at their first level"
            )

    @property
    def keeps_averages(self) -> bool:
        """Whether a factor keeps averages of the weights."""
        return bool(self._averages)

    def on_batch(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return what to train on instead of a batch.

        Args:
            images: Scaled, `[batch, channel, height, width]`.
            labels: Their classes, `[batch]`.
            classes: How many there are.

        Returns:
            Images, and what `cross_entropy` takes as targets: the labels if no factor acts on them, otherwise
            probabilities `[batch, class]`.
        """
        for code, use in self._images:
            images = code(images, use)
            if not isinstance(images, Tensor):
                raise TypeError(f"a factor on images returned {type(images).__name__}; return the images, a tensor")
        if not self._batch:
            return images, labels
        targets = images.new_zeros(len(labels), classes).scatter_(
            1, labels[:, None], 1.0
        )  # one_hot waits for some devices
        for code, use in self._batch:
            changed = code(images, targets, use)
            pair = isinstance(changed, tuple) and len(changed) == 2
            if not pair or not all(isinstance(each, Tensor) for each in changed):
                raise TypeError("a factor on the batch must return images and targets, two tensors")
            images, targets = changed
        return images, targets

    def on_loss(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss to train on instead of `loss`, given logits `[batch, class]` and labels `[batch]`."""
        for code, use in self._loss:
            loss = code(loss, logits, labels, use)
            if not isinstance(loss, Tensor):
                raise TypeError(f"a factor on the loss returned {type(loss).__name__}; return the loss, a tensor")
        return loss

    def on_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Change the gradients of all parameters before a step."""
        for code, use in self._gradients:
            code([parameter for parameter in parameters if parameter.grad is not None], use)

    def on_averages(self, averages: Sequence[Tensor], weights: Sequence[Tensor], step: int) -> None:
        """Change the averages of the weights after a step, counted from 1."""
        for code, use in self._averages:
            code(averages, weights, step, use)

    def predict(self, net: Predict, images: Tensor) -> Tensor:
        """Return the logits of scaled images; without a factor that acts on predictions, those of the net."""
        for code, use in self._prediction:
            net = partial(_predict, code, net, use)
        return net(images)


def change_net(net: nn.Module, config: TrialConfig, generators: Mapping[str, torch.Generator]) -> nn.Module:
    """Return what such factors make of a net before its training; all is on the CPU."""
    for code, use in _find("net", config, generators):
        net = code(net, use)
        if not isinstance(net, nn.Module):
            raise TypeError(f"a factor on the net returned {type(net).__name__}; return the net, a module")
    return net


def acting(config: TrialConfig) -> list[str]:
    """Return the factors that do something in a trial beside those of every grid: all not at their first level."""
    return [each.name for each in config.own if each.name in ACTIONS and each.value != each.default]


def _find(place: Site, config: TrialConfig, generators: Mapping[str, torch.Generator]) -> list[tuple[Code, Use]]:
    return [
        (ACTIONS[name][place], Use(config.text(name), config, generators[name]))
        for name in generators
        if place in ACTIONS[name]
    ]


def _predict(code: Code, net: Predict, use: Use, images: Tensor) -> Tensor:
    logits = code(net, images, use)
    if not isinstance(logits, Tensor):
        raise TypeError(f"a factor on the prediction returned {type(logits).__name__}; return the logits, a tensor")
    return logits
