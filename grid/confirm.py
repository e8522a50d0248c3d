"""The command that confirms: `python -m grid.confirm --experiment NAME`.

Retrains the cells that may be the best of their model to the full budget on new seeds, then tests each net once. The
only command that reads the test set. Checks its arguments at once, then imports the rest (`grid.driver.finalists`).
"""

import argparse
import sys
from collections.abc import Sequence

from grid.arguments import (
    Parser,
    add_accept_code,
    add_data_dir,
    add_debug,
    add_experiment,
    add_json,
    add_parts,
    add_store,
    add_workers,
    for_programs,
    run_command,
)
from grid.config import InputError
from grid.parts.files import load_files
from grid.plan.request import Confirmation, read_place
from grid.tune.limits import largest_object_store

DEFAULT_TOP = 3
INTERRUPTED = "interrupted; run the same command to continue"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: every finalist is trained and tested; 1: some are not; 2: wrong input; 130: interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)

    def confirm() -> int:
        confirmation = read_confirmation(options)
        largest_object_store()  # too small a one would crash torch
        from grid.driver import finalists  # noqa: PLC0415  (torch and Ray: seconds that a wrong argument need not wait)

        with for_programs(options.json) as answer:
            exit_code = finalists.confirm(confirmation)
            if options.json:
                from analysis.rank import describe_experiment  # noqa: PLC0415  (statistics: a second)

                described = describe_experiment(confirmation.store, confirmation.experiment)
                answer({"exit_code": exit_code, **described})
        return exit_code

    return run_command(parser.name, confirm, interrupted=INTERRUPTED, debug=options.debug)


def read_confirmation(options: argparse.Namespace) -> Confirmation:
    """Check the options.

    Raises:
        InputError: A value is wrong.
    """
    if options.refit and options.top is not None:
        raise InputError("--refit trains the best finalist alone; leave --top out")
    load_files(options.parts)
    return Confirmation(
        experiment=options.experiment,
        top=DEFAULT_TOP if options.top is None else options.top,
        seeds=options.seeds,
        register=options.register,
        refit=options.refit,
        **read_place(options, must_exist=True),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m grid.confirm",
        description="Retrain the cells that may be the best of their model on new seeds, then test each net once. "
        "Run the same command again to continue; nothing is tested twice.",
    )
    add_experiment(parser)
    parser.add_argument("--top", type=int, metavar="N", help=f"at most N finalists per model ({DEFAULT_TOP})")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="replicates per finalist (5)")
    parser.add_argument("--register", metavar="NAME", help="register the winner in MLflow's model registry")
    parser.add_argument(
        "--refit", action="store_true", help="afterwards: train the best finalist on most validation images as well"
    )
    add_store(parser)
    add_data_dir(parser)
    add_workers(parser)
    add_accept_code(parser)
    add_parts(parser)
    add_debug(parser)
    add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
