"""Writes all results as one HTML file that needs no network: `python -m analysis.report --experiment smoke-glyphs`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.page.render import render
from analysis.store import read_experiment
from analysis.verdict import Verdict, analyse, headline
from grid.arguments import Parser, add_experiment, add_store, run_command, write_output


def write_report(uri: str | None, experiment: str, path: Path, *, only_ranked: bool = False) -> Verdict:
    """Write the page of an experiment, and return what it says.

    Args:
        uri: MLflow tracking URI; None for `mlflow.db` in the current folder.
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
    options = parser.parse_args(arguments)

    def report() -> int:
        verdict = write_report(options.store, options.experiment, options.out)
        for fact in headline(verdict):
            print("\n  ".join([f"{fact.question}: {fact.answer}. {fact.remark}".rstrip(), *fact.details]))
        print(f"{options.out}  {options.out.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
        return 0

    return run_command(parser.name, report)


if __name__ == "__main__":
    sys.exit(main())
