"""Parts files: Python files of users, read on the driver, sent to the workers as text, and run in every process.

They are code. The commands run what their user names with `--parts`, never what a store holds; a registered model, once
somebody loads it, runs the file that it was trained with.
"""

import ast
import linecache
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

from grid.config import InputError
from grid.parts.registry import ORIGINS, adding_from, all_restored, remove
from grid.wording import first_line

LARGEST = 1_000_000
"""Bytes of a parts file; a larger one is no source."""


@dataclass(frozen=True)
class PartsFile:
    """A Python file that adds parts."""

    name: str
    """Without its folder."""
    text: str

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of the text."""
        return sha256(self.text.encode()).hexdigest()[:12]


OURS = {"analysis", "benchmarks", "grid", "nets", "tests"}
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages."""
_loaded: dict[str, PartsFile] = {}


def loaded() -> tuple[PartsFile, ...]:
    """Return the parts files that this process has run, in order."""
    return tuple(_loaded.values())


def load_files(paths: Sequence[Path]) -> None:
    """Read and run the parts files of a user, and forget all others.

    Raises:
        InputError: One can't be read, is wrong, needs another file beside it, or has the name of another.
    """
    names = [path.name for path in paths]
    if twins := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two files of --parts are called {min(twins)}; rename one")
    for file in loaded():
        if file.name not in names:
            unload(file.name)
    for path in paths:
        file = _read(path)
        known = set(sys.modules)
        beside = _imported_beside(file, path.absolute().parent)
        if not beside:
            load([file])
        if beside := beside or _sources_in({path.absolute().parent, Path.cwd()}, set(sys.modules) - known):
            unload(file.name)
            raise InputError(
                f"--parts {path} imports {beside[0]}, which no other machine has; put both in one file, "
                "or install it as a package on all machines"
            )


@contextmanager
def using(files: Sequence[PartsFile]) -> Iterator[None]:
    """Know these parts files within the block, and no others; afterwards what was known before."""
    kept = dict(_loaded)
    try:
        with all_restored():
            for name in kept:
                unload(name)
            load(files)
            yield
    finally:
        _loaded.clear()
        _loaded.update(kept)


def load(files: Sequence[PartsFile]) -> None:
    """Run parts files, unless they are known already; one that has changed replaces what it had added.

    Raises:
        InputError: One is wrong; the text names the file and the line.
    """
    for file in files:
        if _loaded.get(file.name) == file:
            continue
        unload(file.name)
        with adding_from(file.name):
            _run(file)
            if file.name not in ORIGINS.values():
                raise InputError(f"{file.name} adds no parts; decorate them, such as @parts.net(NAME)")
        _loaded[file.name] = file


def imported_packages(files: Iterable[PartsFile]) -> set[str]:
    """Return the installed distributions whose modules parts files import, such as `torchvision`."""
    known = packages_distributions()
    return {known[name][0] for file in files for name in _imports(file) if name in known and name not in OURS}


def _imports(file: PartsFile) -> set[str]:
    """Return the names of the packages and modules that a file imports; none if it can't be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(file.text)))
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _imported_beside(file: PartsFile, folder: Path) -> list[str]:
    """Return the modules that a file imports and that lie beside it, found or not from where Python runs."""
    names = sorted(_imports(file) - OURS - sys.stdlib_module_names)
    return [f"{name}.py" for name in names if (folder / f"{name}.py").is_file()]


def _read(path: Path) -> PartsFile:
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST else b""
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise InputError(f"can't read --parts {path}: {reason or first_line(error)}; pass a Python file") from error
    if not content:
        raise InputError(f"--parts {path} is empty or larger than {LARGEST:,} bytes; pass a Python file")
    return PartsFile(path.name, text)


def _run(file: PartsFile) -> None:
    module = ModuleType(f"grid_parts_{file.digest}")
    module.__file__ = file.name
    linecache.cache[file.name] = (len(file.text), None, file.text.splitlines(keepends=True), file.name)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(file.text, file.name, "exec"), vars(module))  # noqa: S102  (the user's own code)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise InputError(f"{_place(file, error)}: {_describe(error)}") from error


def _place(file: PartsFile, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{file.name} line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file.name]
    return f"{file.name} line {lines[-1]}" if lines else file.name


def _describe(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{error.msg}; a parts file is Python"
    return f"{type(error).__name__}: {first_line(error)}"


def _sources_in(folders: set[Path], names: set[str]) -> list[str]:
    """Return the sources of modules that lie below some folders, without installed ones and those of this project."""
    project = Path(__file__).parents[2]
    skipped = (*(project / name for name in OURS), *map(Path, {sys.prefix, sys.base_prefix}))
    sources = [Path(file) for name in sorted(names) if (file := getattr(sys.modules[name], "__file__", None))]
    return [
        source.name
        for source in sources
        if any(source.is_relative_to(folder) for folder in folders)
        and not INSTALLED & set(source.parts)
        and not any(source.is_relative_to(folder) for folder in skipped)
    ]


def unload(name: str) -> None:
    """Remove what a parts file has added."""
    _loaded.pop(name, None)
    for part in [part for part, origin in ORIGINS.items() if origin == name]:
        remove(part)
