"""Pictures of images and of what a net reads in them, as the bytes of PNG files.

What is shown is chosen by pure functions, and drawn by thin ones. Equal input, equal bytes.
"""

import io
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
WRITTEN_SHARE = 0.05
"""Confusions of at least this share of a class are written out."""
LARGEST_ERROR = 0.5
"""Share of a class where the colour of confusions ends; fixed, so that the pictures of two nets can be compared."""

CAPTION_INCHES, GAP_INCHES = 0.24, 0.16
"""Above an image, and between two."""
EXAMPLES = 5
"""Images per class on the sample sheet."""
SAMPLE_COLUMNS = 6
SAMPLE_INCHES = 0.34
MISTAKES = 40
"""Images on the sheet of mistakes."""
MISTAKE_COLUMNS = 8
MISTAKE_INCHES = 1.1


def confusion_picture(confusion: NDArray[np.int64], classes: Sequence[str], title: str) -> bytes:
    """Draw a confusion matrix, each row as shares of the images of its class: right ones blue, errors orange.

    Args:
        confusion: `[true, predicted]`.
        classes: Characters, by label.
        title: Stands above.

    Returns:
        A PNG file.
    """
    shares, count = row_shares(confusion), len(classes)
    size = CELL_INCHES * max(count, 10)
    figure = Figure(figsize=(size + 1.9, size + 1.1), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.add_subplot()
    right = np.eye(count, dtype=bool)
    norm = PowerNorm(0.5, 0, LARGEST_ERROR, clip=True)  # the root shows rare errors, too
    errors = axes.imshow(np.ma.masked_array(shares, right | (shares == 0)), cmap="Oranges", norm=norm)
    axes.imshow(np.ma.masked_array(shares, ~right), cmap="Blues", vmin=0, vmax=1)
    _write_shares(axes, shares)
    axes.set_xticks(range(count), classes, family=CHARACTERS, fontsize=9, color=INK)
    axes.set_yticks(range(count), classes, family=CHARACTERS, fontsize=9, color=INK)
    axes.set_xticks(np.arange(-0.5, count), minor=True)
    axes.set_yticks(np.arange(-0.5, count), minor=True)
    axes.grid(which="minor", color=LINES, linewidth=0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("read as", color=INK)
    axes.set_ylabel("true character", color=INK)
    axes.set_title(title, color=INK, loc="left", pad=10)
    bar = figure.colorbar(errors, shrink=0.5, aspect=25, pad=0.02, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=MUTED)
    bar.set_label("misread, share of the row", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    return _png(figure)


def sample_sheet(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw the first few images of every class, below its character.

    Args:
        images: White on black, `[image, row, column]`.
        labels: Their classes, `[image]`, from 0.
        classes: Characters, by label.

    Returns:
        A PNG file.
    """
    figure, tiles = _tiles(len(classes), SAMPLE_COLUMNS, width=EXAMPLES * SAMPLE_INCHES, height=SAMPLE_INCHES)
    for label, axes in enumerate(tiles):
        _show(axes, strip(images[labels == label]))
        axes.set_title(classes[label], loc="left", family=CHARACTERS, fontsize=9, color=ACCENT, weight="bold", pad=2)
    return _png(figure)


def mistake_sheet(
    images: NDArray[np.uint8],
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    confidence: NDArray[np.float64],
    classes: Sequence[str],
) -> bytes:
    """Draw the most confident mistakes, the most confident first.

    Args:
        images: That were read wrongly, white on black, `[image, row, column]`.
        true: Their classes, `[image]`, from 0.
        predicted: Classes that the net saw in them, `[image]`.
        confidence: Probabilities that the net gave to these, `[image]`, in [0, 1].
        classes: Characters, by label.

    Returns:
        A PNG file.
    """
    shown = np.argsort(-confidence, kind="stable")[:MISTAKES]
    figure, tiles = _tiles(len(shown), MISTAKE_COLUMNS, width=MISTAKE_INCHES, height=MISTAKE_INCHES)
    for position, axes in zip(shown, tiles, strict=True):
        _show(axes, images[position])
        text = caption(classes[true[position]], classes[predicted[position]], float(confidence[position]))
        axes.set_title(text, family=CHARACTERS, fontsize=7.5, color=INK, pad=3)
    if not len(shown):
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
    """Return a caption such as `4 read as 9, 99 %`, the confidence rounded down."""
    return f"{true} read as {predicted}, {int(100 * confidence)} %"


def _write_shares(axes: Axes, shares: NDArray[np.float64]) -> None:
    """Write the diagonal and the large errors into their cells, in whole per cent."""
    written = (shares >= WRITTEN_SHARE) | np.eye(len(shares), dtype=bool)
    for true, predicted in np.argwhere(written):
        share = shares[true, predicted]
        dark = share > (0.5 if true == predicted else 0.2)
        colour = "white" if dark else INK
        axes.text(predicted, true, f"{100 * share:.0f}", ha="center", va="center_baseline", fontsize=6, color=colour)


def _tiles(count: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its tiles, row by row from the top, each with room for a caption; sizes in inches."""
    rows = max(1, ceil(count / columns))
    total_width = GAP_INCHES + columns * (width + GAP_INCHES)
    total_height = GAP_INCHES + rows * (CAPTION_INCHES + height + GAP_INCHES / 2)
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)
    tiles = []
    for row, column in (divmod(index, columns) for index in range(count)):
        left = GAP_INCHES + column * (width + GAP_INCHES)
        bottom = total_height - (row + 1) * (CAPTION_INCHES + height + GAP_INCHES / 2)
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
