import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from grid.config import TrialConfig, parse_sizes
from nets.blocks import FlattenPixels, Techniques
from nets.cnn import CNN
from nets.pooling import PooledActivation
from tests.activations import ACTIVATIONS

DEFAULTS = TrialConfig(learning_rate=1.0, epochs=1)
CONVOLUTIONS = (9 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 9 * 128 + 128)
PLAIN_COUNT = CONVOLUTIONS + (128 * 3 * 3 * 256 + 256) + (256 * 47 + 47)


def cnn(channels=None, *, side=28, classes=47, dense_size=None, activation="relu", batch_norm=False, seed=0) -> CNN:
    return CNN(
        image_shape=(1, side, side),
        classes=classes,
        channels=channels or parse_sizes(DEFAULTS.channels),
        dense_size=dense_size or DEFAULTS.dense_size,
        techniques=Techniques(activation=ACTIVATIONS[activation], batch_norm=batch_norm, dropout_rate=0.5),
        weights=torch.Generator().manual_seed(seed),
        masks=torch.Generator().manual_seed(0),
    )


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLAIN_COUNT),
        ({"batch_norm": True}, PLAIN_COUNT + 32 + 64 + 128 + 256),  # a scale and a shift per unit instead of a bias
        ({"activation": "prelu"}, PLAIN_COUNT + 4),
    ],
)
def test_default_net_has_the_parameters_of_the_formula(changes, expected):
    assert count(cnn(**changes)) == expected


@settings(deadline=None)
@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3), side=st.integers(8, 15), dense_size=st.integers(1, 9)
)
def test_any_sizes_give_their_parameters_and_outputs(channels, side, dense_size):
    net = cnn(channels, side=side, classes=6, dense_size=dense_size)
    pixels = (side // 2 ** len(channels)) ** 2
    convolutions = sum(
        9 * inputs * outputs + outputs for inputs, outputs in zip([1, *channels], channels, strict=False)
    )
    assert count(net) == convolutions + (pixels * channels[-1] + 1) * dense_size + (dense_size + 1) * 6
    assert net(torch.zeros(3, 1, side, side)).shape == (3, 6)


def test_every_convolution_block_pools_and_the_dense_one_does_not():
    kinds = [type(module) for module in cnn().layers]
    assert kinds.count(PooledActivation) == kinds.count(nn.Conv2d) == 3
    assert PooledActivation not in kinds[kinds.index(FlattenPixels) :]


def test_the_seed_alone_decides_the_weights():
    first, again, other = cnn(seed=1), cnn(seed=1), cnn(seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert name.endswith("bias") or not torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("shape", [(3, 784), (3, 28, 28), (28, 28)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(TypeCheckError, match="images"):
        cnn()(torch.zeros(shape))
