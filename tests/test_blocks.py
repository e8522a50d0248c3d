from dataclasses import replace

import pytest
import torch
from torch import nn

from nets.blocks import FlattenPixels, Techniques, block, conv3x3, linear, output
from nets.dropout import SeededDropout
from nets.initialization import INITIALIZATIONS, Surroundings
from nets.pooling import PooledActivation
from tests.activations import ACTIVATIONS

LAYERS = {"linear": linear, "conv3x3": conv3x3}
DRAWS = torch.Generator().manual_seed(0)
INPUTS = {"linear": torch.randn(6, 4, generator=DRAWS), "conv3x3": torch.randn(6, 4, 8, 8, generator=DRAWS)}
PLAIN = Techniques(activation=ACTIVATIONS["relu"], batch_norm=False, dropout_rate=0.0)
FULL = Techniques(activation=ACTIVATIONS["relu"], batch_norm=True, dropout_rate=0.5)


def built(layer: str, techniques: Techniques, *, pooled: bool = False) -> nn.Sequential:
    weights, masks = (torch.Generator().manual_seed(0) for _ in range(2))
    return nn.Sequential(*block(LAYERS[layer], 4, 5, techniques, weights, masks, pooled=pooled))


def types(net: nn.Sequential) -> list[type[nn.Module]]:
    return [type(module) for module in net]


@pytest.mark.parametrize(
    ("layer", "kind", "norm"),
    [
        ("linear", nn.Linear, nn.BatchNorm1d),
        ("conv3x3", nn.Conv2d, nn.BatchNorm2d),
    ],
)
def test_order_is_layer_norm_activation_dropout(layer, kind, norm):
    assert types(built(layer, FULL)) == [kind, norm, nn.ReLU, SeededDropout]
    assert types(built(layer, PLAIN)) == [kind, nn.ReLU]


def test_norm_and_activation_belong_to_the_pooling_where_there_is_one():
    layer, pool, _ = built("conv3x3", replace(FULL, activation=ACTIVATIONS["gelu"]), pooled=True)
    assert isinstance(pool, PooledActivation)
    assert (pool.norm.num_features, type(pool.activation)) == (5, nn.GELU)
    assert layer.bias is None
    assert built("conv3x3", PLAIN, pooled=True)[1].norm is None


def test_pixels_are_flattened_without_a_copy_in_channels_last():
    maps = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    flat = FlattenPixels()(maps)
    assert flat.data_ptr() == maps.data_ptr()
    assert torch.equal(flat, FlattenPixels()(maps.contiguous()))
    assert flat[1, :3].tolist() == maps[1, :, 0, 0].tolist()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_a_bias_only_without_a_norm(layer):
    assert built(layer, FULL)[0].bias is None
    assert built(layer, PLAIN)[0].bias.shape == (5,)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_block_changes_the_size_of_features_only(layer):
    inputs = INPUTS[layer]
    assert built(layer, FULL)(inputs).shape == (6, 5, *inputs.shape[2:])


@pytest.mark.parametrize("rule", INITIALIZATIONS)
def test_a_block_and_an_output_draw_their_weights_by_the_rule(rule):
    techniques = replace(PLAIN, activation=ACTIVATIONS["gelu"], initialization=rule)
    layer, *_ = block(linear, 400, 300, techniques, torch.Generator().manual_seed(0), DRAWS)
    last = output(400, 300, techniques, torch.Generator().manual_seed(0))
    for built, activation in ((layer, ACTIVATIONS["gelu"]), (last, None)):
        ranges = INITIALIZATIONS[rule](Surroundings(400, activation, norm=False))
        assert built.weight.abs().max().item() == pytest.approx(ranges.weight, rel=0.001)


@pytest.mark.parametrize("layer", LAYERS)
def test_building_and_running_a_block_does_not_use_the_global_generator(layer):
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
