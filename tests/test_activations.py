import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.init import calculate_gain

from nets.activations import gain
from nets.blocks import Techniques, block, linear
from nets.mlp import MLP
from tests.activations import ACTIVATIONS, of_shape

RECTIFIER_GAINS = {
    "relu": calculate_gain("relu"),
    "leaky_relu": calculate_gain("leaky_relu", nn.LeakyReLU().negative_slope),
    "prelu": calculate_gain("leaky_relu", nn.PReLU().weight.item()),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_layer_gets_its_own_activation(name):
    assert ACTIVATIONS[name].build() is not ACTIVATIONS[name].build()


def test_prelu_slopes_are_not_shared():
    techniques = Techniques(activation=ACTIVATIONS["prelu"], batch_norm=False, dropout_rate=0.0)
    net = MLP(
        pixels=9, classes=2, hidden_sizes=(4, 4, 4), techniques=techniques, weights=generator(), masks=generator()
    )
    net(torch.randn(5, 1, 3, 3)).square().sum().backward()
    slopes = [module.weight for module in net.layers if isinstance(module, nn.PReLU)]
    assert len({slope.data_ptr() for slope in slopes}) == 3
    assert len({slope.grad.item() for slope in slopes}) == 3


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_by_inputs_and_own_parameters_are_right(name):
    activation = ACTIVATIONS[name].build().double()
    names = [name for name, _ in activation.named_parameters()]
    inputs = 2 * torch.randn(40, dtype=torch.float64, generator=generator())
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda inputs, *own: functional_call(activation, dict(zip(names, own, strict=True)), (inputs,)),
        (inputs, *activation.parameters()),
    )


@pytest.mark.parametrize("name", RECTIFIER_GAINS)
def test_gains_of_rectifiers_are_those_of_torch(name):
    assert gain(ACTIVATIONS[name]) == pytest.approx(RECTIFIER_GAINS[name], rel=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gain_restores_the_second_moment_of_a_normal_input(name):
    inputs = torch.randn(1_000_000, generator=generator())
    moment = (gain(ACTIVATIONS[name]) * ACTIVATIONS[name].build()(inputs)).square().mean().item()
    assert moment == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_signal_neither_vanishes_nor_explodes_over_ten_layers(name):
    """Second moment within a factor of 100: hardswish, silu and gelu drift; relu without its gain would lose 1,024."""
    draws = generator()
    techniques = Techniques(activation=ACTIVATIONS[name], batch_norm=False, dropout_rate=0.0, initialization="he")
    modules = [module for _ in range(10) for module in block(linear, 256, 256, techniques, draws, draws)]
    outputs = nn.Sequential(*modules)(torch.randn(256, 256, generator=draws))
    assert 1 / 100 < outputs.square().mean().item() * gain(ACTIVATIONS[name]) ** 2 < 100


def slopes(activation: nn.Module) -> torch.Tensor:
    """Return the signs of the slope from -10 to 10, without those of flat pieces."""
    with torch.no_grad():
        rises = activation.double()(torch.linspace(-10, 10, 10_001, dtype=torch.float64)).diff()
    return rises[rises.abs() > 1e-13].sign()


@pytest.mark.parametrize("name", of_shape("rising"))
def test_rising_activations_never_fall_and_cannot_learn_to(name):
    activation = ACTIVATIONS[name].build()
    assert (slopes(activation) >= 0).all()
    assert not list(activation.parameters())


@pytest.mark.parametrize("learned", [-2.0, -0.25, 0.0, 0.25, 2.0])
@pytest.mark.parametrize("name", of_shape("falling_then_rising"))
def test_falling_then_rising_activations_have_one_valley_at_most(name, learned):
    activation = ACTIVATIONS[name].build()
    for parameter in activation.parameters():
        parameter.data.fill_(learned)
    assert (slopes(activation).diff() >= 0).all()
