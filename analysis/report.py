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
from grid.config import FACTORS, InputError

TEXTS = frozenset({*FACTORS, "cell", "character", "level", "factor", "read as", "status", "term", "tie", "true"})
"""Columns of words, which start at the left; numbers end at the right."""
SPLITS = {"train": "training", "val": "validation"}


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
        texts=TEXTS,
        manifest=json.dumps(experiment.manifest, indent=1) if experiment.manifest else "",
    )


def _subtitle(experiment: Experiment) -> str:
    """Say what was trained; a manifest that another program wrote may lack anything."""
    trials, manifest = experiment.trials, experiment.manifest
    cells, count, epochs = trials["cell_key"].nunique(), len(trials), int(trials["epochs"].max())
    parts = [
        f"{cells:,} cell{'s' * (cells != 1)}",
        f"{count:,} trial{'s' * (count != 1)} of at most {epochs} epoch{'s' * (epochs != 1)}",
    ]
    data = experiment.described("data")
    counts = {name: data.get(f"{split}_images") for split, name in SPLITS.items()}
    images = [f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int)]
    named = f"{data['name']}: " if "name" in data else ""
    parts += [f"{named}{' and '.join(images)} images"] if images else []
    parts += [f"commit {manifest['commit']}"] if "commit" in manifest else []
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
