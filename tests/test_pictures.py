import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from grid.data.glyphs import CLASSES
from grid.driver.pictures import (
    CAPTION_INCHES,
    CELL_INCHES,
    DPI,
    EXAMPLES,
    GAP_INCHES,
    MISTAKE_INCHES,
    caption,
    confusion_picture,
    mistake_sheet,
    most_confused,
    row_shares,
    sample_sheet,
    shorten,
    strip,
)

LABELS = np.arange(len(CLASSES)).repeat(EXAMPLES - 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (len(LABELS), 28, 28), dtype=np.uint8)
DIGITS = CLASSES[:10]
RIGHT = np.diag(np.full(10, 200))
CELL_PIXELS = (CELL_INCHES * DPI) ** 2
CONFIDENCE = np.linspace(0.5, 0.9, len(LABELS))

PICTURES: dict[str, Callable[[], bytes]] = {
    "confusion": lambda: confusion_picture(np.eye(47, dtype=int), CLASSES, "a title"),
    "samples": lambda: sample_sheet(IMAGES, LABELS, CLASSES),
    "mistakes": lambda: mistake_sheet(IMAGES, LABELS, LABELS[::-1], CONFIDENCE, CLASSES),
}


def pixels(png: bytes) -> np.ndarray:
    """Return the colours of a picture, `[row, column, colour]`."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def confused(true: int, predicted: int, images: int) -> np.ndarray:
    """Return the confusion of 200 images per class, all read rightly but some of one."""
    confusion = RIGHT.copy()
    confusion[true, true] -= images
    confusion[true, predicted] += images
    return confusion


def orange(confusion: np.ndarray) -> np.ndarray:
    """Return the orange pixels that the picture of a net without mistakes has not, `[pixel, colour]`."""
    before, after = (pixels(confusion_picture(some, DIGITS, "a title")) for some in (RIGHT, confusion))
    return after[(before != after).any(axis=2) & (after[..., 0] > after[..., 2] + 30)]


def one_mistake_each(count: int) -> bytes:
    zeros = np.zeros(count, int)
    return mistake_sheet(IMAGES[:count], zeros, zeros + 1, np.linspace(0, 1, count), CLASSES)


def first_tile(png: bytes) -> np.ndarray:
    left, top, size = (int(DPI * inches) for inches in (GAP_INCHES, GAP_INCHES / 2 + CAPTION_INCHES, MISTAKE_INCHES))
    return pixels(png)[top + 5 : top + size - 5, left + 5 : left + size - 5]


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_equal_input_yields_equal_bytes_that_tell_neither_time_nor_version(draw):
    png = draw()
    assert png == draw()
    assert not any(chunk in png for chunk in (b"tEXt", b"iTXt", b"tIME"))


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_nothing_touches_the_rim_of_a_picture(draw):
    picture = pixels(draw())
    for rim in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (rim == 255).all()


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_leave_no_state_in_pyplot(draw):
    draw()
    assert pyplot.get_fignums() == []


def test_row_shares_are_shares_of_the_true_class():
    confusion = np.array([[3, 1, 0], [0, 0, 0], [5, 0, 15]])
    assert row_shares(confusion).tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]


def test_a_confusion_colours_one_cell_orange():
    assert 0.8 * CELL_PIXELS < len(orange(confused(3, 9, images=8))) < 1.3 * CELL_PIXELS


def test_one_misread_image_in_two_hundred_can_be_seen():
    assert len(orange(confused(3, 9, images=1))) > 0.8 * CELL_PIXELS


def test_the_more_images_are_confused_the_darker_is_their_cell():
    brightness = [np.median(orange(confused(3, 9, images=count)).sum(axis=1)) for count in (1, 8, 30, 90)]
    assert brightness == sorted(set(brightness), reverse=True)


@pytest.mark.parametrize("classes", ["0123456789", CLASSES])
def test_a_cell_has_room_for_its_character(classes):
    """A character of 9 points is 19 pixels high."""
    height, _, _ = pixels(confusion_picture(np.eye(len(classes), dtype=int), classes, "")).shape
    assert height / len(classes) > 30


def test_a_strip_shows_the_first_images_side_by_side():
    shown = strip(IMAGES[: EXAMPLES + 2])
    assert np.array_equal(shown, np.concatenate(IMAGES[:EXAMPLES], axis=1))


def test_a_strip_in_colour_shows_the_first_images_side_by_side():
    colours = np.random.default_rng(0).integers(0, 256, (EXAMPLES + 2, 3, 5, 9), dtype=np.uint8)
    assert np.array_equal(strip(colours), np.concatenate(colours[:EXAMPLES], axis=2))


def test_images_in_colour_are_shown_in_colour():
    colours = np.zeros((len(LABELS), 3, 6, 6), dtype=np.uint8)
    colours[:, 1] = 200
    shown = pixels(sample_sheet(colours, LABELS, CLASSES)).reshape(-1, 3)
    assert (shown == (0, 200, 0)).all(axis=1).mean() > 0.3


@pytest.mark.parametrize("count", [0, 2])
def test_a_strip_has_paper_where_images_are_missing(count):
    shown = strip(IMAGES[:count])
    assert shown.shape == (28, 28 * EXAMPLES)
    assert not shown[:, 28 * count :].any()
    assert shown[:, : 28 * count].any(axis=0).all()


def test_images_of_another_class_do_not_change_a_strip():
    """Only the lower half of the sheet, where the last classes are, changes with their images."""
    others = np.where((LABELS < 42)[:, None, None], IMAGES, 0)
    before, after = (pixels(sample_sheet(images, LABELS, CLASSES)) for images in (IMAGES, others))
    rows = np.flatnonzero((before != after).any(axis=(1, 2)))
    assert 7 / 8 * len(before) - 20 < rows.min() < rows.max() < len(before)


def test_ink_is_dark_on_paper():
    black, white = (
        first_tile(mistake_sheet(np.full((1, 28, 28), value, np.uint8), *np.zeros((2, 1), int), np.ones(1), "ab"))
        for value in (255, 0)
    )
    assert (black.max(), white.min()) == (0, 255)


def test_mistakes_are_drawn_in_the_order_given():
    images = np.zeros((3, 28, 28), np.uint8)
    images[0] = 255
    sheet = mistake_sheet(images, np.zeros(3, int), np.ones(3, int), np.array([0.5, 0.9, 0.7]), "ab")
    assert first_tile(sheet).max() == 0


def test_a_net_without_mistakes_gets_a_sheet_that_says_so():
    assert (pixels(one_mistake_each(0)) < 200).any()


@pytest.mark.parametrize(("confidence", "text"), [(0.987, "98 %"), (0.9999, "99 %"), (1.0, "100 %")])
def test_captions_round_confidence_down(confidence, text):
    assert caption("4", "9", confidence) == f"4 read as 9, {text}"


NAMES = ["T-shirt/top", "trousers", "a very long name of a class", *"abcdefg"]


@pytest.mark.parametrize("count", [10, 47, 200])
def test_a_confusion_picture_is_readable_with_any_number_of_classes(count):
    """The rim is free, nothing is cut off, and no picture is larger than a screen can show."""
    confusion = np.diag(np.full(count, 90)) + np.random.default_rng(0).integers(0, 2, (count, count))
    names = [f"{NAMES[label % 10]}{label}" for label in range(count)]
    picture = pixels(confusion_picture(confusion, names, "resnet one_cycle leaky_relu adam batch_norm dropout l2"))
    for rim in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (rim == 255).all()
    assert max(picture.shape) < 2600


def test_of_many_classes_those_that_are_confused_most_are_shown():
    confusion = np.diag(np.full(200, 50))
    confusion[150, 7], confusion[3, 199] = 9, 8
    assert set(most_confused(confusion, 60)) >= {3, 7, 150, 199}
    assert list(most_confused(confusion, 60)) == sorted(most_confused(confusion, 60))
    assert list(most_confused(confusion[:5, :5], 60)) == [0, 1, 2, 3, 4]


def test_long_names_are_cut_and_captions_take_two_lines():
    assert caption("4", "9", 0.999) == "4 read as 9, 99 %"
    assert caption("T-shirt/top", "Ankle boot", 0.5) == "T-shirt/top\nas Ankle b…, 50 %"
    assert shorten("a very long name of a class") == "a very long nam…"
    assert pixels(mistake_sheet(IMAGES[:3], LABELS[:3], LABELS[:3] + 1, CONFIDENCE[:3], NAMES)).shape[0] > 0


def test_the_sample_sheet_of_a_thousand_classes_has_an_end():
    labels = np.arange(1000)
    sheet = pixels(sample_sheet(np.zeros((1000, 8, 8), np.uint8), labels, [f"class {label}" for label in labels]))
    assert sheet.shape[0] < 3000
