import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from grid.config import LEVELS
from grid.penalties import PENALTIES, penalised_weights

L1, L2 = 0.25, 0.5
VALUES = {
    "none": lambda numbers: 0.0,
    "l1": lambda numbers: L1 * sum(abs(number) for number in numbers),
    "l2": lambda numbers: L2 / 2 * sum(number**2 for number in numbers),
    "elastic": lambda numbers: sum(L1 * abs(number) + L2 / 2 * number**2 for number in numbers),
}
GRADIENTS = {
    "l1": lambda weight: L1 * weight.sign(),
    "l2": lambda weight: L2 * weight,
    "elastic": lambda weight: L1 * weight.sign() + L2 * weight,
}


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


def penalty(name: str, weights: list[torch.Tensor]) -> torch.Tensor:
    part = PENALTIES[name](L1, L2)
    return torch.zeros(()) if part is None else part(weights)


def test_penalties_are_the_levels_of_their_factor():
    assert set(PENALTIES) == set(LEVELS["regularization"]), (
        "a penalty is one line in PENALTIES (grid/penalties.py) and one name in LEVELS (grid/config.py)"
    )


def test_every_penalty_has_a_closed_form_to_be_compared_with():
    assert set(PENALTIES) == set(VALUES) == {"none", *GRADIENTS}, "add the new penalty to VALUES and GRADIENTS"


@pytest.mark.parametrize("name", VALUES)
@given(numbers=st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_values_are_those_of_the_closed_form(name, numbers):
    weights = [torch.tensor(numbers[:1]), torch.tensor(numbers[1:])]
    assert penalty(name, weights).item() == pytest.approx(VALUES[name](numbers), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_closed_form(name):
    weights = penalised_weights(net())
    penalty(name, weights).backward()
    for weight in weights:
        torch.testing.assert_close(weight.grad, GRADIENTS[name](weight.detach()))


@pytest.mark.parametrize("name", GRADIENTS)
def test_strength_zero_is_no_penalty(name):
    assert PENALTIES[name](0.0, 0.0)([torch.ones(3)]).item() == 0


def test_none_adds_no_term_to_the_loss():
    assert PENALTIES["none"](1.0, 1.0) is None


def test_biases_norms_and_slopes_are_not_penalised():
    model = net()
    penalty("elastic", penalised_weights(model)).backward()
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
        (penalised(images).square().mean() + penalty("l2", penalised_weights(penalised))).backward()
        decayed(images).square().mean().backward()
        by_loss.step()
        by_decay.step()
    torch.testing.assert_close(penalised.state_dict(), decayed.state_dict())
