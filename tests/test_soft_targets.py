"""Label smoothing and mixup, against torch and against what their papers say."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from grid.config import InputError, TrialConfig
from grid.train.actions import Use
from grid.train.techniques.soft_targets import mix, smooth_labels

IMAGES = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 5
TARGETS = F.one_hot(LABELS, 5).float()


def use(seed: int = 0, **settings: str) -> Use:
    config = TrialConfig.from_params({"learning_rate": "1", "epochs": "1", **settings})
    return Use("on", config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", ["0.05", "0.1", "0.5"])
def test_label_smoothing_is_that_of_torch(share: str) -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    images, targets = smooth_labels(IMAGES, TARGETS, use(label_smoothing_rate=share))
    assert images is IMAGES
    expected = F.cross_entropy(logits, LABELS, label_smoothing=float(share))
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_mixup_weighs_images_and_targets_alike() -> None:
    images, targets = mix(IMAGES, TARGETS, use(mixup_alpha="1.0"))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64))
    own = targets[torch.arange(64), LABELS].min()  # of a pair of different classes
    pairs = [
        (first, second)
        for first in range(64)
        for second in range(64)
        if torch.allclose(images[first], own * IMAGES[first] + (1 - own) * IMAGES[second], atol=1e-5)
    ]
    assert sorted(first for first, _ in pairs) == list(range(64))
    assert sorted(second for _, second in pairs) == list(range(64))
    for first, second in pairs:
        torch.testing.assert_close(targets[first], own * TARGETS[first] + (1 - own) * TARGETS[second])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_weights_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    images, generator = torch.stack((torch.zeros(1, 1, 1), torch.ones(1, 1, 1))), use(mixup_alpha=str(alpha))
    drawn = torch.stack([mix(images, torch.eye(2), generator)[0].flatten() for _ in range(3000)])
    weights = drawn[:, 1][(drawn[:, 1] > 0) & (drawn[:, 1] < 1)]  # if the two are partners, and not rounded
    assert len(weights) > 1000
    assert stats.kstest(weights.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_equal_generators_yield_equal_bits() -> None:
    first, again, other = (mix(IMAGES, TARGETS, use(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_smallest_alpha_leaves_every_image_as_it_is_or_replaces_it() -> None:
    images, targets = mix(IMAGES, TARGETS, use(mixup_alpha="1e-30"))
    assert torch.isfinite(images).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("label_smoothing_rate", "0", "between 0 and 1, both excluded"),
        ("label_smoothing_rate", "1.0", "between 0 and 1, both excluded"),
        ("mixup_alpha", "0.0", "above 0 and at most 100"),
        ("mixup_alpha", "inf", "above 0 and at most 100"),
        ("ema_decay", "1.0", "0 or more and below 1"),
    ],
)
def test_values_out_of_range_are_refused(setting: str, value: str, rule: str) -> None:
    with pytest.raises(InputError, match=f"{setting} must be {rule}, got"):
        use(**{setting: value})
