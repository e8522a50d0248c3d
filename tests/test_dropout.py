import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nets.dropout import BITS, SeededDropout


@given(rate=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, seed):
    outputs = SeededDropout(rate, torch.Generator().manual_seed(seed))(torch.ones(400, 500))
    share = (outputs == 0).float().mean().item()
    assert share == pytest.approx(rate, abs=0.01)
    exact = round(rate * 2**BITS) / 2**BITS
    torch.testing.assert_close(outputs[outputs != 0], torch.tensor(1 / (1 - exact)).expand(int((outputs != 0).sum())))
    assert exact == pytest.approx(rate, abs=1e-5)


@pytest.mark.parametrize("rate", [0.25, 0.3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_units_are_dropped_independently_of_their_neighbours(memory_format, rate):
    inputs = torch.ones(64, 8, 16, 16).contiguous(memory_format=memory_format)
    kept = (SeededDropout(rate, torch.Generator().manual_seed(0))(inputs) != 0).double()
    for axis in range(4):
        pairs = torch.stack((kept.roll(1, axis).flatten(), kept.flatten()))
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4 / math.sqrt(kept.numel())


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_rates_finer_than_a_step_are_rounded_to_a_step_inside_0_to_1(rate):
    outputs = SeededDropout(rate, torch.Generator().manual_seed(0))(torch.ones(1000, 1000))
    share = (outputs == 0).double().mean().item()
    assert 0 < share < 1
    assert share == pytest.approx(rate, abs=1e-4)


def test_dropped_units_get_no_gradient():
    inputs = torch.ones(1000, requires_grad=True)
    outputs = SeededDropout(0.5, torch.Generator().manual_seed(0))(inputs)
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_in_evaluation_mode_dropout_changes_and_draws_nothing():
    masks = torch.Generator().manual_seed(0)
    state, inputs = masks.get_state(), torch.randn(10, 10)
    assert torch.equal(SeededDropout(0.5, masks).eval()(inputs), inputs)
    assert torch.equal(masks.get_state(), state)


def test_dropout_masks_differ_from_step_to_step():
    dropout, inputs = SeededDropout(0.5, torch.Generator().manual_seed(0)), torch.ones(100)
    assert not torch.equal(dropout(inputs), dropout(inputs))


@given(eighths=st.integers(1, 7), count=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_both_bytes_of_a_word_drop_at_the_rate(eighths, count, seed):
    outputs = SeededDropout(eighths / 8, torch.Generator().manual_seed(seed))(torch.ones(count, 999))
    for half in outputs.flatten().tensor_split(2):
        kept = half.count_nonzero().item()
        spread = math.sqrt(len(half) * eighths / 8 * (1 - eighths / 8))
        assert abs(kept - len(half) * (1 - eighths / 8)) < 6 * spread


def test_the_bytes_of_a_word_drop_independently():
    outputs = SeededDropout(0.5, torch.Generator().manual_seed(0))(torch.ones(1_000_000))
    high, low = ((half != 0).double() for half in outputs.tensor_split(2))
    assert abs(torch.corrcoef(torch.stack((high, low)))[0, 1].item()) < 4 / math.sqrt(len(high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.25, 0.3])
def test_dropout_is_a_product_of_features_mask_and_scale_both_ways(rate, dtype):
    features, gradient = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    features.requires_grad_()
    outputs = SeededDropout(rate, torch.Generator().manual_seed(0))(features)
    outputs.backward(gradient)
    mask, scale = outputs.detach() != 0, 2**BITS / (2**BITS - round(rate * 2**BITS))
    for result, source in ((outputs.detach(), features.detach()), (features.grad, gradient)):
        torch.testing.assert_close(result, (source.double() * mask * scale).to(dtype))
