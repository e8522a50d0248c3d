"""Images that are moved and bent: what may change, what may not, and by how much."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grid.config import InputError, TrialConfig
from grid.train.actions import Use
from grid.train.techniques import augmentation
from grid.train.techniques.augmentation import augment, predict_shifted, shift

LEVELS = ("affine", "elastic", "shift")


def use(level: str, strength: float = 1.0, seed: int = 0) -> Use:
    params = {"learning_rate": "1", "epochs": "1", "augmentation": level, "augmentation_strength": str(strength)}
    return Use(level, TrialConfig.from_params(params), torch.Generator().manual_seed(seed))


def dots(count: int = 400, side: int = 29) -> Tensor:
    """Return images with a smooth dot in the middle."""
    places = torch.arange(side) - side // 2
    dot = torch.exp(-(places[:, None] ** 2 + places**2) / 4.0)
    return dot.expand(count, 1, side, side)


def centres(images: Tensor) -> Tensor:
    """Return where the mass of each image is, down and to the right of its middle, `[image, 2]`."""
    places = torch.arange(images.shape[-1]) - images.shape[-1] // 2
    mass = images.sum(dim=(1, 2, 3))
    down = (images.sum(dim=3) * places).sum(dim=(1, 2)) / mass
    right = (images.sum(dim=2) * places).sum(dim=(1, 2)) / mass
    return torch.stack((down, right), dim=1)


@pytest.mark.parametrize("pixels", [(0, 0), (1, 0), (0, -2), (-3, 3), (40, -40)])
def test_a_shift_moves_pixels_and_repeats_the_border(pixels: tuple[int, int]) -> None:
    images = torch.rand(3, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    moved = shift(images, torch.tensor([pixels] * 3))
    down, right = pixels
    padded = F.pad(images, (40, 40, 40, 40), mode="replicate")
    expected = padded[:, :, 40 - down : 47 - down, 40 - right : 49 - right]
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (4, 3, 12, 20)])
def test_shape_type_and_range_are_kept(level: str, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.3
    changed = augment(images, use(level, strength=3.0))
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert changed.min() >= images.min() - 1e-6
    assert changed.max() <= images.max() + 1e-6


@pytest.mark.parametrize("level", LEVELS)
def test_equal_generators_yield_equal_bits_and_every_image_has_a_draw_of_its_own(level: str) -> None:
    images = dots(20)
    first, again, other = (augment(images, use(level, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 10


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_the_same_everywhere_stays_so(level: str) -> None:
    """What comes in from outside is the border: nothing grey, nothing black."""
    images = torch.full((8, 1, 28, 28), -0.7)
    torch.testing.assert_close(augment(images, use(level, strength=2.0)), images)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_moves_are_centred_and_grow_with_the_strength(level: str, strength: float) -> None:
    moves = centres(augment(dots(), use(level, strength)))
    assert moves.mean(dim=0).abs().max() < 0.25 * strength
    largest = strength * augmentation.SHIFT_PIXELS
    spread = math.sqrt((largest + 1) * largest / 3) if level == "shift" else largest / math.sqrt(3)
    expected = math.hypot(spread, strength * augmentation.BEND_PIXELS if level == "elastic" else 0.0)
    assert moves.std(dim=0) == pytest.approx(torch.tensor([expected] * 2), rel=0.2)


def test_moves_are_in_proportion_to_the_side_of_an_image() -> None:
    small, large = (centres(augment(dots(side=side), use("shift"))).abs().max() for side in (29, 57))
    assert (small, large) == (pytest.approx(2, abs=0.01), pytest.approx(4, abs=0.01))


def test_affine_images_turn_slant_and_change_size_around_the_middle() -> None:
    grid = augmentation._affine_grid(torch.zeros(2000, 1, 28, 28), 1.0, torch.Generator().manual_seed(0))
    across = (grid[:, 14, 27] - grid[:, 14, 0]) / (2 * 27 / 28)
    angles = torch.rad2deg(torch.atan2(across[:, 1], across[:, 0]))
    assert angles.abs().max() == pytest.approx(augmentation.ROTATION_DEGREES, rel=0.02)
    sizes = across.norm(dim=1).log()
    assert sizes.abs().max() == pytest.approx(augmentation.SCALING, rel=0.02)
    middle = grid.mean(dim=(1, 2))
    assert middle.abs().max() == pytest.approx(2 * augmentation.SHIFT_PIXELS / 28, rel=0.02)


def test_an_elastic_field_is_smooth_and_as_large_as_it_says() -> None:
    field = augmentation._smooth_field(torch.zeros(500, 1, 28, 28), 1.0, torch.Generator().manual_seed(0)) * 28 / 2
    assert field.std() == pytest.approx(augmentation.BEND_PIXELS, rel=0.05)
    assert field.std(dim=0).min() > 0.9 * augmentation.BEND_PIXELS  # at the border as well
    steps = (field[:, 1:] - field[:, :-1]).std()
    assert steps == pytest.approx(augmentation.BEND_PIXELS / (augmentation.BEND_RANGE * math.sqrt(2)), rel=0.1)


def test_shifted_predictions_are_a_weighted_mean() -> None:
    images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    logits = predict_shifted(lambda batch: batch.flatten(1), images, use("none"))
    moved = [shift(images, torch.full((4, 2), pixels)) for pixels in (-1, 1)]
    torch.testing.assert_close(logits, (images / 2 + sum(moved) / 4).flatten(1))


@pytest.mark.parametrize("strength", ["0", "-1", "5.1", "nan"])
def test_a_strength_that_leaves_nothing_of_an_image_is_refused(strength: str) -> None:
    with pytest.raises(InputError, match="augmentation_strength must be above 0 and at most 5, got"):
        TrialConfig.from_params({"learning_rate": "1", "epochs": "1", "augmentation_strength": strength})
