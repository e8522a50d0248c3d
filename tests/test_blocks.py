import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets.blocks import SeededDropout, Techniques, block, conv3x3, linear

LAYERS = {"linear": linear, "conv3x3": conv3x3}
DRAWS = torch.Generator().manual_seed(0)
INPUTS = {"linear": torch.randn(6, 4, generator=DRAWS), "conv3x3": torch.randn(6, 4, 8, 8, generator=DRAWS)}
PLAIN = Techniques(activation="relu", batch_norm=False, dropout_rate=0.0)
FULL = Techniques(activation="relu", batch_norm=True, dropout_rate=0.5)


def built(layer: str, techniques: Techniques, pool: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    weights, masks = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return nn.Sequential(*block(LAYERS[layer], 4, 5, techniques, weights, masks, pool))


def types(net: nn.Sequential) -> list[type[nn.Module]]:
    return [type(module) for module in net]


@pytest.mark.parametrize(
    ("layer", "kind", "norm"),
    [
        ("linear", nn.Linear, nn.BatchNorm1d),
        ("conv3x3", nn.Conv2d, nn.BatchNorm2d),
    ],
)
def test_order_is_layer_norm_activation_pool_dropout(layer, kind, norm):
    assert types(built(layer, FULL, nn.Identity())) == [kind, norm, nn.ReLU, nn.Identity, SeededDropout]
    assert types(built(layer, PLAIN)) == [kind, nn.ReLU]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_a_bias_only_without_a_norm(layer):
    assert built(layer, FULL)[0].bias is None
    assert built(layer, PLAIN)[0].bias.tolist() == [0.0] * 5


@pytest.mark.parametrize("layer", LAYERS)
def test_a_block_changes_the_size_of_features_only(layer):
    inputs = INPUTS[layer]
    assert built(layer, FULL)(inputs).shape == (6, 5, *inputs.shape[2:])


@pytest.mark.parametrize(("layer", "fan_in"), [("linear", 400), ("conv3x3", 9 * 400)])
def test_weights_have_the_standard_deviation_of_their_gain_and_fan_in(layer, fan_in):
    weight = LAYERS[layer](400, 100, gain=3.0, bias=True, generator=torch.Generator().manual_seed(0)).weight
    assert weight.std().item() == pytest.approx(3 / math.sqrt(fan_in), rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * weight.std().item()


@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, seed):
    outputs = SeededDropout(rate, torch.Generator().manual_seed(seed))(torch.ones(400, 500))
    share = (outputs == 0).float().mean().item()
    assert share == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(outputs[outputs != 0], torch.tensor(1 / (1 - rate)).expand(int((outputs != 0).sum())))


def test_dropout_lets_no_gradient_through_what_it_zeroes():
    inputs = torch.ones(1000, requires_grad=True)
    outputs = SeededDropout(0.5, torch.Generator().manual_seed(0))(inputs)
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_dropout_is_the_identity_in_evaluation_mode_and_draws_nothing():
    masks = torch.Generator().manual_seed(0)
    state, inputs = masks.get_state(), torch.randn(10, 10)
    assert torch.equal(SeededDropout(0.5, masks).eval()(inputs), inputs)
    assert torch.equal(masks.get_state(), state)


def test_dropout_masks_differ_from_step_to_step():
    dropout, inputs = SeededDropout(0.5, torch.Generator().manual_seed(0)), torch.ones(100)
    assert not torch.equal(dropout(inputs), dropout(inputs))


@pytest.mark.parametrize("layer", LAYERS)
def test_building_and_running_a_block_leaves_the_global_generator_alone(layer):
    state = torch.get_rng_state()
    built(layer, FULL).train()(INPUTS[layer])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_global_generator_changes_no_result(layer):
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(built(layer, FULL).train()(INPUTS[layer]))
    assert torch.equal(*outputs)
    assert outputs[0].any()
