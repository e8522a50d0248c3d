"""Images that are moved and bent at random in training, and moved by a pixel in prediction.

Everything is done in batches on the device that trains. What comes into an image from outside is its border, repeated.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grid.train.actions import Predict, Use

SHIFT_PIXELS = 2.0
"""Largest shift in each direction."""
ROTATION_DEGREES, SCALING, SHEARING = 12.0, 0.12, 0.12
"""Largest rotation, change of size and slant, each drawn evenly around none."""
BEND_PIXELS, BEND_RANGE = 1.0, 4.0
"""Standard deviation of the elastic displacement, and of the Gaussian that smooths it, in pixels of an image of 28."""
REFERENCE_SIDE = 28
"""Pixels along the side of an image for which these are meant; larger ones are moved in proportion."""


def augment(images: Tensor, use: Use) -> Tensor:
    """Return a batch of images, each changed at random.

    `shift` moves by whole pixels. `affine` moves, rotates, scales and slants. `elastic` does the same, and bends by a
    smooth random field. The setting `augmentation_strength` multiplies all of it.

    Args:
        images: `[batch, channel, height, width]`.
        use: Level, strength and generator.

    Reference: Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801
    """
    strength = float(use.config.setting("augmentation_strength"))
    if use.level == "shift":
        return shift(images, _draw_shifts(images, strength, use.generator))
    grid = _affine_grid(images, strength, use.generator)
    if use.level == "elastic":
        grid = grid + _smooth_field(images, strength, use.generator)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def shift(images: Tensor, pixels: Tensor) -> Tensor:
    """Return images moved by whole pixels.

    Args:
        images: `[batch, channel, height, width]`.
        pixels: Whole numbers, down and to the right, `[batch, 2]`.
    """
    batch, channels, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - pixels[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - pixels[:, 1:]).clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
    return moved.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))


def predict_shifted(predict: Predict, images: Tensor, use: Use) -> Tensor:
    """Return the mean logits of images (a half) and of their shifts by a pixel along a diagonal (a quarter each).

    Args:
        predict: The net.
        images: `[batch, channel, height, width]`.
        use: Ignored.

    Reference: Jordan 2024, https://arxiv.org/abs/2404.00498 (multi-crop evaluation, without its mirrored half)
    """
    del use
    logits = predict(images) / 2
    for pixels in (-1, 1):
        logits = logits + predict(shift(images, torch.full((len(images), 2), pixels, device=images.device))) / 4
    return logits


def _draw_shifts(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    _, _, height, width = images.shape
    farthest = [round(strength * SHIFT_PIXELS * side / REFERENCE_SIDE) for side in (height, width)]
    draws = [
        torch.randint(-most, most + 1, (len(images),), generator=generator, device=images.device) for most in farthest
    ]
    return torch.stack(draws, dim=1)


def _affine_grid(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return where each pixel of the new images is taken from, `[batch, height, width, 2]`, from -1 to 1."""
    draws = strength * (2 * torch.rand(len(images), 6, generator=generator, device=images.device) - 1)
    angle = math.radians(ROTATION_DEGREES) * draws[:, 0]
    cosine, sine, slant = torch.cos(angle), torch.sin(angle), SHEARING * draws[:, 1]
    across, down = torch.exp(SCALING * draws[:, 2]), torch.exp(SCALING * draws[:, 3])
    moves = 2 * SHIFT_PIXELS / REFERENCE_SIDE * draws[:, 4:]
    rows = (
        torch.stack((across * cosine, across * slant - down * sine, moves[:, 0]), dim=1),
        torch.stack((across * sine, down * cosine, moves[:, 1]), dim=1),
    )
    return F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)


def _smooth_field(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return random displacements that change smoothly over the image, `[batch, height, width, 2]`."""
    batch, _, height, width = images.shape
    noise = torch.randn(batch, 2, height, width, generator=generator, device=images.device)
    field: Tensor = _smoother(height, images) @ noise @ _smoother(width, images).T
    field = field * (2 * strength * BEND_PIXELS / REFERENCE_SIDE)
    return field.permute(0, 2, 3, 1)


def _smoother(side: int, like: Tensor) -> Tensor:
    """Return weights that turn independent normal draws along a side into smooth ones of variance 1, `[side, side]`."""
    places = torch.arange(side, device=like.device, dtype=like.dtype) * REFERENCE_SIDE / side
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * BEND_RANGE**2))
    return F.normalize(weights, dim=1)
