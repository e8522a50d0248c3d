import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from grid.config import MATTERS_WITH, TrialConfig
from grid.parts.registry import OPTIMIZERS
from grid.train.techniques.optimizers import build_optimizer

CURVATURES = torch.linspace(0.5, 2.0, 10)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1.0, 1.0, 10))


def optimizer_of(name: str, weights: nn.Parameter, *, average_from_step: int = 1, **settings):
    settings = {"learning_rate": OPTIMIZERS[name].base_learning_rate, "epochs": 1, **settings}
    return build_optimizer(TrialConfig(optimizer=name, **settings), [weights], average_from_step=average_from_step)


def descend(optimizer: torch.optim.Optimizer, weights: nn.Parameter, steps: int) -> list[torch.Tensor]:
    """Step down a quadratic and return the weights after each step."""
    path = []
    for _ in range(steps):
        weights.grad = CURVATURES * weights.detach()
        optimizer.step()
        path.append(weights.detach().clone())
    return path


def loss(weights: torch.Tensor) -> float:
    return (CURVATURES * weights.detach().square()).sum().item() / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_base_learning_rates_are_above_zero_and_below_one(name):
    assert 0 < OPTIMIZERS[name].base_learning_rate < 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_given_learning_rate_is_used(name):
    optimizer = optimizer_of(name, parameter(), learning_rate=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic_at_its_base_rate(name):
    weights = parameter()
    descend(optimizer_of(name, weights), weights, steps=200)
    assert loss(weights) < 0.8 * loss(parameter())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_adamw_decays_weights_without_gradient(name):
    weights = parameter()
    weights.grad = torch.zeros(10)
    optimizer_of(name, weights).step()
    decay = 1 - OPTIMIZERS[name].base_learning_rate * 1e-2 if name == "adamw" else 1.0
    torch.testing.assert_close(weights.detach(), parameter().detach() * decay)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_is_true_for_the_optimizers_that_have_a_kernel(name):
    kind = type(optimizer_of(name, parameter()))
    assert OPTIMIZERS[name].fused == ("fused" in inspect.signature(kind).parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_kernel_is_used_if_asked_for_and_available(name):
    groups = optimizer_of(name, parameter(), fused=True).param_groups
    assert groups[0].get("fused", False) == OPTIMIZERS[name].fused
    assert not optimizer_of(name, parameter(), fused=False).param_groups[0].get("fused")


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.fused])
def test_fused_equals_unfused(name):
    fused, unfused = parameter(), parameter()
    descend(optimizer_of(name, fused, fused=True), fused, steps=20)
    descend(optimizer_of(name, unfused, fused=False), unfused, steps=20)
    torch.testing.assert_close(fused, unfused, rtol=1e-5, atol=1e-6)


def test_asgd_steps_like_plain_sgd():
    rate = OPTIMIZERS["asgd"].base_learning_rate
    weights = parameter()
    path = descend(optimizer_of("asgd", weights), weights, steps=3)
    torch.testing.assert_close(path[2], parameter().detach() * (1 - rate * CURVATURES) ** 3)


def test_asgd_begins_to_average_after_the_given_step():
    """Torch starts two steps late: it averages the weights from the second step after the one given."""
    weights = parameter()
    optimizer = optimizer_of("asgd", weights, average_from_step=5)
    path = descend(optimizer, weights, steps=7)
    assert torch.equal(optimizer.state[weights]["ax"], path[6])
    path += descend(optimizer, weights, steps=13)
    torch.testing.assert_close(optimizer.state[weights]["ax"], torch.stack(path[6:]).mean(dim=0))


@pytest.mark.parametrize(
    ("name", "settings", "option", "value"),
    [
        ("sgd", {"momentum": 0.5}, "momentum", 0.5),
        ("adam", {"beta1": 0.8, "beta2": 0.95}, "betas", (0.8, 0.95)),
        ("adamw", {"beta1": 0.8, "beta2": 0.95}, "betas", (0.8, 0.95)),
        ("nadam", {"beta1": 0.8, "beta2": 0.95}, "betas", (0.8, 0.95)),
        ("adamw", {"weight_decay": 0.5}, "weight_decay", 0.5),
        ("rmsprop", {"rmsprop_decay": 0.9}, "alpha", 0.9),
    ],
)
def test_settings_of_an_optimizer_are_used(name, settings, option, value):
    assert optimizer_of(name, parameter(), **settings).param_groups[0][option] == value


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"sgd", "asgd", "adamw"}))
def test_the_defaults_are_torch_s_own(name):
    kind = type(optimizer_of(name, parameter()))
    own, ours = kind([parameter()]).param_groups[0], optimizer_of(name, parameter()).param_groups[0]
    assert {option: ours[option] for option in own if option not in ("params", "lr")} == {
        option: value for option, value in own.items() if option not in ("params", "lr")
    }


@pytest.mark.parametrize("setting", [name for name, (factor, _) in MATTERS_WITH.items() if factor == "optimizer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_setting_changes_the_optimizers_with_which_it_is_said_to_matter_alone(name, setting):
    plain = TrialConfig(optimizer=name, learning_rate=0.1, epochs=1)
    options = OPTIMIZERS[name].options
    changed = options(replace(plain, **{setting: 0.5})) != options(plain)
    assert changed == (name in MATTERS_WITH[setting][1])
