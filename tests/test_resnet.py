import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grid.config import InputError, TrialConfig, parse_sizes
from grid.train.conformance import random_images
from grid.train.trial import Trial
from nets.blocks import FlattenPixels, Techniques
from nets.dropout import SeededDropout
from nets.pooling import PooledActivation
from nets.resnet import Residual, ResNet
from tests.activations import ACTIVATIONS

CHANNELS = parse_sizes(TrialConfig(learning_rate=1.0, epochs=1).channels)


def resnet(channels=CHANNELS, *, side=28, classes=47, batch_norm=False, dropout_rate=0.5, seed=0) -> ResNet:
    return ResNet(
        image_shape=(1, side, side),
        classes=classes,
        channels=channels,
        techniques=Techniques(activation=ACTIVATIONS["relu"], batch_norm=batch_norm, dropout_rate=dropout_rate),
        weights=torch.Generator().manual_seed(seed),
        masks=torch.Generator().manual_seed(0),
    )


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@settings(deadline=None)
@given(channels=st.lists(st.integers(1, 5), min_size=1, max_size=3), side=st.integers(8, 15), norm=st.booleans())
def test_any_sizes_give_their_parameters_and_outputs(channels, side, norm):
    net = resnet(channels, side=side, classes=6, batch_norm=norm)
    pixels = (side // 2 ** len(channels)) ** 2
    per_unit = 2 if norm else 1  # a scale and a shift instead of a bias
    convolutions = sum(
        9 * before * after + 2 * 9 * after**2 + 3 * per_unit * after
        for before, after in zip([1, *channels], channels, strict=False)
    )
    assert count(net) == convolutions + len(channels) + (pixels * channels[-1] + 1) * 6
    assert net(torch.zeros(3, 1, side, side)).shape == (3, 6)


def test_a_stage_pools_once_and_adds_what_two_convolutions_make_of_its_maps():
    kinds = [type(module) for module in resnet().layers]
    stage = [nn.Conv2d, PooledActivation, SeededDropout, Residual]
    assert kinds == [*stage, *stage, *stage, FlattenPixels, nn.Linear]
    (residual, *_) = (module for module in resnet().layers if isinstance(module, Residual))
    assert [type(module) for module in residual.layers] == 2 * [nn.Conv2d, nn.ReLU, SeededDropout]
    maps = torch.rand(2, CHANNELS[0], 5, 5)
    assert torch.equal(residual.eval()(maps), maps)
    residual.share.data.fill_(0.5)
    torch.testing.assert_close(residual(maps) - maps, residual.layers(maps) / 2)


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_images_that_are_halved_until_nothing_is_left_are_refused(model):
    config = TrialConfig(model=model, learning_rate=0.1, epochs=1, batch_size=32)
    Trial(config, random_images((1, 8, 8), 3))
    message = "channels=32-64-128 halve images of 7 x 9 until nothing is left; take fewer, such as --set channels=32-64"
    with pytest.raises(InputError, match=message):
        Trial(config, random_images((1, 7, 9), 3))
