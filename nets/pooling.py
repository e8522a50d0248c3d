"""Batch norm, activation and 2x2 max pooling, in this order, computed on a quarter of the pixels.

An activation that never falls gives the largest of four inputs the largest of the four outputs; one that first falls
and then rises gives it to the largest or to the smallest input. So pooling may come first, and only the batch norm's
statistics need every pixel: the same function with less memory traffic, which dominates the cost of these layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nets.activations import Activation

Maps = Float[Tensor, "batch channel height width"]
Pooled = Float[Tensor, "batch channel half_height half_width"]
Channels = Float[Tensor, " channel"]
PIXELS_FIRST, PIXELS_LAST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations that move the channels to the last axis, which is their order in memory, and back to the second."""
Bits = Int[Tensor, "..."]
"""Floating-point numbers reinterpreted as integers of the same size, bit by bit."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integer type of that size."""


class PooledActivation(nn.Module):
    """Normalise, activate and take the largest of every 2x2 pixels; an odd last row or column is left out.

    Args:
        activation: How it is built, and its shape.
        norm: The batch norm in front of the activation; None for a block without one.

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167 (norm before activation)
    """

    def __init__(self, activation: Activation, norm: nn.BatchNorm2d | None):
        super().__init__()
        self.norm = norm
        self.activation = activation.build()
        self._rising = activation.shape == "rising"
        self._pools_first = activation.shape in ("rising", "falling_then_rising")

    def forward(self, maps: Maps) -> Pooled:
        """Return maps of half the height and width."""
        if not (self._pools_first and _suits_fast_path(maps)):
            return self._pool_last(maps)
        activate = partial(self._activate, self._normaliser(maps))
        if self._rising and (self.norm is None or bool((self.norm.weight >= 0).all())):
            return activate(_LargestPixel.apply(maps, None))
        if torch.is_grad_enabled():
            return activate(_LargestPixel.apply(maps, activate))
        return torch.maximum(*(activate(_pool(maps, extreme)[1]) for extreme in (torch.maximum, torch.minimum)))

    def _pool_last(self, maps: Maps) -> Pooled:
        normalised = maps if self.norm is None else self.norm(maps)
        pool = partial(F.max_pool2d, kernel_size=2)
        first, second = (pool, self.activation) if self._rising else (self.activation, pool)
        pooled: Tensor = second(first(normalised))
        return pooled

    def _activate(self, normalise: Callable[[Maps], Maps], values: Maps) -> Maps:
        pixels = normalise(values).permute(PIXELS_FIRST)  # contiguous: torch's gelu takes twice as long otherwise
        activated: Tensor = self.activation(pixels).permute(PIXELS_LAST)
        return activated

    def _normaliser(self, maps: Maps) -> Callable[[Maps], Maps]:
        """Return a function that normalises a subset of the values of `maps`; in training, by the statistics of all."""
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


def _suits_fast_path(maps: Maps) -> bool:
    """Return whether pooling first is faster here: on a CPU, channels last in memory, with something to pool."""
    channels_last = maps.is_contiguous(memory_format=torch.channels_last)
    return maps.device.type == "cpu" and channels_last and min(maps.shape[2:]) > 1


class _LargestPixel(torch.autograd.Function):
    """Keep one of every 2x2 pixels: the largest or, given `activate`, the one whose activation is largest.

    The forward pass first takes the larger of two rows, then the larger of two columns; the backward pass retraces both
    steps by comparing their inputs with their outputs:

        forward              backward (gradient 7 of the one output)
        1 5  larger row      larger column     to the columns   to the rows
        3 2  -------->  3 5  -------->  5      0 7  -------->   0 7
                                                                0 0

    Of equal columns, the left one gets the gradient; of equal rows, the upper one. With `activate`, the same is done
    for the smallest pixel, which replaces the largest wherever its activation is larger, in `rows` as well.
    """

    @staticmethod
    def forward(ctx: Any, maps: Maps, activate: Callable[[Pooled], Pooled] | None) -> Pooled:
        rows, chosen = _pool(maps, torch.maximum)
        if activate is not None:
            low_rows, smallest = _pool(maps, torch.minimum)
            takes_smallest = _ones_where_negative(activate(chosen) - activate(smallest))
            _replace(chosen, smallest, takes_smallest)
            for column, low_column in zip(_columns(rows), _columns(low_rows), strict=True):
                _replace(column, low_column, takes_smallest.permute(PIXELS_FIRST))
        ctx.save_for_backward(maps, rows, chosen)
        return chosen

    @staticmethod
    def backward(ctx: Any, gradient: Pooled) -> tuple[Maps, None]:
        maps, rows, chosen = (_bits(tensor) for tensor in ctx.saved_tensors)
        odd = maps.shape[2] % 2 or maps.shape[3] % 2
        maps_gradient = torch.zeros_like(maps) if odd else torch.empty_like(maps)
        rows_gradient = torch.empty_like(rows)
        pixels, chosen_pixels = _bits(gradient).permute(PIXELS_FIRST), chosen.permute(PIXELS_FIRST)
        left, _ = _columns(rows)
        _route(pixels, left, chosen_pixels, out=_columns(rows_gradient))
        upper, _ = _rows(maps)
        _route(rows_gradient, upper, rows, out=_rows(maps_gradient))
        return maps_gradient.view(gradient.dtype), None


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
    """(values - mean) / sqrt(variance + epsilon) x weight + bias, by channel; only `epsilon` gets no gradient."""

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
        values_gradient, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, mean, variance, mean, inverse, False, ctx.epsilon, [True, True, True]
        )
        mean_gradient = -weight * inverse * bias_gradient
        variance_gradient = -weight * inverse.square() * weight_gradient / 2
        return values_gradient, weight_gradient, bias_gradient, mean_gradient, variance_gradient, None


def _affine(values: Maps, weight: Channels, bias: Channels, mean: Channels, variance: Channels, epsilon: float) -> Maps:
    normalised: Tensor = torch.native_batch_norm(values, weight, bias, mean, variance, False, 0.0, epsilon)[0]
    return normalised


def _pool(maps: Maps, extreme: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Pooled]:
    """Return the extremes of every two rows, `[batch, half height, even width, channel]`, and of every 2x2 pixels."""
    rows = extreme(*_rows(maps))
    return rows, extreme(*_columns(rows)).permute(PIXELS_LAST)


def _replace(values: Tensor, others: Tensor, mask: Bits) -> None:
    """Overwrite `values` with `others` where all bits of `mask` are set; where none are, keep them.

    Exclusive or changes a bit exactly where the two differ, so that `a ^ ((a ^ b) & mask)` is b or a. In four bits:

        a     b     a ^ b   mask   (a ^ b) & mask   a ^ that
        0101  0011  0110    1111   0110             0011 = b
        0101  0011  0110    0000   0000             0101 = a
    """
    bits = _bits(values)
    bits.bitwise_xor_((bits ^ _bits(others)).bitwise_and_(mask))


def _route(gradient: Bits, first: Bits, chosen: Bits, out: tuple[Bits, Bits]) -> None:
    """Write the gradient to `out[0]` where `first` was chosen and to `out[1]` elsewhere; the other gets 0.

    All are bits, which are compared and multiplied (by 0 or 1) several times as fast as bfloat16:

        gradient   first == chosen   out[0] = gradient x that   out[1] = gradient - out[0]
        0110       1                 0110                       0000
        0110       0                 0000                       0110
    """
    torch.eq(first, chosen, out=out[0]).mul_(gradient)
    torch.sub(gradient, out[0], out=out[1])


def _rows(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the even and of the odd rows, `[batch, half height, even width, channel]`, in pairs only."""
    half_height, half_width = maps.shape[2] // 2, maps.shape[3] // 2
    pixels = maps.permute(PIXELS_FIRST)[:, : 2 * half_height, : 2 * half_width]
    upper, lower = pixels.unflatten(1, (half_height, 2)).unbind(2)
    return upper, lower


def _columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the even and of the odd columns of `rows`, both `[batch, half height, half width, channel]`."""
    left, right = rows.unflatten(2, (rows.shape[2] // 2, 2)).unbind(3)
    return left, right


def _ones_where_negative(values: Tensor) -> Bits:
    """Return integers with all bits set where a value is negative, and with none set elsewhere.

    The shift copies the sign bit into every place; in four bits, 1010 >> 3 = 1111 and 0110 >> 3 = 0000.
    """
    bits = _bits(values)
    return bits >> (8 * bits.element_size() - 1)


def _bits(values: Tensor) -> Bits:
    """Return a view of the numbers as integers of their size."""
    return values.view(INTEGERS[values.element_size()])
