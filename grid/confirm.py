"""The command that confirms: `python -m grid.confirm --experiment NAME`.

Retrains the best cells of a grid at full budget on seeds that the grid has not seen, then tests each net once. The only
command that reads the test set. Checks what can be checked at once, then loads the rest (`grid.finalists`).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grid.arguments import Parser
from grid.config import InputError
from grid.request import MOST, check_address, check_folder_name, check_storage
from grid.store_uri import check_store_uri


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Which cells are confirmed, and where.

    Raises:
        InputError: A value is out of its range.
    """

    experiment: str
    """MLflow experiment that holds the grid."""
    top: int
    """Finalists of each model."""
    seeds: int
    """Replicates of each finalist, the same seeds for all."""
    register: str | None
    """Name under which the winner goes into MLflow's registry; None leaves it out."""
    store: str
    """MLflow tracking URI, absolute."""
    data_dir: Path
    """Holds, or is to hold, the files of all data sets."""
    storage: str
    """Folder or URI for checkpoints that all nodes reach."""
    spool: Path
    """Local folder of what has not reached the store yet."""
    address: str | None
    """`HOST:PORT`, `auto` or `local`; None joins the cluster of this machine if there is one, else starts Ray."""
    concurrency: int | None
    """Trials at once; None lets the machine decide."""

    def __post_init__(self) -> None:
        for name, value, most in (("top", self.top, MOST["seeds"]), ("seeds", self.seeds, MOST["seeds"])):
            if not 1 <= value <= most:
                raise InputError(f"--{name} must be 1 to {most:,}, got {value}")
        if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
            raise InputError(f"--register must be a name without / and :, got '{self.register}'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: every finalist is trained and tested; 1: some are not; 2: wrong input; 130: interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        confirmation = read_confirmation(options)
        from grid import finalists  # noqa: PLC0415  (torch and ray: seconds that a wrong argument need not wait)

        return finalists.confirm(confirmation)
    except InputError as error:
        if options.debug:
            raise
        print(f"grid.confirm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("grid.confirm: interrupted; the same command goes on", file=sys.stderr)
        return 130


def read_confirmation(options: argparse.Namespace) -> Confirmation:
    """Check the options.

    Raises:
        InputError: A value is wrong.
    """
    return Confirmation(
        experiment=options.experiment,
        top=options.top,
        seeds=options.seeds,
        register=options.register,
        store=check_store_uri(options.store, must_exist=True),
        data_dir=check_folder_name("--data-dir", options.data_dir),
        storage=check_storage(options.storage),
        spool=Path("spool").absolute(),
        address=check_address(options.address),
        concurrency=options.concurrency,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m grid.confirm",
        description="Retrain the best cells of a grid on new seeds, then test each net once. "
        "The same command again goes on where it stopped, and tests nothing twice.",
    )
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment of the grid")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="finalists of each model (3)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="replicates of each (5)")
    parser.add_argument("--register", metavar="NAME", help="put the winner into MLflow's model registry")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="files of data sets (data)")
    parser.add_argument(
        "--storage", default="storage", metavar="DIR", help="checkpoints, reached by all nodes (storage)"
    )
    parser.add_argument(
        "--address",
        metavar="ADDR",
        help="HOST:PORT; auto: a cluster must run here; local: none (the cluster of this machine if one runs)",
    )
    parser.add_argument("--concurrency", type=int, metavar="N", help="trials at once (what the machine holds)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
