"""Dropout that draws from a generator of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BITS = 16
"""Random bits that decide about a unit: a rate is met to one step in 65,536."""
COARSE_BITS = 8
"""Bits that are enough for rates that are whole numbers of 256ths, such as 0.25 and 0.5."""


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
        self._dropped = min(max(1, round(rate * 2**BITS)), 2**BITS - 1)

    def forward(self, features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Zero a share `rate` of the features and scale up the others; the identity in evaluation mode."""
        if not self.training:
            return features
        mask = _draw_mask(features, self._dropped, self.generator)
        dropped: Tensor = _Masked.apply(features, mask, 2**BITS / (2**BITS - self._dropped))
        return dropped

    def extra_repr(self) -> str:
        """Show the rate where the net is printed."""
        return f"rate={self.rate}"


class _Masked(torch.autograd.Function):
    """features x mask x scale in one pass over the memory, forward and backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return _product(features, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _product(gradient, mask, ctx.scale), None, None


def _product(features: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.addcmul(features.new_zeros(()), features, mask, value=scale)


def _draw_mask(features: Tensor, dropped: int, generator: torch.Generator) -> Tensor:
    """Return 0 with probability dropped / 65,536, otherwise 1, in the type and layout of `features`.

    Every 64 bits that the generator yields serve four units, or eight: on a CPU `bernoulli_` takes ten times as long.
    """
    mask = torch.empty_like(features)  # dense, whatever its layout
    units = mask.as_strided((mask.numel(),), (1,))
    least = dropped - 2 ** (BITS - 1)
    if dropped % 2 ** (BITS - COARSE_BITS):
        torch.ge(_draw_words(mask.numel(), mask.device, generator), least, out=units)
    else:  # the high byte of a word decides about one unit, the low byte about another
        half = -(-mask.numel() // 2)
        words = _draw_words(half, mask.device, generator)
        torch.ge(words, least, out=units[:half])
        torch.ge(words[: mask.numel() - half] << COARSE_BITS, least, out=units[half:])
    return mask


def _draw_words(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return random 16-bit integers, `[count]`."""
    longs = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    return longs.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
