"""Glyphs, the offline stand-in for EMNIST: its 47 balanced classes, rendered from the fonts that matplotlib ships.

Rendering is a pure function of a size and a seed; only `render_if_missing` touches the disk. The files have EMNIST's
format, transposed images included, so that the same code reads both.
"""

import math
import struct
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from grid.config import InputError
from grid.files import write_durably

CLASSES: tuple[str, ...] = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
"""Class names in the order of EMNIST's official mapping. The other letters have one class
for both cases, which glyphs draw in upper case."""

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
"""The shipped fonts that have all 47 classes, except cmmi10, whose digits are old style (its 0 is an o)."""

TRAIN_PER_CLASS, TRAIN_SEED = 300, 47_001
TEST_PER_CLASS, TEST_SEED = 60, 47_002

IMAGE_SIZE = 28
GLYPH_SIZE = 18
"""Longer side in pixels of an undistorted glyph before its strokes are blurred."""
MASTER_SCALE = 3
"""Master pixels per image pixel."""
SAMPLES_PER_PIXEL = 2
"""Samples per image pixel and axis, averaged: strokes get soft edges."""
BATCH_SIZE = 20 * len(CLASSES)
"""Images distorted at once; bounds the memory."""

ROTATION = math.radians(8)
"""Standard deviation of the angle in radians."""
SHEAR = 0.18
STRETCH = 0.11
"""Standard deviation of the logarithm of the scale, per axis."""
SHIFT = 0.8
"""Standard deviation of the translation in image pixels, per axis."""
ELASTIC = 0.5
"""Standard deviation in image pixels of the displacement of each knot."""
ELASTIC_KNOTS = 5
"""Knots per axis between which the displacement is smooth."""
STROKE_LEVELS = (0.04, 0.2)
"""Range of the value of the blurred master at which ink begins; a low value makes a thick stroke."""
SOFTNESS = (0.08, 0.2)
"""Range of the further rise to full ink."""
CONTRAST = (0.75, 1.0)
NOISE = 0.03
"""Standard deviation of the noise of a pixel, as a fraction of full white; halved on the black background."""


def render_if_missing(root: Path) -> Path:
    """Write the four files of the data set unless they are complete.

    Each file is written completely or not at all, and always with the same bytes, so that processes may race.

    Args:
        root: Folder for `Glyphs/raw`; made if it is missing.

    Returns:
        The folder `<root>/Glyphs/raw`.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = root / "Glyphs" / "raw"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _render_split_if_incomplete(folder, "train", TRAIN_PER_CLASS, TRAIN_SEED)
        _render_split_if_incomplete(folder, "test", TEST_PER_CLASS, TEST_SEED)
    except OSError as error:
        raise InputError(
            f"cannot write glyphs to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    return folder


def render(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render a balanced set of distorted glyphs, upright, cycling through the classes.

    Args:
        per_class: Images per class, at least 1.
        seed: Seed of all randomness; the same seed gives the same bytes.

    Returns:
        White on black images, uint8 `[47 * per_class, 28, 28]`, and their classes, int64 `[47 * per_class]`.

    Raises:
        InputError: `per_class` is below 1.
    """
    if per_class < 1:
        raise InputError(f"glyphs per class must be at least 1, not {per_class}")
    rng = np.random.default_rng(seed)
    masters = _masters()
    labels = torch.arange(len(CLASSES)).repeat(per_class)
    batches = torch.split(labels, BATCH_SIZE)
    return torch.cat([_distort(_pick_fonts(masters, batch, rng), rng) for batch in batches]), labels


def _masters() -> Tensor:
    """Draw every class in every font once, large and blurred: `[class, font, side, side]` in 0..1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 96) for name in FONTS]
    drawn = np.stack([np.stack([_draw(name, font) for font in fonts]) for name in CLASSES])
    return torch.from_numpy(drawn).float() / 255


def _draw(character: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """Draw one character, scaled so that its ink fills `GLYPH_SIZE`, centred, then blurred by half a stroke."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), character, font=font, fill=255)
    scale = MASTER_SCALE * GLYPH_SIZE / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BICUBIC)
    side = MASTER_SCALE * IMAGE_SIZE
    master = Image.new("L", (side, side))
    master.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(master.filter(ImageFilter.GaussianBlur(MASTER_SCALE)))


def _pick_fonts(masters: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Return for each label its master in a random font: `[image, 1, side, side]`."""
    return masters[labels, torch.from_numpy(rng.integers(len(FONTS), size=len(labels)))].unsqueeze(1)


def _distort(masters: Tensor, rng: np.random.Generator) -> Tensor:
    """Warp each master, apply ink and add the noise of a scan: uint8 `[image, 28, 28]`."""
    count = len(masters)
    smooth = F.grid_sample(masters, _affine(count, rng) + _elastic(count, rng), align_corners=False)
    level = _uniform(STROKE_LEVELS, count, rng)
    softness = _uniform(SOFTNESS, count, rng)
    ink = F.avg_pool2d(((smooth - level) / softness).clamp(0, 1), SAMPLES_PER_PIXEL)
    noise = _normal(NOISE, ink.shape, rng) * (0.5 + 0.5 * ink)
    scanned = ink * _uniform(CONTRAST, count, rng) + noise
    return (scanned.clamp(0, 1) * 255).round().to(torch.uint8).squeeze(1)


def _affine(count: int, rng: np.random.Generator) -> Tensor:
    """Return sampling positions of random rotations, shears, scales and shifts: `[image, row, column, 2]`."""
    angle, shear = _normal(ROTATION, (count,), rng), _normal(SHEAR, (count,), rng)
    width, height = _normal(STRETCH, (2, count), rng).exp()
    x_shift, y_shift = _normal(2 * SHIFT / IMAGE_SIZE, (2, count), rng)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos / width, (shear * cos - sin) / height, x_shift], dim=-1)
    second = torch.stack([sin / width, (shear * sin + cos) / height, y_shift], dim=-1)
    side = IMAGE_SIZE * SAMPLES_PER_PIXEL
    return F.affine_grid(torch.stack([first, second], dim=1), [count, 1, side, side], align_corners=False)


def _elastic(count: int, rng: np.random.Generator) -> Tensor:
    """Return smooth random displacements of the sampling positions: `[image, row, column, 2]`."""
    knots = _normal(2 * ELASTIC / IMAGE_SIZE, (count, 2, ELASTIC_KNOTS, ELASTIC_KNOTS), rng)
    side = IMAGE_SIZE * SAMPLES_PER_PIXEL
    smooth = F.interpolate(knots, size=(side, side), mode="bicubic", align_corners=True)
    return smooth.permute(0, 2, 3, 1)


def _normal(deviation: float, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(deviation * rng.standard_normal(shape, dtype=np.float32))


def _uniform(bounds: tuple[float, float], count: int, rng: np.random.Generator) -> Tensor:
    """Return one number per image, `[image, 1, 1, 1]`."""
    return torch.from_numpy(rng.uniform(*bounds, size=(count, 1, 1, 1)).astype(np.float32))


def _render_split_if_incomplete(folder: Path, split: str, per_class: int, seed: int) -> None:
    """Render one split and write its two files unless both have their full length and begin as they should."""
    count = per_class * len(CLASSES)
    images_path = folder / f"emnist-glyphs-{split}-images-idx3-ubyte"
    labels_path = folder / f"emnist-glyphs-{split}-labels-idx1-ubyte"
    if _is_whole(images_path, count, IMAGE_SIZE, IMAGE_SIZE) and _is_whole(labels_path, count):
        return
    images, labels = render(per_class, seed)
    _write_idx(images_path, images.transpose(1, 2))  # NIST's are stored transposed
    _write_idx(labels_path, labels)


def _is_whole(path: Path, *shape: int) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begins = file.read(len(header := _header(*shape))) == header
    return begins and path.stat().st_size == len(header) + math.prod(shape)


def _write_idx(path: Path, values: Tensor) -> None:
    """Write bytes and their shape as IDX."""
    write_durably(path, _header(*values.shape) + values.to(torch.uint8).contiguous().numpy().tobytes())


def _header(*shape: int) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
