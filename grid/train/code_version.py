"""Which code trains: hashes of the sources, and the versions of the packages that matter. Imports nothing heavy."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grid
import nets
from grid.parts.files import loaded
from grid.parts.registry import ORIGINS

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")
"""Those whose versions are recorded with each command and must be the same on all nodes."""
NUMERIC_CODE = (
    *("nets", "grid/data", "grid/parts", "grid/train", "grid/config.py", "grid/metrics.py"),
    *("grid/plan/asha.py", "grid/plan/controls.py"),
)
"""Folders and files that decide what a trial yields, which trials are stopped, and which are controls; not this file.

The rest decides when and where a trial runs, how it is recorded, or what it is asked for; that is among its parameters.
"""


@dataclass(frozen=True)
class NumericCode:
    """The code and the version of torch on which the numbers of a trial depend."""

    files: Mapping[str, str]
    """Path, such as `nets/mlp.py` -> hash of what it does; comments, docstrings and layout do not count."""
    torch: str
    """Version of torch; its minor version counts."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Part of a parts file, such as `activation squared_relu` -> hash of what that file does."""

    @classmethod
    def here(cls) -> "NumericCode":
        """Return the code of this process."""
        meanings = {file.name: _hash_meaning(file.text) for file in loaded()}
        parts = {part: meanings[origin] for part, origin in ORIGINS.items() if origin in meanings}
        return replace(cls.of(_root(), version("torch")), parts=parts)

    @classmethod
    def of(cls, root: Path, torch: str) -> "NumericCode":
        """Return the code below a folder that holds `grid` and `nets`."""
        found = [file for part in NUMERIC_CODE for file in sorted([root / part, *(root / part).rglob("*.py")])]
        sources = [file for file in found if file.suffix == ".py" and file.name != Path(__file__).name]
        return cls({str(file.relative_to(root)): _hash_meaning(file.read_bytes()) for file in sources}, torch)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that change with any of the files."""
        return _hash(repr(sorted(self.files.items())).encode())

    @property
    def torch_minor(self) -> str:
        """Such as `2.11`."""
        return ".".join(self.torch.split(".")[:2])

    def differing_files(self, other: "NumericCode") -> list[str]:
        """Return the files that differ, or that one of both lacks."""
        return sorted(file for file in {*self.files, *other.files} if self.files.get(file) != other.files.get(file))

    def matches(self, other: "NumericCode") -> bool:
        """Return whether both yield the same numbers, as far as can be said without running them; but for parts."""
        return not self.differing_files(other) and self.torch_minor == other.torch_minor

    def changed_parts(self, others: Iterable["NumericCode"]) -> list[str]:
        """Return the parts that some of the others have, but none of them as they are here."""
        known: dict[str, set[str]] = {}
        for other in others:
            for part, digest in other.parts.items():
                known.setdefault(part, set()).add(digest)
        return sorted(part for part, digest in self.parts.items() if digest not in known.get(part, {digest}))


def digest_of(folders: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits that change with any Python file in or below any of the folders."""
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    return _hash(b"".join(f"{file.relative_to(folder.parent)}".encode() + file.read_bytes() for folder, file in files))


def digest_here() -> str:
    """Return the digest of all sources of `grid` and `nets`."""
    return digest_of(_root() / package.__name__ for package in (grid, nets))


def package_versions() -> dict[str, str]:
    """Return the versions of `PACKAGES`, by name."""
    return {name: version(name) for name in PACKAGES}


def _root() -> Path:
    return Path(str(grid.__file__)).parents[1]


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]


@cache
def _hash_meaning(source: str | bytes) -> str:
    """Return the hash of what a source does."""
    return _hash(repr(_plain(ast.parse(source))).encode())  # `ast.dump` depends on the version of Python


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(each) for each in node if not _is_docstring(each)]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return type(node).__name__, fields


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
