"""Dropout that draws from a generator of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BITS = 16
"""Random bits that decide whether a unit is dropped: rates are rounded to steps of 1/65,536."""
COARSE_BITS = 8
"""Bits that suffice for rates that are multiples of 1/256, such as 0.25 and 0.5."""


class SeededDropout(nn.Module):
    """Dropout with its own generator, so that no other code can change what a trial drops.

    Args:
        rate: Share of units set to zero while training, in (0, 1); rounded to the nearest multiple of 1/65,536.
        generator: Source of the masks; on the device that trains the net.

    Reference: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    def __init__(self, rate: float, generator: torch.Generator):
        super().__init__()
        self.rate = rate
        self.generator = generator
        self._dropped = min(max(1, round(rate * 2**BITS)), 2**BITS - 1)

    def forward(self, features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Zero a share `rate` of the features and scale up the rest; in evaluation mode, return them unchanged."""
        if not self.training:
            return features
        mask = _draw_mask(features, self._dropped, self.generator)
        dropped: Tensor = _Masked.apply(features, mask, 2**BITS / (2**BITS - self._dropped))
        return dropped

    def extra_repr(self) -> str:
        """Show the rate where the net is printed."""
        return f"rate={self.rate}"


class _Masked(torch.autograd.Function):
    """features x mask x scale in one pass over memory, forward and backward."""

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
    """Return 0 with probability dropped / 65,536 and 1 otherwise, in the type and memory layout of `features`.

    A unit is kept if its random word, a signed 16-bit integer, is at least `threshold`. With words of four bits (-8 to
    7) and 4 of 16 values dropped (a rate of 0.25), the threshold is 4 - 8 = -4, and -8 to -5 are dropped.

    The low half of that threshold is zero, as 4 is a multiple of 2**2. So the high half of the word decides alone, and
    its low half, shifted up, can decide about another unit:

        word          compared with -4 (1100)      kept
        1011 = -5     1011 = -5 (high half 10)     0
                      1100 = -4 (low half 11)      1

    One 64-bit draw thus serves four units, or eight; on a CPU, `bernoulli_` takes ten times as long.
    """
    mask = torch.empty_like(features)  # dense, in whatever order `features` lies in memory
    units = mask.as_strided((mask.numel(),), (1,))  # [unit], in the order of memory
    threshold = dropped - 2 ** (BITS - 1)
    if dropped % 2 ** (BITS - COARSE_BITS):
        torch.ge(_draw_words(mask.numel(), mask.device, generator), threshold, out=units)
    else:
        half = -(-mask.numel() // 2)  # rounded up
        words = _draw_words(half, mask.device, generator)
        torch.ge(words, threshold, out=units[:half])
        torch.ge(words[: mask.numel() - half] << COARSE_BITS, threshold, out=units[half:])
    return mask


def _draw_words(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return random 16-bit integers, `[count]`."""
    longs = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    return longs.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
