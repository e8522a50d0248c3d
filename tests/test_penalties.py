import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from grid.config import TrialConfig
from grid.parts.registry import REGULARIZATIONS
from grid.train.techniques.penalties import penalised_weights

L1, L2 = 0.25, 0.5
TERMS = {
    "l1": lambda weight: L1 * weight.abs().sum(),
    "l2": lambda weight: L2 / 2 * weight.square().sum(),
    "elastic": lambda weight: L1 * weight.abs().sum() + L2 / 2 * weight.square().sum(),
}
"""Penalties by their definition, as terms of the loss."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )


def strengths(l1: float, l2: float) -> TrialConfig:
    return TrialConfig(learning_rate=0.1, epochs=1, l1_strength=l1, l2_strength=l2)


def penalise(name: str, weights: list[nn.Parameter], l1: float = L1, l2: float = L2) -> None:
    """Add the gradients of a penalty to gradients that are zero so far."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    REGULARIZATIONS[name](weights, strengths(l1, l2))


@pytest.mark.parametrize("name", TERMS)
@given(numbers=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20))
def test_gradients_equal_those_of_the_term_in_the_loss(name, numbers):
    weights = [nn.Parameter(torch.tensor(numbers[:1])), nn.Parameter(torch.tensor(numbers[1:]))]
    penalise(name, weights)
    for weight in weights:
        (expected,) = torch.autograd.grad(TERMS[name](weight), weight)
        torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("name", TERMS)
def test_a_penalty_is_added_to_the_gradient_of_the_loss(name):
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    (weight * 3 + TERMS[name](weight) / 3).sum().backward()
    expected = weight.grad.clone()
    weight.grad = None
    (weight * 3).sum().backward()
    REGULARIZATIONS[name]([weight], strengths(L1, L2))
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("name", REGULARIZATIONS)
def test_strength_zero_is_no_penalty(name):
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    penalise(name, [weight], 0.0, 0.0)
    assert not weight.grad.any()


def test_none_adds_nothing():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    penalise("none", [weight], 1.0, 1.0)
    assert not weight.grad.any()


def test_biases_norms_and_slopes_are_not_penalised():
    model = net()
    penalise("elastic", penalised_weights(model))
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "0.weight", "4.weight", "6.weight"
    }  # fmt: skip


def test_l2_under_plain_sgd_is_weight_decay():
    penalised, decayed = net(), net()
    weights = penalised_weights(decayed)
    others = [parameter for parameter in decayed.parameters() if parameter.ndim == 1]
    by_loss = SGD(penalised.parameters(), lr=0.1)
    by_decay = SGD([{"params": weights, "weight_decay": L2}, {"params": others}], lr=0.1)
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        by_loss.zero_grad()
        by_decay.zero_grad()
        penalised(images).square().mean().backward()
        REGULARIZATIONS["l2"](penalised_weights(penalised), strengths(0.0, L2))
        decayed(images).square().mean().backward()
        by_loss.step()
        by_decay.step()
    torch.testing.assert_close(penalised.state_dict(), decayed.state_dict())
