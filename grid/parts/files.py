"""Parts files: Python files of users, read on the driver, sent to the workers as text, and run in every process.

What they say is code; it is run because its owner names it with `--parts`, never because a store holds it.
"""

import linecache
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from grid.config import InputError
from grid.parts.registry import ORIGINS, adding_from, remove
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


_loaded: dict[str, PartsFile] = {}


def loaded() -> tuple[PartsFile, ...]:
    """Return the parts files that this process has run, in order."""
    return tuple(_loaded.values())


def load_files(paths: Iterable[Path]) -> None:
    """Read and run the parts files of a user.

    Raises:
        InputError: One can't be read, is wrong, or needs another file beside it.
    """
    for path in paths:
        file = _read(path)
        known = set(sys.modules)
        load([file])
        if beside := _modules_in({path.absolute().parent, Path.cwd()}, set(sys.modules) - known):
            unload(file.name)
            raise InputError(
                f"--parts {path} imports {beside[0]}, which no other machine has; put both in one file, "
                "or install it as a package on all machines"
            )


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
        _loaded[file.name] = file


def _read(path: Path) -> PartsFile:
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST else b""
        text = content.decode()
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


def _modules_in(folders: set[Path], names: set[str]) -> list[str]:
    """Return the files in some folders that are the sources of modules, but not those of this project."""
    ours = {"analysis", "benchmarks", "grid", "nets", "tests"}
    modules = [sys.modules[name] for name in sorted(names) if name.partition(".")[0] not in ours]
    sources = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    return [source.name for source in sources if source.is_absolute() and source.parent in folders]


def unload(name: str) -> None:
    """Remove what a parts file has added."""
    _loaded.pop(name, None)
    for part in [part for part, origin in ORIGINS.items() if origin == name]:
        remove(part)
