"""Writes all results as one HTML file that needs no network: `python -m analysis.report --experiment smoke-glyphs`.

With `--follow` it is written again and again until the grid has ended.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.follow import follow
from analysis.page.render import render
from analysis.store import read_experiment
from analysis.verdict import Verdict, analyse, headline
from grid.arguments import Parser, add_experiment, add_store, run_command, write_output

SHORTEST, LONGEST = 2, 86_400
"""Seconds between two pages."""


def write_report(uri: str | None, experiment: str, path: Path, *, only_ranked: bool = False) -> Verdict:
    """Write the page of an experiment, and return what it says.

    Args:
        uri: MLflow tracking URI; None for `grid.store_uri.default_store_uri`.
        experiment: Its name.
        path: File to write.
        only_ranked: Whether nothing is written if no cell has an accuracy.

    Raises:
        InputError: The store does not answer or has no such experiment, none of its trials has ended, or the file
            can't be written.
    """
    verdict = analyse(read_experiment(uri, experiment))
    if len(verdict.cells) or not only_ranked:
        write_output(path, render(verdict))
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(
        prog="python -m analysis.report",
        description="Write ranking, effects and the audit of early stopping as one HTML file.",
    )
    add_experiment(parser)
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="file to write (report.html)"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write it again whenever a trial has ended, until the grid has; the page reloads itself",
    )
    parser.add_argument(
        "--every", type=_seconds, default=30.0, metavar="SECONDS", help="with --follow: how often, at least 2 (30)"
    )
    options = parser.parse_args(arguments)

    def report() -> int:
        where = options.store, options.experiment, options.out
        verdict = follow(*where, every=options.every) if options.follow else write_report(*where)
        for fact in headline(verdict):
            print("\n  ".join([f"{fact.question}: {fact.answer}. {fact.remark}".rstrip(), *fact.details]))
        print(f"{options.out}  {options.out.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
        return 0

    return run_command(parser.name, report)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from {SHORTEST} to {LONGEST:,}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
