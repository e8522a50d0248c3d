from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from grid.config import TrialConfig, parse_sizes
from nets.blocks import Techniques
from nets.mlp import MLP
from tests.activations import ACTIVATIONS

DEFAULT_SIZES = parse_sizes(TrialConfig(learning_rate=1.0, epochs=1).hidden_sizes)
PLAIN_COUNT = (784 * 512 + 512) + (512 * 256 + 256) + (256 * 128 + 128) + (128 * 47 + 47)


def mlp(sizes=DEFAULT_SIZES, *, pixels=784, classes=47, activation="relu", batch_norm=False, seed=0) -> MLP:
    return MLP(
        pixels=pixels,
        classes=classes,
        hidden_sizes=sizes,
        techniques=Techniques(activation=ACTIVATIONS[activation], batch_norm=batch_norm, dropout_rate=0.5),
        weights=torch.Generator().manual_seed(seed),
        masks=torch.Generator().manual_seed(0),
    )


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLAIN_COUNT),
        ({"batch_norm": True}, PLAIN_COUNT + 512 + 256 + 128),  # a scale and a shift per unit instead of a bias
        ({"activation": "prelu"}, PLAIN_COUNT + 3),
    ],
)
def test_default_net_has_the_parameters_of_the_formula(changes, expected):
    assert count(mlp(**changes)) == expected


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), side=st.integers(1, 6), classes=st.integers(1, 9))
def test_any_sizes_give_their_parameters_and_outputs(sizes, side, classes):
    net = mlp(sizes, pixels=side**2, classes=classes)
    widths = (side**2, *sizes, classes)
    assert count(net) == sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    assert net(torch.zeros(3, 1, side, side)).shape == (3, classes)


def test_logits_are_linear_in_the_last_hidden_layer():
    assert [type(module).__name__ for module in mlp((5,)).layers] == [
        "Flatten", "Linear", "ReLU", "SeededDropout", "Linear"
    ]  # fmt: skip


def test_the_seed_alone_decides_the_weights():
    first, again, other = mlp(seed=1), mlp(seed=1), mlp(seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert name.endswith("bias") or not torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("shape", [(3, 784), (3, 28, 28), (28, 28)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(TypeCheckError, match="images"):
        mlp()(torch.zeros(shape))
