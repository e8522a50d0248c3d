"""Draw docs/architecture.svg from the layers in pyproject.toml and the imports that are really in the code.

python docs/draw_architecture.py

A box is a folder or a file of `grid`; its place is its layer, its text the first sentence of its docstring. An arrow is
an import; an import that follows from others (a -> b -> c makes a -> c) is left out.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SYSTEMS = {"ray": "Ray", "mlflow": "MLflow", "torch": "torch"}
"""Package -> how a box names it."""
COLOURS = {"Ray": "#d7ebff", "MLflow": "#ddf3e0", "torch": "#fdebd3"}
"""Of a box, by the first of its systems."""
WIDTH, MARGIN, GAP, ARROW = 420, 8, 8, 24
"""In pixels: of the picture, around it, between boxes side by side, between layers."""
SIDE = 112
"""Width of `analysis`, which stands beside the layers above those that it imports."""
LINE, PIXELS_PER_LETTER = 15, 6.1
"""Of the small text."""
Imports = dict[str, set[str]]
"""Box -> boxes that it imports."""


@dataclass(frozen=True)
class Box:
    """A rectangle with a name, the systems that it knows, and a text."""

    name: str
    left: float
    top: float
    width: float
    height: float
    text: tuple[str, ...]
    systems: tuple[str, ...]

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width


def read_layers() -> list[list[str]]:
    """Return the layers of `grid`, highest first, each with its boxes."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["grid"]]
    return [[f"grid.{name.strip()}" for name in layer.split("|")] for layer in layers]


def read_imports(boxes: Iterable[str]) -> tuple[Imports, Mapping[str, tuple[str, ...]]]:
    """Return which boxes import which, those by `import_module` included, and which systems each box imports."""
    graph = grimp.build_graph("analysis", "grid", "nets", include_external_packages=True, cache_dir=None)
    imports: Imports = {box: set() for box in boxes}
    for module in graph.modules:
        if (box := _box_of(module)) in imports:
            found = graph.find_modules_directly_imported_by(module) | _imported_by_name(module)
            imports[box] |= {_box_of(other) for other in found} - {box}
    systems = {box: tuple(name for package, name in SYSTEMS.items() if package in imports[box]) for box in imports}
    return {box: others & imports.keys() for box, others in imports.items()}, systems


def without_implied(imports: Imports) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others."""
    return [
        (box, other)
        for box, others in imports.items()
        for other in sorted(others)
        if not any(other in _reachable(imports, between) for between in others - {other})
    ]


def draw() -> str:
    """Return the picture as SVG."""
    layers = read_layers()
    imports, systems = read_imports(["analysis", *chain.from_iterable(layers), "nets"])
    boxes = _place(layers, imports, systems)
    lanes: list[tuple[float, float, float]] = []
    arrows = [_arrow(boxes[source], boxes[target], lanes) for source, target in without_implied(imports)]
    height = max(box.bottom for box in boxes.values()) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" font-family="system-ui, sans-serif" font-size="12">',
            "<title>The layers of the code: every import goes down</title>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *arrows,
            *[_rectangle(box) for box in boxes.values()],
            "</svg>\n",
        ]
    )


def _place(layers: list[list[str]], imports: Imports, systems: Mapping[str, tuple[str, ...]]) -> dict[str, Box]:
    """Return all boxes: the layers from top to bottom, `analysis` beside the highest, `nets` below them all."""
    first_shared = next(row for row, layer in enumerate(layers) if imports["analysis"] & set(layer))
    boxes: dict[str, Box] = {}
    top: float = MARGIN
    for row, layer in enumerate([*layers, ["nets"]]):
        left = MARGIN + (SIDE + GAP if row < first_shared else 0)
        width = (WIDTH - MARGIN - left - GAP * (len(layer) - 1)) / len(layer)
        texts = [_wrap(name, width) for name in layer]
        height = 26 + LINE * max(len(text) + bool(systems[name]) for name, text in zip(layer, texts, strict=True))
        for column, (name, text) in enumerate(zip(layer, texts, strict=True)):
            boxes[name] = Box(name, left + column * (width + GAP), top, width, height, text, systems[name])
        top += height + ARROW
    bottom = boxes[layers[first_shared - 1][0]].bottom
    text = _wrap("analysis", SIDE)
    boxes["analysis"] = Box("analysis", MARGIN, MARGIN, SIDE, bottom - MARGIN, text, systems["analysis"])
    return boxes


def _wrap(name: str, width: float) -> tuple[str, ...]:
    """Return the first sentence of the docstring of a folder, in lines that fit; nothing for a file."""
    path = ROOT.joinpath(*name.split("."), "__init__.py")
    if not path.exists():
        return ()
    first_line = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
    return tuple(textwrap.wrap(first_line.replace("`", ""), int((width - 16) / PIXELS_PER_LETTER)))


def _rectangle(box: Box) -> str:
    colour = next((COLOURS[system] for system in box.systems), "#f1f1f1")
    knows = [f'<tspan fill="#777">{", ".join(box.systems)}</tspan>'] if box.systems else []
    lines = [
        f'<text x="{box.left + 8:g}" y="{box.top + 35 + LINE * row:g}">{line}</text>'
        for row, line in enumerate([*knows, *map(escape, box.text)])
    ]
    title = box.name.removeprefix("grid.")
    return "\n".join(
        [
            f'<rect x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" rx="4" '
            f'fill="{colour}" stroke="#888"/>',
            f'<text x="{box.left + 8:g}" y="{box.top + 18:g}" font-size="14" font-weight="bold">{title}</text>',
            *lines,
        ]
    )


def _arrow(source: Box, target: Box, lanes: list[tuple[float, float, float]]) -> str:
    """Return an arrow from the lower edge of a box to the upper edge of another, straight down where it can be.

    Args:
        source: The box that imports.
        target: The box that is imported.
        lanes: x, upper and lower end of the arrows so far, to keep clear of; this one is added.
    """
    start = _lane(source, target, source, lanes)
    end = start if target.left < start < target.right else _lane(target, source, target, lanes)
    lanes.append((end, source.bottom, target.top))
    head = f"{end - 4:g},{target.top - 8:g} {end + 4:g},{target.top - 8:g} {end:g},{target.top:g}"
    return (
        f'<path d="M{start:g} {source.bottom:g} L{end:g} {target.top - 8:g}" stroke="#444" fill="none"/>'
        f'<polygon points="{head}" fill="#444"/>'
    )


def _lane(box: Box, other: Box, inside: Box, lanes: list[tuple[float, float, float]]) -> float:
    """Return an x within a box, and within the other one too if they overlap, as far as possible from other arrows."""
    left, right = max(box.left, other.left), min(box.right, other.right)
    if left >= right:
        left, right = inside.left, inside.right
    upper, lower = min(box.bottom, other.bottom), max(box.top, other.top)
    crowding = [x for x, begin, end in lanes if begin < lower and upper < end]
    edges = [left, *sorted(x for x in crowding if left < x < right), right]
    begin, end = max(pairwise(edges), key=lambda pair: pair[1] - pair[0])
    return round((begin + end) / 2)


def _box_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "grid" else parts[0]


def _imported_by_name(module: str) -> set[str]:
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if module.split(".")[0] not in ("analysis", "grid", "nets"):
        return set()
    return set(re.findall(r'import_module\(f?"(grid\.\w+)', file.read_text()))


def _reachable(imports: Imports, box: str) -> set[str]:
    found: set[str] = set()
    waiting = [box]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw())
