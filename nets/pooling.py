"""Batch norm, activation and 2x2 max pooling, in this order, computed on a quarter of the pixels.

The largest of four activations is the activation of the largest of four inputs, if it never falls; of the largest or
of the smallest, if it falls first and rises then. So the pooling may come first, and only the statistics of the batch
norm have to see every pixel: the same function, less traffic with the memory, which is what these layers cost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nets.activations import ACTIVATIONS, FALLING_THEN_RISING, RISING

Maps = Float[Tensor, "batch channel height width"]
Pooled = Float[Tensor, "batch channel half_height half_width"]
Channels = Float[Tensor, " channel"]
PIXELS_FIRST, PIXELS_LAST = (0, 2, 3, 1), (0, 3, 1, 2)
"""How channels become the last axis, as they lie in memory, and the second one again."""
Bits = Int[Tensor, "..."]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers of this size."""


class PooledActivation(nn.Module):
    """Normalise, activate and take the largest of every 2x2 pixels; an odd last row or column is left out.

    Args:
        activation: A name in `ACTIVATIONS`.
        norm: What comes before the activation, if anything.

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167 (norm before activation)
    """

    def __init__(self, activation: str, norm: nn.BatchNorm2d | None):
        super().__init__()
        self.norm = norm
        self.activation = ACTIVATIONS[activation]()
        self._rising = activation in RISING
        self._pools_first = self._rising or activation in FALLING_THEN_RISING

    def forward(self, maps: Maps) -> Pooled:
        """Return maps of half the height and width."""
        if not (self._pools_first and _is_suited(maps)):
            return self._plain(maps)
        activated = partial(self._activated, self._normaliser(maps))
        if self._rising and (self.norm is None or bool((self.norm.weight >= 0).all())):
            return activated(_Pool.apply(maps, None))
        if torch.is_grad_enabled():
            return activated(_Pool.apply(maps, activated))
        return torch.maximum(*(activated(_reduce(maps, extreme)[1]) for extreme in (torch.maximum, torch.minimum)))

    def _plain(self, maps: Maps) -> Pooled:
        normalised = maps if self.norm is None else self.norm(maps)
        pool = partial(F.max_pool2d, kernel_size=2)
        first, second = (pool, self.activation) if self._rising else (self.activation, pool)
        pooled: Tensor = second(first(normalised))
        return pooled

    def _activated(self, normalise: Callable[[Maps], Maps], values: Maps) -> Maps:
        pixels = normalise(values).permute(PIXELS_FIRST)  # torch takes twice as long for gelu of channels last
        activated: Tensor = self.activation(pixels).permute(PIXELS_LAST)
        return activated

    def _normaliser(self, maps: Maps) -> Callable[[Maps], Maps]:
        """Return what normalises some of the values of `maps`, with the statistics of all if they are to be used."""
        norm = self.norm
        if norm is None:
            return lambda values: values
        if not norm.training:
            return norm
        seen, running_mean, running_variance = norm.num_batches_tracked, norm.running_mean, norm.running_var
        if seen is None:
            raise TypeError("a batch norm without running statistics")
        seen.add_(1)
        momentum = 1 / seen.item() if norm.momentum is None else norm.momentum
        mean, variance = _BatchStatistics.apply(maps, running_mean, running_variance, momentum)
        return lambda values: _Normalise.apply(values, norm.weight, norm.bias, mean, variance, norm.eps)


def _is_suited(maps: Maps) -> bool:
    """Say whether the fast way is one here: on a CPU, pixel after pixel in memory, sides even."""
    height, width = maps.shape[2:]
    laid_out = maps.is_contiguous(memory_format=torch.channels_last)
    return maps.device.type == "cpu" and laid_out and height % 2 == width % 2 == 0


class _Pool(torch.autograd.Function):
    """The largest of every 2x2 pixels or, given a activate, whichever of the largest and the smallest it values higher.

    Of equal pixels, the left column's get the gradient, and of these, the upper one.
    """

    @staticmethod
    def forward(ctx: Any, maps: Maps, activate: Callable[[Pooled], Pooled] | None) -> Pooled:
        rows, chosen = _reduce(maps, torch.maximum)
        if activate is not None:
            low_rows, smallest = _reduce(maps, torch.minimum)
            low = _ones_where_negative(activate(chosen) - activate(smallest))
            _exchange(chosen, smallest, low)
            for high_column, low_column in zip(_columns(rows, low), _columns(low_rows, low), strict=True):
                _exchange(high_column, low_column, low.permute(PIXELS_FIRST))
        ctx.save_for_backward(maps, rows, chosen)
        return chosen

    @staticmethod
    def backward(ctx: Any, gradient: Pooled) -> tuple[Maps, None]:
        maps, rows, chosen = (_bits(tensor) for tensor in ctx.saved_tensors)
        of_maps, of_rows = torch.empty_like(maps), torch.empty_like(rows)
        left, _ = _columns(rows, maps)
        _share(_bits(gradient).permute(PIXELS_FIRST), left, chosen.permute(PIXELS_FIRST), _columns(of_rows, maps))
        top, _ = _rows(maps)
        _share(of_rows, top, rows, _rows(of_maps))
        return of_maps.view(gradient.dtype), None


class _BatchStatistics(torch.autograd.Function):
    """Mean and (biased) variance of every channel; moves the running ones towards them."""

    @staticmethod
    def forward(
        ctx: Any, maps: Maps, running_mean: Channels, running_variance: Channels, momentum: float
    ) -> tuple[Channels, Channels]:
        mean, variance = torch.batch_norm_update_stats(maps, running_mean, running_variance, momentum)
        ctx.save_for_backward(maps, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, mean_gradient: Channels, variance_gradient: Channels) -> tuple[Maps, None, None, None]:
        maps, mean = ctx.saved_tensors
        count = maps.numel() / len(mean)
        scale, shift = variance_gradient * (2 / count), mean_gradient / count
        return _affine(maps, scale, shift, mean, torch.ones_like(mean), 0.0), None, None, None


class _Normalise(torch.autograd.Function):
    """(values - mean) / sqrt(variance + epsilon) x weight + bias, by channel; each has a gradient but epsilon."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Maps,
        weight: Channels,
        bias: Channels,
        mean: Channels,
        variance: Channels,
        epsilon: float,
    ) -> Maps:
        ctx.save_for_backward(values, weight, mean, variance)
        ctx.epsilon = epsilon
        return _affine(values, weight, bias, mean, variance, epsilon)

    @staticmethod
    def backward(ctx: Any, gradient: Maps) -> tuple[Tensor | None, ...]:
        values, weight, mean, variance = ctx.saved_tensors
        inverse = (variance + ctx.epsilon).rsqrt()
        of_values, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, mean, variance, mean, inverse, False, ctx.epsilon, [True, True, True]
        )
        of_mean = -weight * inverse * of_bias
        of_variance = -weight * inverse.square() * of_weight / 2
        return of_values, of_weight, of_bias, of_mean, of_variance, None


def _affine(values: Maps, weight: Channels, bias: Channels, mean: Channels, variance: Channels, epsilon: float) -> Maps:
    normalised: Tensor = torch.native_batch_norm(values, weight, bias, mean, variance, False, 0.0, epsilon)[0]
    return normalised


def _reduce(maps: Maps, extreme: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Pooled]:
    """Return the extremes of every two rows, `[batch, half height, width x channel]`, and of every 2x2 pixels."""
    rows = extreme(*_rows(maps))
    return rows, extreme(*_columns(rows, maps)).permute(PIXELS_LAST)


def _exchange(high: Tensor, low: Tensor, chosen: Bits) -> None:
    """Put the bits of `low` into `high` where all bits of `chosen` are set."""
    bits = _bits(high)
    bits.bitwise_xor_((bits ^ _bits(low)).bitwise_and_(chosen))


def _share(gradient: Bits, first: Bits, chosen: Bits, out: tuple[Bits, Bits]) -> None:
    """Give the gradient to the first of two where it was chosen, and to the second elsewhere; 0 to the other.

    All are bits: integers are compared and multiplied (by 0 or 1) several times as fast as bfloat16.
    """
    torch.eq(first, chosen, out=out[0]).mul_(gradient)
    torch.sub(gradient, out[0], out=out[1])


def _rows(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd rows, both `[batch, half height, width x channel]`."""
    batch, channels, height, width = maps.shape
    pairs = maps.permute(PIXELS_FIRST).view(batch, height // 2, 2, width * channels)
    return pairs[:, :, 0], pairs[:, :, 1]


def _columns(rows: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd columns of rows of `maps`, both `[batch, half height, half width, channel]`."""
    pairs = rows.view(*rows.shape[:2], -1, 2, maps.shape[1])
    return pairs[:, :, :, 0], pairs[:, :, :, 1]


def _ones_where_negative(values: Tensor) -> Bits:
    """Return all bits set for a negative number, none for another."""
    bits = _bits(values)
    return bits >> (8 * bits.element_size() - 1)


def _bits(values: Tensor) -> Bits:
    """See numbers as integers of their size."""
    return values.view(INTEGERS[values.element_size()])
