import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets.activations import RISING
from nets.blocks import RANDOM_VALUES, FlattenPixels, SeededDropout, Techniques, block, conv3x3, linear

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
    gelu = replace(FULL, activation="gelu")
    assert types(built(layer, gelu, nn.Identity())) == [kind, norm, nn.GELU, nn.Identity, SeededDropout]
    assert types(built(layer, PLAIN)) == [kind, nn.ReLU]


@pytest.mark.parametrize("activation", sorted(RISING))
def test_pooling_before_an_activation_that_never_falls_changes_nothing(activation):
    layer, norm, first, second, _ = built("conv3x3", replace(FULL, activation=activation), nn.MaxPool2d(2)).double()
    assert isinstance(first, nn.MaxPool2d)
    results = []
    for one, other in ((first, second), (second, first)):
        layer.zero_grad()
        outputs = other(one(norm(layer(INPUTS["conv3x3"].double()))))
        outputs.square().sum().backward()
        results.append((outputs.detach(), layer.weight.grad.clone()))
    torch.testing.assert_close(*results)


def test_pixels_are_flattened_without_a_copy_in_channels_last():
    maps = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    flat = FlattenPixels()(maps)
    assert flat.data_ptr() == maps.data_ptr()
    assert torch.equal(flat, FlattenPixels()(maps.contiguous()))
    assert flat[1, :3].tolist() == maps[1, :, 0, 0].tolist()


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
    met = round(rate * RANDOM_VALUES) / RANDOM_VALUES
    torch.testing.assert_close(outputs[outputs != 0], torch.tensor(1 / (1 - met)).expand(int((outputs != 0).sum())))
    assert met == pytest.approx(rate, abs=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_draws_every_unit_apart_from_its_neighbours(memory_format):
    inputs = torch.ones(64, 8, 16, 16).contiguous(memory_format=memory_format)
    kept = (SeededDropout(0.25, torch.Generator().manual_seed(0))(inputs) != 0).double()
    for axis in range(4):
        pairs = torch.stack((kept.roll(1, axis).flatten(), kept.flatten()))
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4 / math.sqrt(kept.numel())


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_rates_beyond_the_finest_step_are_the_finest_step(rate):
    outputs = SeededDropout(rate, torch.Generator().manual_seed(0))(torch.ones(1000, 1000))
    share = (outputs == 0).double().mean().item()
    assert 0 < share < 1
    assert share == pytest.approx(rate, abs=1e-4)


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
