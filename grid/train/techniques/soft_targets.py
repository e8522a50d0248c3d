"""Targets that are no single class: label smoothing and mixup."""

import torch
from torch import Tensor

from grid.train.actions import Use


def smooth_labels(images: Tensor, targets: Tensor, use: Use) -> tuple[Tensor, Tensor]:
    """Return the images, and targets of which the setting `label_smoothing_rate` is spread evenly over all classes.

    Args:
        images: `[batch, channel, height, width]`.
        targets: Probabilities, `[batch, class]`.
        use: Gives the share.

    Reference: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567 (section 7)
    """
    share = float(use.config.setting("label_smoothing_rate"))
    return images, (1 - share) * targets + share / targets.shape[1]


def mix(images: Tensor, targets: Tensor, use: Use) -> tuple[Tensor, Tensor]:
    """Return means of pairs of images and of their targets, weighted by one draw from Beta(a, a) per batch.

    Args:
        images: `[batch, channel, height, width]`.
        targets: Probabilities, `[batch, class]`.
        use: Gives a, the setting `mixup_alpha`, and the generator.

    Reference: Zhang et al. 2018, https://arxiv.org/abs/1710.09412
    """
    alpha = torch.full((2,), float(use.config.setting("mixup_alpha")), dtype=torch.float64, device=images.device)
    first, second = torch._standard_gamma(alpha, generator=use.generator)  # torch.distributions.Beta takes none
    weight = (first / (first + second)).nan_to_num(0.5).to(images.dtype)  # both may be 0 if a is tiny
    partners = torch.randperm(len(images), generator=use.generator, device=images.device)
    return torch.lerp(images[partners], images, weight), torch.lerp(targets[partners], targets, weight)
