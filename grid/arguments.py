"""What all commands share: the parser, the options that several commands take, and how errors reach the user.

Standard library only, so that `--help` and a wrong argument are answered at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from grid.config import InputError
from grid.masking import mask_message


class Options(Protocol):
    """A parser, or a group of options in it."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an option."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"{self.name}: {mask_message(message)}; see --help\n")

    @property
    def name(self) -> str:
        """The command without `python -m`, such as `grid.run`."""
        return self.prog.removeprefix("python -m ")


def add_experiment(options: Options) -> None:
    """Add `--experiment`, for a command that reads one."""
    options.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment that holds the grid")


def add_store(options: Options) -> None:
    """Add `--store`."""
    options.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")


def add_data_dir(options: Options) -> None:
    """Add `--data-dir`."""
    options.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="files of data sets (data)")


def add_workers(options: Options) -> None:
    """Add `--storage`, `--address` and `--concurrency`: where trials run."""
    options.add_argument(
        "--storage", default="storage", metavar="DIR", help="checkpoints; must be reachable from all nodes (storage)"
    )
    options.add_argument(
        "--address",
        metavar="ADDR",
        help="HOST:PORT of a Ray cluster, auto (require this machine's cluster), or local (ignore it); "
        "default: this machine's cluster if there is one, else a private Ray",
    )
    options.add_argument("--concurrency", type=int, metavar="N", help="trials at once (as many as the machine holds)")


def add_debug(options: Options) -> None:
    """Add `--debug`."""
    options.add_argument("--debug", action="store_true", help="show tracebacks")


def run_command(
    name: str,
    body: Callable[[], int],
    *,
    errors: tuple[type[Exception], ...] = (InputError,),
    interrupted: str = "interrupted",
    debug: bool = False,
) -> int:
    """Run the body of a command and return its exit code.

    Args:
        name: Of the command, such as `grid.run`; starts every message.
        body: Does the work and returns an exit code.
        errors: Reported on stderr as one line, exit code 2.
        interrupted: What to say after Ctrl-C, exit code 130.
        debug: Raise errors, for their tracebacks.
    """
    try:
        return body()
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except errors as error:
        if debug:
            raise
        print(f"{name}: {mask_message(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
