"""What all commands share: the parser, the options that several commands take, and how errors reach the user.

Standard library only, so that `--help` and a wrong argument are answered at once.
"""

import _thread
import argparse
import io
import json
import math
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, TextIO

from grid.config import InputError
from grid.files import write_durably
from grid.masking import mask_message
from grid.store_uri import DEFAULT_STORE, STORE_VARIABLE
from grid.wording import first_line

DEBUG = "GRID_DEBUG"
UNEXPECTED = 70
"""Exit code of an error that no one has foreseen (EX_SOFTWARE)."""
LONGEST_ERROR = 300
INSIST_SECONDS = 5.0
"""After Ctrl-C, before it is sent once more to a command that has not ended."""


class Options(Protocol):
    """A parser, or a group of options in it."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an option."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"{self.name}: {mask_message(message)}; see --help\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help, if it can be printed."""
        with _surviving_output():
            super().print_help(file)

    @property
    def name(self) -> str:
        """The command without `python -m`, such as `grid.run`."""
        return self.prog.removeprefix("python -m ")


def positive(text: str) -> int:
    """Return a number of things, the type of an option.

    Raises:
        argparse.ArgumentTypeError: Not a whole number, or less than 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def add_experiment(options: Options) -> None:
    """Add `--experiment`, for a command that reads one."""
    options.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment that holds the grid")


def add_store(options: Options) -> None:
    """Add `--store`; None stands for `grid.store_uri.default_store_uri`."""
    options.add_argument("--store", metavar="URI", help=f"MLflow tracking URI (${STORE_VARIABLE}, or {DEFAULT_STORE})")


TEXT = "text"
"""What `--format` is by default."""


def add_output(options: Options) -> None:
    """Add `--json` and `--format`, for a command that prints a table."""
    add_json_instead(options)
    options.add_argument(
        "--format", default=TEXT, choices=(TEXT, "markdown", "latex"), help="print only the table, for a page or paper"
    )


def add_json_instead(options: Options) -> None:
    """Add `--json`, for a command that prints nothing else then."""
    options.add_argument("--json", action="store_true", help="print JSON instead of text, see docs/json.md")


def print_json(described: Mapping[str, Any], file: Any = None) -> None:
    """Print an object as JSON, which knows no NaN and no infinity: they are null."""
    print(json.dumps(_without_nan(described), indent=1, allow_nan=False), file=file, flush=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_json(options: Options) -> None:
    """Add `--json`, for a command that prints its progress as well."""
    options.add_argument("--json", action="store_true", help="print one JSON object, see docs/json.md; text to stderr")


@contextmanager
def for_programs(wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within the block, if `--json` is given, print to stderr what is for people.

    Yields:
        What prints the answer; nothing without `--json`.
    """
    out = sys.stdout

    def answer(described: Mapping[str, Any]) -> None:
        if wanted:
            print_json(described, file=out)

    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield answer


def add_parts(options: Options) -> None:
    """Add `--parts`."""
    options.add_argument(
        "--parts",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="add nets, techniques, settings and factors of your own; may be repeated",
    )


def add_data_dir(options: Options) -> None:
    """Add `--data-dir`."""
    options.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="files of data sets (data)")


def add_storage(options: Options) -> None:
    """Add `--storage`."""
    options.add_argument(
        "--storage", default="storage", metavar="DIR", help="checkpoints; must be reachable from all nodes (storage)"
    )


def add_workers(options: Options) -> None:
    """Add `--storage`, `--address`, `--concurrency` and `--device`: where trials run."""
    add_storage(options)
    options.add_argument(
        "--address",
        metavar="ADDR",
        help="HOST:PORT of a Ray cluster, auto (require this machine's cluster), or local (ignore it); "
        "default: this machine's cluster if there is one, else a private Ray",
    )
    options.add_argument("--concurrency", type=int, metavar="N", help="trials at once (as many as the machine holds)")
    options.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="what trains: GPUs if there are any (auto)"
    )


def add_accept_code(options: Options) -> None:
    """Add `--accept-code`."""
    options.add_argument(
        "--accept-code",
        action="store_true",
        help="go on although the experiment was trained with other code or another torch; pass it only if you know "
        "that both yield the same numbers",
    )


def add_debug(options: Options) -> None:
    """Add `--debug`."""
    options.add_argument("--debug", action="store_true", help="show tracebacks")


def write_output(path: Path, text: str) -> None:
    """Write a file whose name the user has given.

    Raises:
        InputError: It can't be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def replace_output(path: Path, text: str) -> None:
    """Write a file whose name the user has given so that who reads it meanwhile finds the old or the new text.

    Raises:
        InputError: It can't be written.
    """
    try:
        write_durably(path.resolve(), text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"can't write {path}: {error.strerror}; pass another file, or make room")


def run_command(
    name: str,
    body: Callable[[], int],
    *,
    interrupted: str = "interrupted",
    debug: bool = False,
) -> int:
    """Run the body of a command and return its exit code.

    What can't be printed, to a reader that has gone or a disk that is full, is dropped: no reason to stop a training.

    Args:
        name: Of the command, such as `grid.run`; starts every message.
        body: Does the work and returns an exit code.
        interrupted: What to say after Ctrl-C, exit code 130.
        debug: Raise errors, for their tracebacks; so does the environment variable GRID_DEBUG=1. Otherwise an
            `InputError` is reported on stderr as one line, exit code 2; any other as one line that names a file with
            its traceback, exit code 70.
    """
    sys.excepthook = sys.__excepthook__  # from here on, nothing is raised but for developers
    debug = debug or os.environ.get(DEBUG) == "1"
    with _surviving_output() as lost, nullcontext() if debug else _quiet(name):
        try:
            _require_folder()
            with _insisting():
                exit_code = body()
        except KeyboardInterrupt:
            print(f"{name}: {interrupted}", file=sys.stderr)
            return 130
        except Exception as error:
            if debug:
                raise
            if not isinstance(error, InputError):
                return _report_unexpected(name, error)
            print(f"{name}: {mask_message(str(error))}", file=sys.stderr)
            return 2
        sys.stdout.flush()
        if lost:
            print(f"{name}: the output could not be written: {lost[0]}", file=sys.stderr)
        return exit_code or (1 if lost else 0)


def _require_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise InputError(f"the current folder is gone ({error.strerror}); change to another one") from error


@contextmanager
def _insisting() -> Iterator[None]:
    """Within the block, send a Ctrl-C once more that has not ended it: some reach a place that swallows exceptions."""
    kept, kept_hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if threading.current_thread() is not threading.main_thread() or kept is not signal.default_int_handler:
        yield
        return
    over = threading.Event()

    def repeat(seconds: float) -> None:
        if not over.wait(seconds):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def repeat_after(seconds: float) -> None:
        _thread.start_new_thread(repeat, (seconds,))  # `Thread.start` takes a lock that this thread may hold

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        repeat_after(INSIST_SECONDS)
        raise KeyboardInterrupt

    def swallowed(unraisable: "sys.UnraisableHookArgs") -> None:  # as in the callbacks of Python's imports
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            repeat_after(0.1)
        else:
            kept_hook(unraisable)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        over.set()
        sys.unraisablehook = kept_hook
        signal.signal(signal.SIGINT, kept)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep warnings of libraries off the screen, and report errors in threads like others."""
    kept = threading.excepthook
    threading.excepthook = lambda thread: _report_thread(name, thread)
    try:
        with warnings.catch_warnings():
            if sys.warnoptions:  # those that turn warnings into errors
                warnings.simplefilter("ignore")
            warnings.showwarning = lambda *_, **__: None
            yield
    finally:
        threading.excepthook = kept


def _report_thread(name: str, thread: threading.ExceptHookArgs) -> None:
    if isinstance(thread.exc_value, Exception):
        _report_unexpected(name, thread.exc_value)


def _report_unexpected(name: str, error: Exception) -> int:
    """Say in one line what no one has foreseen, and where its traceback is; return the exit code."""
    text = mask_message("".join(traceback.format_exception(error)))
    try:
        descriptor, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{sys.version}\n{text}")
        where = f"its traceback is in {path}"
    except OSError as full:
        where = f"its traceback can't be saved ({first_line(full)}); {DEBUG}=1 shows it"
    what = mask_message(f"{type(error).__name__}: {first_line(error)}")[:LONGEST_ERROR]
    print(f"{name}: unexpected {what}; {where}", file=sys.stderr)
    return UNEXPECTED


@contextmanager
def _surviving_output() -> Iterator[list[str]]:
    """Within the block, drop what can't be printed.

    Yields:
        Why not, if it is not for a reader that has gone.
    """
    lost: list[str] = []
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_surviving(stream, lost) for stream in kept)
    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = kept


def _surviving(stream: TextIO, lost: list[str]) -> TextIO:
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, ValueError):  # not a file, as in a notebook, or already lost
        return stream
    raw = _Output(descriptor, lost)
    buffer = io.BufferedWriter(raw)
    encoding = stream.encoding
    return io.TextIOWrapper(buffer, encoding, errors="replace", line_buffering=descriptor == 2 or stream.isatty())


class _Output(io.FileIO):
    """A file that takes everything, and notes why it could not write it."""

    def __init__(self, descriptor: int, lost: list[str]):
        super().__init__(descriptor, "w", closefd=False)
        self._lost = lost

    def write(self, content: Any) -> int:
        """Write at least one byte, or drop all."""
        try:
            while (written := super().write(content)) is None:  # another process has made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and not self._lost:
                self._lost.append(error.strerror or first_line(error))
            return memoryview(content).nbytes
