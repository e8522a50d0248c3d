import math

import pytest
import torch
from torch import nn

from grid.config import CHOICES
from nets.activations import ACTIVATIONS, gain
from nets.blocks import Techniques, block, conv3x3, linear, output
from nets.initialization import INITIALIZATIONS, Ranges, Surroundings, draw

LAYERS = {"linear": linear, "conv3x3": conv3x3}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ten_layers(rule: str, activation: str, *, size: int = 64) -> nn.Sequential:
    """Return ten hidden layers without a norm, and a last layer for eight classes."""
    techniques = Techniques(activation=activation, batch_norm=False, dropout_rate=0.0, initialization=rule)
    draws = generator()
    hidden = [module for _ in range(10) for module in block(linear, size, size, techniques, draws, draws)]
    return nn.Sequential(*hidden, output(size, 8, techniques, draws))


def test_rules_are_the_choices_of_their_setting():
    assert tuple(INITIALIZATIONS) == CHOICES["initialization"]


@pytest.mark.parametrize("build", [lambda: nn.Linear(30, 20), lambda: nn.Conv2d(4, 5, kernel_size=3)])
def test_torch_is_what_torchs_own_layers_do(build):
    torch.manual_seed(0)
    theirs, ours = build(), build()
    draw(ours, "torch", activation="relu", norm=False, weights=generator())
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_he_keeps_the_second_moment_with_and_without_a_norm(activation):
    for norm in (False, True):
        ranges = INITIALIZATIONS["he"](Surroundings(300, activation, norm))
        assert ranges.weight == pytest.approx(gain(activation) * math.sqrt(3 / 300))
        assert ranges.bias == 0
    assert INITIALIZATIONS["he"](Surroundings(300, None, norm=False)) == Ranges(pytest.approx(0.1), 0.0)


@pytest.mark.parametrize("rule", INITIALIZATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_drawn_fills_the_ranges_of_the_rule(layer, rule):
    built = LAYERS[layer](400, 100, bias=True)
    draw(built, rule, activation="elu", norm=False, weights=generator())
    ranges = INITIALIZATIONS[rule](Surroundings(built.weight[0].numel(), "elu", norm=False))
    assert built.weight.abs().max().item() == pytest.approx(ranges.weight, rel=0.001)
    assert built.weight.std().item() == pytest.approx(ranges.weight / math.sqrt(3), rel=0.02)
    assert built.bias.abs().max().item() == pytest.approx(ranges.bias, rel=0.05)


def test_the_length_of_weights_in_front_of_a_norm_changes_no_output():
    """The reason why a rule may choose that length by how far a step should turn the weights."""
    techniques = Techniques(activation="gelu", batch_norm=True, dropout_rate=0.0)
    net = nn.Sequential(*block(linear, 30, 20, techniques, generator(), generator())).double()
    inputs = torch.randn(50, 30, dtype=torch.float64, generator=generator())
    net[1].eps = 0.0
    before = net(inputs)
    with torch.no_grad():
        net[0].weight.mul_(7)
    torch.testing.assert_close(net(inputs), before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ten_layers_without_a_norm_train_with_the_default(activation):
    """Eight classes, told apart by their mean, in 300 steps."""
    net, draws = ten_layers("norm_aware", activation), generator()
    centres = torch.randn(8, 64, generator=draws)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(300):
        labels = torch.randint(0, 8, (64,), generator=draws)
        inputs = centres[labels] + torch.randn(64, 64, generator=draws)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(8)


def test_ten_layers_with_the_weights_of_torch_lose_the_signal():
    """Why `torch` is not the default: outputs hardly depend on inputs."""
    inputs = torch.randn(256, 64, generator=generator())
    spread = {rule: ten_layers(rule, "relu")[:-1](inputs).std(dim=0).mean().item() for rule in ("he", "torch")}
    assert spread["torch"] < 0.01 * spread["he"]
