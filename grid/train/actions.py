"""What the factors of parts files do in a training, each at its place: images, net, loss or gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grid.config import TrialConfig
from grid.parts.registry import ACTIONS, Code, Site


@dataclass(frozen=True)
class Use:
    """How a trial uses a factor; the last argument of every action."""

    level: str
    """Of the factor; never its first one, with which nothing is done."""
    config: TrialConfig
    """Of the trial; `config.setting(name)` is a setting of a parts file."""
    generator: torch.Generator
    """Belongs to the trial and the factor; draw from no other, or the trial could not be repeated."""


class Actions:
    """All that the factors of parts files do to the batches of one training.

    Args:
        config: Of the trial.
        generators: By factor, on the device that trains; part of the trial's state.
    """

    def __init__(self, config: TrialConfig, generators: Mapping[str, torch.Generator]):
        self.generators = generators
        self._images = _find("images", config, generators)
        self._loss = _find("loss", config, generators)
        self._gradients = _find("gradients", config, generators)

    def on_images(self, images: Tensor) -> Tensor:
        """Return the images to train on instead of a batch, `[batch, channel, height, width]`."""
        for code, use in self._images:
            images = code(images, use)
            if not isinstance(images, Tensor):
                raise TypeError(f"a factor on images returned {type(images).__name__}; return the images, a tensor")
        return images

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


def change_net(net: nn.Module, config: TrialConfig, generators: Mapping[str, torch.Generator]) -> nn.Module:
    """Return what the factors of parts files make of a net before its training; all is on the CPU."""
    for code, use in _find("net", config, generators):
        net = code(net, use)
        if not isinstance(net, nn.Module):
            raise TypeError(f"a factor on the net returned {type(net).__name__}; return the net, a module")
    return net


def acting(config: TrialConfig) -> list[str]:
    """Return the factors of parts files that do something in a trial: all that are not at their first level."""
    return [each.name for each in config.own if each.name in ACTIONS and each.value != each.default]


def _find(place: Site, config: TrialConfig, generators: Mapping[str, torch.Generator]) -> list[tuple[Code, Use]]:
    return [
        (ACTIONS[name][place], Use(config.text(name), config, generators[name]))
        for name in generators
        if place in ACTIONS[name]
    ]
