import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.init import calculate_gain

from grid.config import LEVELS
from nets.activations import ACTIVATIONS, EXACT_GAINS, gain
from nets.blocks import Techniques, block, linear
from nets.mlp import MLP

TORCH_GAINS = {
    "relu": calculate_gain("relu"),
    "leaky_relu": calculate_gain("leaky_relu", nn.LeakyReLU().negative_slope),
    "prelu": calculate_gain("leaky_relu", nn.PReLU().weight.item()),
    "tanh": calculate_gain("tanh"),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_activations_are_the_levels_of_their_factor():
    assert set(ACTIVATIONS) == set(LEVELS["activation"]), (
        "an activation is one line in ACTIVATIONS (nets/activations.py) and one name in LEVELS (grid/config.py)"
    )


def test_exact_gains_belong_to_activations():
    assert set(EXACT_GAINS) <= set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_layer_gets_an_activation_of_its_own(name):
    assert ACTIVATIONS[name]() is not ACTIVATIONS[name]()


def test_prelu_slopes_are_not_shared():
    techniques = Techniques(activation="prelu", batch_norm=False, dropout_rate=0.0)
    net = MLP(
        pixels=9, classes=2, hidden_sizes=(4, 4, 4), techniques=techniques, weights=generator(), masks=generator()
    )
    net(torch.randn(5, 1, 3, 3)).square().sum().backward()
    slopes = [module.weight for module in net.layers if isinstance(module, nn.PReLU)]
    assert len({slope.data_ptr() for slope in slopes}) == 3
    assert len({slope.grad.item() for slope in slopes}) == 3


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_by_inputs_and_own_parameters_are_right(name):
    activation = ACTIVATIONS[name]().double()
    names = [name for name, _ in activation.named_parameters()]
    inputs = 2 * torch.randn(40, dtype=torch.float64, generator=generator())
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda inputs, *own: functional_call(activation, dict(zip(names, own, strict=True)), (inputs,)),
        (inputs, *activation.parameters()),
    )


@pytest.mark.parametrize("name", TORCH_GAINS)
def test_gains_are_those_of_torch(name):
    assert gain(name) == pytest.approx(TORCH_GAINS[name], rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - set(EXACT_GAINS)))
def test_second_moment_is_near_a_half_where_the_gain_is_that_of_relu(name):
    inputs = torch.randn(100_000, generator=generator())
    moment = ACTIVATIONS[name]()(inputs).square().mean().item()
    assert gain(name) == math.sqrt(2)
    assert moment == pytest.approx(0.5, abs=0.2), f"{name} needs a gain of its own in EXACT_GAINS: {moment**-0.5:.3f}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_signal_neither_dies_nor_explodes_over_ten_layers(name):
    """Second moment within a factor of 250 (1.74 per layer); silu is the weakest, near 100."""
    techniques, draws = Techniques(activation=name, batch_norm=False, dropout_rate=0.0), generator()
    modules = [module for _ in range(10) for module in block(linear, 256, 256, techniques, draws, draws)]
    outputs = nn.Sequential(*modules)(torch.randn(256, 256, generator=draws))
    assert 1 / 250 < outputs.square().mean().item() < 250
