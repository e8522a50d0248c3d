from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import pooling
from nets.activations import Activation
from nets.pooling import PooledActivation
from tests.activations import ACTIVATIONS, of_shape

CHANNELS = 6
POOLED_FIRST = of_shape("rising", "falling_then_rising")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(side: int = 8, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return maps that are neither centred nor of unit size, channels last."""
    values = torch.randn(5, CHANNELS, side, side, generator=draws(seed), dtype=torch.float64) * 1.5 - 0.7
    return values.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def pool(activation: str, *, batch_norm: bool, dtype: torch.dtype = torch.float64) -> PooledActivation:
    """Return a module with scales of both signs."""
    norm = nn.BatchNorm2d(CHANNELS) if batch_norm else None
    if norm is not None:
        norm.weight.data.normal_(generator=draws(1))
        norm.bias.data.normal_(generator=draws(2))
    return PooledActivation(ACTIVATIONS[activation], norm).to(dtype)


def plain(module: PooledActivation, inputs: Tensor) -> Tensor:
    """Return the outputs of torch's own layers, one after the other."""
    return F.max_pool2d(module.activation(inputs if module.norm is None else module.norm(inputs)), 2)


def results(module: PooledActivation, inputs: Tensor, function=None) -> dict[str, Tensor]:
    """Return all results of a forward and a backward pass."""
    module.zero_grad()
    inputs.grad = None
    if module.norm is not None:
        module.norm.reset_running_stats()
    outputs = module(inputs) if function is None else function(module, inputs)
    gradient = torch.randn(outputs.shape, generator=draws(3), dtype=torch.float64).to(outputs.dtype)
    outputs.backward(gradient)
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {"outputs": outputs.detach(), "inputs": inputs.grad.clone(), **gradients, **buffers}


@pytest.fixture
def pools_first(monkeypatch):
    """Record every use of the fast path."""
    calls = []
    apply = pooling._LargestPixel.apply
    monkeypatch.setattr(pooling._LargestPixel, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_values_gradients_and_statistics_equal_those_of_the_plain_layers(activation, batch_norm, training, pools_first):
    module, inputs = pool(activation, batch_norm=batch_norm).train(training), maps()
    fast, slow = results(module, inputs), results(module, inputs, plain)
    assert len(pools_first) == (activation in POOLED_FIRST)
    for name, value in fast.items():
        torch.testing.assert_close(value, slow[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_without_gradients_the_values_are_the_same(activation, batch_norm, dtype):
    module, inputs = pool(activation, batch_norm=batch_norm).to(torch.promote_types(dtype, torch.float32)), maps(8)
    module.eval()
    with torch.no_grad():
        inputs = inputs.to(dtype, memory_format=torch.channels_last)
        torch.testing.assert_close(module(inputs), plain(module, inputs))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bfloat16_differs_only_where_two_pixels_tie(activation, batch_norm):
    module, inputs = pool(activation, batch_norm=batch_norm).float(), maps(14, dtype=torch.bfloat16)
    fast, slow = results(module, inputs), results(module, inputs, plain)
    torch.testing.assert_close(fast["outputs"], slow["outputs"])
    moved = (fast["inputs"] - slow["inputs"]).abs() > 0.05
    assert moved.double().mean() < 0.01
    sums = (F.avg_pool2d(each["inputs"].float(), 2, divisor_override=1) for each in (fast, slow))
    torch.testing.assert_close(*sums, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_equal_finite_differences(activation, batch_norm):
    module, inputs = pool(activation, batch_norm=batch_norm), maps(4)

    def function(inputs: Tensor, *_: Tensor) -> Tensor:
        return module(inputs)

    assert torch.autograd.gradcheck(function, (inputs, *module.parameters()))


def test_of_equal_pixels_the_left_and_then_the_upper_gets_the_gradient():
    inputs = torch.zeros(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    inputs[0, 0, 0, 3] = -1.0
    inputs[0, 0, 2, 0] = -1.0
    inputs.requires_grad_()
    PooledActivation(ACTIVATIONS["elu"], None)(inputs).sum().backward()
    assert inputs.grad[0, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=16), min_size=4, max_size=4),
    activation=st.sampled_from(POOLED_FIRST),
)
def test_any_four_pixels_yield_their_largest_activation_and_pass_the_gradient_to_one(values, activation):
    module = PooledActivation(ACTIVATIONS[activation], None)
    inputs = torch.tensor(values).view(1, 1, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = module(inputs)
    activated = module.activation(inputs)
    assert outputs.item() == pytest.approx(activated.max().item(), abs=1e-6)
    outputs.backward()
    (chosen,) = inputs.grad.flatten().nonzero().flatten().tolist() or [None]
    if chosen is not None:
        assert activated.flatten()[chosen].item() == pytest.approx(outputs.item(), abs=1e-6)


def contiguous_maps() -> Tensor:
    return maps(8).detach().contiguous().requires_grad_()


def test_contiguous_maps_are_pooled_last(pools_first):
    module, inputs = pool("gelu", batch_norm=True), contiguous_maps()
    fast, slow = results(module, inputs), results(module, inputs, plain)
    assert not pools_first
    for name, value in fast.items():
        assert torch.equal(value, slow[name])


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["elu", "gelu"])
@pytest.mark.parametrize(("height", "width"), [(7, 7), (6, 7), (7, 6), (3, 2)])
def test_an_odd_last_row_or_column_counts_in_the_statistics_only(height, width, activation, batch_norm, pools_first):
    module = pool(activation, batch_norm=batch_norm)
    inputs = maps(8).detach()[:, :, :height, :width].contiguous(memory_format=torch.channels_last).requires_grad_()
    fast, slow = results(module, inputs), results(module, inputs, plain)
    assert pools_first
    assert fast["outputs"].shape[2:] == (height // 2, width // 2)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("activation", of_shape("rising"))
def test_pooling_last_equals_the_plain_layers_for_rising_activations(activation):
    module, inputs = pool(activation, batch_norm=True), contiguous_maps()
    torch.testing.assert_close(results(module, inputs), results(module, inputs, plain))


def test_an_activation_of_another_shape_is_pooled_last(monkeypatch, pools_first):
    monkeypatch.setitem(ACTIVATIONS, "hat", Activation(Hat))
    module, inputs = pool("hat", batch_norm=True), maps()
    torch.testing.assert_close(results(module, inputs), results(module, inputs, plain))
    assert not pools_first


class Hat(nn.Module):
    """Rises, then falls: the largest of four outputs may belong to a middle input."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.exp(-inputs.square())


def test_running_statistics_equal_those_of_torch_with_and_without_momentum():
    for momentum in (0.3, None):
        norms = [nn.BatchNorm2d(CHANNELS, momentum=momentum).double() for _ in range(2)]
        fast, slow = (PooledActivation(ACTIVATIONS["relu"], norm) for norm in norms)
        for seed in range(4):
            fast(maps(seed=seed))
            plain(slow, maps(seed=seed))
        for (name, value), (_, expected) in zip(norms[0].named_buffers(), norms[1].named_buffers(), strict=True):
            torch.testing.assert_close(value, expected, msg=f"{name} at momentum {momentum}")


def test_evaluation_does_not_change_the_statistics():
    module = pool("gelu", batch_norm=True).eval()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        module(maps())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_non_finite_value_is_not_lost():
    for bad in (torch.nan, torch.inf):
        inputs = maps().detach()
        inputs[0, 0, 0, 0] = bad
        for activation in ("relu", "gelu"):
            assert not PooledActivation(ACTIVATIONS[activation], None)(inputs)[0, 0, 0, 0].isfinite()


def test_every_pooling_halves_the_size():
    inputs = maps(16)
    sides = [inputs.shape[2]]
    while inputs.shape[2] > 1:
        inputs = PooledActivation(ACTIVATIONS["relu"], None)(inputs)
        sides.append(inputs.shape[2])
    assert all(side == 2 * half for side, half in pairwise(sides))
