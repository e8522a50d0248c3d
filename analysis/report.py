"""Writes the verdict as one HTML file that needs no network: `python -m analysis.report --experiment smoke-glyphs`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from analysis.sections import sections
from analysis.store import Experiment, read_experiment
from analysis.verdict import Verdict, headline, judge
from grid.arguments import Parser
from grid.config import InputError

TEXTS = frozenset(
    {"cell", "character", "factor", "level", "model", "other_factor", "other_level"}
    | {"status", "term", "tie", "true", "read_as", "winner_kept"}
)
"""Columns of words, which start at the left; numbers end at the right."""


def render(verdict: Verdict) -> str:
    """Return the whole page.

    Raises:
        InputError: The store does not answer.
    """
    experiment = verdict.experiment
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=experiment.name,
        subtitle=_subtitle(experiment),
        headline=list(headline(verdict)),
        sections=list(sections(verdict)),
        texts={name.replace("_", " ") for name in TEXTS},
        manifest=json.dumps(experiment.manifest, indent=1) if experiment.manifest else "The store has none.",
    )


def _subtitle(experiment: Experiment) -> str:
    trials, data = experiment.trials, experiment.manifest.get("data", {})
    parts = [
        f"{trials['cell_key'].nunique():,} cells",
        f"{len(trials):,} trials of at most {trials['epochs'].max()} epochs",
    ]
    if data:
        parts.append(f"{data['name']}, {data['train_images']:,} training and {data['val_images']:,} validation images")
    parts += [f"commit {experiment.manifest['commit']}"] if "commit" in experiment.manifest else []
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m analysis.report", description="Write the verdict as one HTML file.")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment")
    parser.add_argument("--store", metavar="URI", help="MLflow tracking URI (sqlite:///mlflow.db)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    options = parser.parse_args(arguments)
    try:
        verdict = judge(read_experiment(options.store, options.experiment))
        options.out.write_text(render(verdict), encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"analysis.report: {error}", file=sys.stderr)
        return 2
    for fact in headline(verdict):
        print(f"{fact.question}: {fact.answer}. {fact.remark}")
    print(f"{options.out}  {options.out.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
    return 0


if __name__ == "__main__":
    sys.exit(main())
