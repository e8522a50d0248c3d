"""Pictures of images and of what a net reads in them, as the bytes of PNG files.

What is shown is chosen by pure functions, and drawn by thin ones. Equal input, equal bytes.
"""

import io
import textwrap
from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

DPI = 150
INK, MUTED, LINES, ACCENT = "#222222", "#777777", "#eeeeee", "#08519c"
CHARACTERS = "DejaVu Sans Mono"
"""Ships with matplotlib; distinguishes 0 from O, and 1 from I and l."""

CELL_INCHES = 0.21
NAME_INCHES, TITLE_INCHES = 0.075, 0.085
"""Width of a character of a class name, beyond the first, and of a title."""
WRITTEN_SHARE = 0.05
"""Confusions of at least this share of a class are written out."""
LARGEST_ERROR = 0.5
"""Share of a class where the colour of confusions ends; fixed, so that the pictures of two nets can be compared."""

CAPTION_INCHES, GAP_INCHES = 0.24, 0.16
"""Above an image, and between two."""
EXAMPLES = 5
"""Images per class on the sample sheet."""
MOST_CLASSES = 60
"""Drawn in a confusion matrix; of more, those that are confused most."""
MOST_SAMPLES = 120
"""Classes on the sample sheet."""
LONGEST_NAME = 16
"""Characters of a class name that are shown."""
LONGEST_CAPTION = 18
"""Characters in a line above a mistake."""
SAMPLE_COLUMNS = 6
SAMPLE_INCHES = 0.34
MISTAKES = 24
"""Images that belong on the sheet of mistakes, the most confident ones: three rows."""
MISTAKE_COLUMNS = 8
MISTAKE_INCHES = 1.1


def confusion_picture(confusion: NDArray[np.int64], classes: Sequence[str], title: str) -> bytes:
    """Draw a confusion matrix, each row as shares of the images of its class: right ones blue, errors orange.

    Args:
        confusion: `[true, predicted]`.
        classes: Names, by label.
        title: Stands above.

    Returns:
        A PNG file.
    """
    shown = most_confused(confusion, MOST_CLASSES)
    shares, count = row_shares(confusion)[np.ix_(shown, shown)], len(shown)
    names = [shorten(classes[label]) for label in shown]
    if count < len(classes):
        title = f"{title}\nthe {count} of {len(classes):,} classes that are confused most"
    size, beside = CELL_INCHES * max(count, 10), NAME_INCHES * (max(map(len, names)) - 1)
    figure = Figure(
        figsize=(size + beside + 1.9, size + beside + 1.1),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    axes = figure.add_subplot()
    right = np.eye(count, dtype=bool)
    norm = PowerNorm(0.5, 0, LARGEST_ERROR, clip=True)  # the root shows rare errors, too
    errors = axes.imshow(np.ma.masked_array(shares, right | (shares == 0)), cmap="Oranges", norm=norm)
    axes.imshow(np.ma.masked_array(shares, ~right), cmap="Blues", vmin=0, vmax=1)
    _write_shares(axes, shares)
    axes.set_xticks(range(count), names, rotation=upright(names), family=CHARACTERS, fontsize=9, color=INK)
    axes.set_yticks(range(count), names, family=CHARACTERS, fontsize=9, color=INK)
    axes.set_xticks(np.arange(-0.5, count), minor=True)
    axes.set_yticks(np.arange(-0.5, count), minor=True)
    axes.grid(which="minor", color=LINES, linewidth=0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("read as", color=INK)
    axes.set_ylabel("true class", color=INK)
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, int(size / TITLE_INCHES))]
    axes.set_title("\n".join(lines), color=INK, loc="left", pad=10)
    bar = figure.colorbar(errors, shrink=0.5, aspect=25, pad=0.02, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=MUTED)
    bar.set_label("misread, share of the row", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    return _png(figure)


def sample_sheet(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw the first few images of every class, or of the first `MOST_SAMPLES`, below its name.

    Args:
        images: White on black, `[image, row, column]`.
        labels: Their classes, `[image]`, from 0.
        classes: Their names, by label.

    Returns:
        A PNG file.
    """
    count = min(len(classes), MOST_SAMPLES)
    figure, tiles = _tiles(count, SAMPLE_COLUMNS, width=EXAMPLES * SAMPLE_INCHES, height=SAMPLE_INCHES)
    for label, axes in enumerate(tiles):
        _show(axes, strip(images[labels == label]))
        name = shorten(classes[label])
        axes.set_title(name, loc="left", family=CHARACTERS, fontsize=9, color=ACCENT, weight="bold", pad=2)
    return _png(figure)


def mistake_sheet(
    images: NDArray[np.uint8],
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float64],
    classes: Sequence[str],
) -> bytes:
    """Draw mistakes, in the order in which they are given.

    Args:
        images: That were classified wrongly, white on black, `[image, row, column]`.
        true: Their classes, `[image]`, from 0.
        predicted: Classes that the net saw in them, `[image]`.
        confidence: Probabilities that the net gave to these, `[image]`, in [0, 1].
        classes: Their names, by label.

    Returns:
        A PNG file.
    """
    texts = [
        caption(classes[right], classes[wrong], float(sure))
        for right, wrong, sure in zip(true, predicted, confidence, strict=True)
    ]
    lines = max((text.count("\n") + 1 for text in texts), default=1)
    figure, tiles = _tiles(
        len(texts), MISTAKE_COLUMNS, width=MISTAKE_INCHES, height=MISTAKE_INCHES, caption_inches=lines * CAPTION_INCHES
    )
    for image, text, axes in zip(images, texts, tiles, strict=True):
        _show(axes, image)
        axes.set_title(text, family=CHARACTERS, fontsize=7.5, color=INK, pad=3)
    if not texts:
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center", color=MUTED)
    return _png(figure)


def row_shares(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each row as shares of its sum, `[true, predicted]`; zeros for a class without images."""
    sizes = confusion.sum(axis=1, keepdims=True)
    return np.asarray(confusion / np.maximum(sizes, 1), dtype=np.float64)


def strip(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the first `EXAMPLES` images side by side, with paper for those that are missing.

    Args:
        images: `[image, row, column]` or `[image, channel, row, column]`.

    Returns:
        `[row, column]` or `[channel, row, column]`.
    """
    *_, height, width = images.shape
    line = np.zeros((EXAMPLES, *images.shape[1:]), np.uint8)
    line[: len(images)] = images[:EXAMPLES]
    return np.moveaxis(line, 0, -2).reshape(*images.shape[1:-2], height, EXAMPLES * width)


def caption(true: str, predicted: str, confidence: float) -> str:
    """Return a caption such as `4 read as 9, 99 %`, the confidence rounded down; on two lines if the names are long."""
    share = f"{int(100 * confidence)} %"
    text = f"{true} read as {predicted}, {share}"
    return text if len(text) <= LONGEST_CAPTION else f"{shorten(true)}\nas {shorten(predicted, 8)}, {share}"


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a class name, cut if it is too long to be drawn."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def upright(names: Sequence[str]) -> int:
    """Return by how many degrees names below a picture are turned, so that they do not overlap."""
    return 90 if max(map(len, names)) > 2 else 0


def most_confused(confusion: NDArray[np.int64], most: int) -> NDArray[np.intp]:
    """Return the labels of the classes with most errors, as true or as predicted class, in order; all if few enough.

    Args:
        confusion: `[true, predicted]`.
        most: Number of classes.
    """
    errors = confusion - np.diag(confusion.diagonal())
    return np.sort(np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")[:most])


def _write_shares(axes: Axes, shares: NDArray[np.float64]) -> None:
    """Write the diagonal and the large errors into their cells, in whole per cent."""
    written = (shares >= WRITTEN_SHARE) | np.eye(len(shares), dtype=bool)
    for true, predicted in np.argwhere(written):
        share = shares[true, predicted]
        dark = share > (0.5 if true == predicted else 0.2)
        colour = "white" if dark else INK
        axes.text(predicted, true, f"{100 * share:.0f}", ha="center", va="center_baseline", fontsize=6, color=colour)


def _tiles(
    count: int, columns: int, *, width: float, height: float, caption_inches: float = CAPTION_INCHES
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its tiles, row by row from the top, each with room for a caption; sizes in inches."""
    rows = max(1, ceil(count / columns))
    total_width = GAP_INCHES + columns * (width + GAP_INCHES)
    total_height = GAP_INCHES + rows * (caption_inches + height + GAP_INCHES / 2)
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)
    tiles = []
    for row, column in (divmod(index, columns) for index in range(count)):
        left = GAP_INCHES + column * (width + GAP_INCHES)
        bottom = total_height - (row + 1) * (caption_inches + height + GAP_INCHES / 2)
        tiles.append(
            figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
        )
        tiles[-1].set_axis_off()
    return figure, tiles


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    """Draw an image of three channels in colour, and the first channel of any other as ink on paper."""
    if image.ndim == 3 and len(image) == 3:
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        return
    grey = image[0] if image.ndim == 3 else image
    axes.imshow(grey, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # bytes that depend on the picture alone
    return file.getvalue()
