"""Building blocks; the order layer -> norm -> activation -> pool -> dropout is said here and nowhere else.

An activation that never falls comes after the pool: the result is the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nets.activations import ACTIVATIONS, RISING, gain


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """What a net is built with, apart from its sizes."""

    activation: str
    """A name in `ACTIVATIONS`."""
    batch_norm: bool
    dropout_rate: float
    """Share of units dropped while training, in [0, 1); 0 leaves the dropout layers out."""


RANDOM_VALUES = 2**16
"""How finely a dropout rate is met: 16 random bits decide about a unit."""


class SeededDropout(nn.Module):
    """Dropout that draws from a generator of its own, so that no other code can change what a trial drops.

    Args:
        rate: Share of units set to zero while training, in (0, 1); rounded to the nearest of 65,536 steps.
        generator: Source of the masks; on the device that the net is trained on.

    Reference: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    def __init__(self, rate: float, generator: torch.Generator):
        super().__init__()
        self.rate = rate
        self.generator = generator
        self._dropped = min(max(1, round(rate * RANDOM_VALUES)), RANDOM_VALUES - 1)

    def forward(self, features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Zero a share `rate` of the features and scale up the others; the identity in evaluation mode."""
        if not self.training:
            return features
        kept = _draw_mask(features, self._dropped, self.generator)
        return (features * kept).mul_(RANDOM_VALUES / (RANDOM_VALUES - self._dropped))

    def extra_repr(self) -> str:
        """Show the rate where the net is printed."""
        return f"rate={self.rate}"


class FlattenPixels(nn.Module):
    """Flatten feature maps pixel by pixel, channels innermost: no copy where they lie like that in memory."""

    def forward(self, maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Return `[batch, height x width x channels]`."""
        return maps.permute(0, 2, 3, 1).flatten(start_dim=1)


def linear(in_features: int, out_features: int, *, gain: float, bias: bool, generator: torch.Generator) -> nn.Linear:
    """Build a linear layer whose weights are drawn from `generator` with standard deviation gain / sqrt(fan_in)."""
    layer: nn.Linear = skip_init(nn.Linear, in_features, out_features, bias=bias)
    _draw(layer, gain, generator)
    return layer


def conv3x3(in_channels: int, out_channels: int, *, gain: float, bias: bool, generator: torch.Generator) -> nn.Conv2d:
    """Build a size-keeping 3x3 convolution, drawn like `linear`."""
    layer: nn.Conv2d = skip_init(nn.Conv2d, in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
    _draw(layer, gain, generator)
    return layer


def block(
    layer: Callable[..., nn.Module],
    in_size: int,
    out_size: int,
    techniques: Techniques,
    weights: torch.Generator,
    masks: torch.Generator,
    pool: nn.Module | None = None,
) -> Iterator[nn.Module]:
    """Yield the modules of one hidden block.

    A layer in front of a norm has no bias: the norm would subtract it again.

    Args:
        layer: `linear` or `conv3x3`.
        in_size: Features (channels) that come in.
        out_size: Features (channels) that go out.
        techniques: Activation, batch norm and dropout.
        weights: Draws the initial weights; on the CPU.
        masks: Draws the dropout masks; on the device that trains.
        pool: A max pooling, put between activation and dropout, or before an activation that never falls.

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167 (norm before activation, no bias)
    """
    norms = {linear: nn.BatchNorm1d, conv3x3: nn.BatchNorm2d}
    yield layer(in_size, out_size, gain=gain(techniques.activation), bias=not techniques.batch_norm, generator=weights)
    if techniques.batch_norm:
        yield norms[layer](out_size)
    activation = ACTIVATIONS[techniques.activation]()
    if pool is None:
        yield activation
    elif techniques.activation in RISING:  # the same values from a quarter of the work
        yield from (pool, activation)
    else:
        yield from (activation, pool)
    if techniques.dropout_rate > 0:
        yield SeededDropout(techniques.dropout_rate, masks)


def _draw(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    with torch.no_grad():
        layer.weight.normal_(0, gain / math.sqrt(fan_in), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()


def _draw_mask(features: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """Return 0 with probability dropped / 65,536, otherwise 1, in the type and layout of `features`.

    Every 64 bits that the generator yields serve four units: on a CPU `bernoulli_` takes seven times as long.
    """
    count = features.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=features.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    mask = torch.empty_like(features)  # dense, whatever its layout
    torch.ge(bits, dropped - RANDOM_VALUES // 2, out=mask.as_strided((count,), (1,)))
    return mask
