from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from grid.config import TrialConfig
from grid.parts.registry import OPTIMIZERS
from grid.train.actions import Use
from grid.train.techniques.averaging import Averages, averaged_weights, averages_of, update_ema
from grid.train.techniques.optimizers import build_optimizer
from nets.dropout import SeededDropout

AVERAGE_FROM = 3
INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
BATCHES = INPUTS.split(10)


def trained(
    name: str = "asgd", steps: int = 12
) -> tuple[nn.Sequential, torch.optim.Optimizer, list[dict[str, Tensor]]]:
    """Return a net in evaluation mode, its optimizer, and the net's parameters after every step."""
    torch.manual_seed(0)
    masks = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), SeededDropout(0.5, masks), nn.Linear(8, 1))
    config = TrialConfig(optimizer=name, learning_rate=0.1, epochs=1)
    optimizer = build_optimizer(config, net.parameters(), average_from_step=AVERAGE_FROM)
    path = []
    for step in range(steps):
        optimizer.zero_grad()
        (net(BATCHES[step % 4]) - 1).square().mean().backward()
        optimizer.step()
        path.append({name: parameter.detach().clone() for name, parameter in net.named_parameters()})
    return net.eval(), optimizer, path


def assert_same_bits(first: object, second: object) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_inside_the_net_has_the_average_of_its_weights():
    net, optimizer, path = trained()
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        for name, parameter in net.named_parameters():
            average = torch.stack([weights[name] for weights in path[AVERAGE_FROM + 1 :]]).mean(dim=0)
            torch.testing.assert_close(parameter.detach(), average)
        for name in ("0.weight", "1.weight"):  # a bias in front of a norm hardly moves
            assert not torch.equal(net.get_parameter(name), path[-1][name])


def test_inside_the_norms_have_the_statistics_of_the_batches():
    net, optimizer, _ = trained()
    with averaged_weights(net, averages_of(optimizer), BATCHES), torch.no_grad():
        features = torch.stack([net[0](batch) for batch in BATCHES])
        torch.testing.assert_close(net[1].running_mean, features.mean(dim=1).mean(dim=0))
        torch.testing.assert_close(net[1].running_var, features.var(dim=1).mean(dim=0))


def test_inside_the_whole_net_is_in_evaluation_mode():
    net, optimizer, _ = trained()
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        assert not any(module.training for module in net.modules())


def test_estimating_the_norms_draws_no_dropout_mask():
    net, optimizer, _ = trained()
    state = net[3].generator.get_state()
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        assert torch.equal(net[3].generator.get_state(), state)


@pytest.mark.parametrize("interrupted", [False, True])
def test_afterwards_everything_is_restored_bit_by_bit(interrupted):
    net, optimizer, _ = trained()
    before = deepcopy((net.state_dict(), optimizer.state_dict()))
    with suppress(KeyboardInterrupt), averaged_weights(net, averages_of(optimizer), BATCHES):
        if interrupted:
            raise KeyboardInterrupt
    assert_same_bits((net.state_dict(), optimizer.state_dict()), before)
    assert (net[1].momentum, net[1].training) == (0.1, False)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"asgd"}))
def test_nothing_changes_under_other_optimizers(name):
    net, optimizer, _ = trained(name)
    before = deepcopy(net.state_dict())
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize("steps", [0, AVERAGE_FROM])
def test_nothing_changes_before_the_averaging_begins(steps):
    net, optimizer, _ = trained(steps=steps)
    before = deepcopy(net.state_dict())
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        assert_same_bits(net.state_dict(), before)


def test_the_averaged_net_predicts_differently_from_the_last_one():
    net, optimizer, _ = trained()
    last = net(INPUTS)
    with averaged_weights(net, averages_of(optimizer), BATCHES):
        assert not torch.allclose(net(INPUTS), last)
    assert torch.equal(net(INPUTS), last)


def test_a_net_without_norms_reads_no_batch():
    net = nn.Sequential(nn.Linear(4, 1))
    config = TrialConfig(optimizer="asgd", learning_rate=0.1, epochs=1)
    optimizer = build_optimizer(config, net.parameters(), average_from_step=0)
    net(INPUTS).sum().backward()
    optimizer.step()
    batches = iter(BATCHES)
    with averaged_weights(net, averages_of(optimizer), batches):
        assert len(list(batches)) == len(BATCHES)


def ema(decay: float) -> Use:
    params = {"learning_rate": "1", "epochs": "1", "weight_averaging": "ema", "ema_decay": repr(decay)}
    return Use("ema", TrialConfig.from_params(params), torch.Generator())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_exponential_averages_follow_their_formula(decay):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    averages, expected = Averages([parameter]), parameter.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            parameter += step % 7 - 3
        averages.update(lambda *values: update_ema(*values, ema(decay)))
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * parameter.detach()
    ((weight, average),) = averages.pairs
    assert weight is parameter
    torch.testing.assert_close(average, expected)


def test_exponential_averages_that_are_resumed_go_on():
    parameter = nn.Parameter(torch.tensor([1.0]))
    whole, parts = Averages([parameter]), Averages([parameter])
    for step in range(20):
        if step == 10:
            saved, parts = deepcopy(parts.state_dict()), Averages([parameter])
            parts.load_state_dict(saved)
        with torch.no_grad():
            parameter.fill_(float(step))
        for averages in (whole, parts):
            averages.update(lambda *values: update_ema(*values, ema(0.9)))
    assert_same_bits(parts.state_dict(), whole.state_dict())
