"""Fills `report.html` with a verdict."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from analysis.page.provenance import command_table
from analysis.page.sections import headline_figure, sections
from analysis.store import Experiment
from analysis.verdict import Verdict, headline
from grid.config import FACTORS, SETTINGS
from grid.masking import mask_message
from grid.wording import count

TEXTS = frozenset(
    {"accepted as equal", "code", "command", "commit", "device", "host", "time", "torch"}
    | {"cell", "character", "level", "over", "factor", "read as", "status", "sure", "term", "tie", "true"}
)
"""Columns of text beside the factors, aligned left; numbers are aligned right."""
SPLITS = {"train": "training", "val": "validation"}


UNWRITTEN = "<time></time>"
"""Stands in a page that reloads itself where `stamp` puts the time; no text of a user can hold it."""


def render(verdict: Verdict, *, every: float | None = None) -> str:
    """Return the whole page.

    Args:
        verdict: What it shows.
        every: Seconds between reloads of a page that reloads itself and says how old it is; None for other pages.

    Raises:
        InputError: The store does not answer.
    """
    experiment = verdict.experiment
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=experiment.name,
        subtitle=_subtitle(experiment),
        progress=_progress(experiment),
        every=every,
        headline=list(headline(verdict)),
        differences=headline_figure(verdict),
        sections=list(sections(verdict)),
        texts={*FACTORS, *SETTINGS, *TEXTS},
        commands=command_table(experiment),
        manifest=_without_secrets(json.dumps(experiment.manifest, indent=1)) if experiment.manifest else "",
    )


def stamp(page: str, seconds: float) -> str:
    """Write into a page that reloads itself when it was written; other pages stay as they are.

    Args:
        page: From `render`.
        seconds: Time since 1970.
    """
    time = datetime.fromtimestamp(seconds, UTC)
    return page.replace(UNWRITTEN, f"<time>{time:%Y-%m-%dT%H:%M:%SZ}</time>", 1)


def _progress(experiment: Experiment) -> str:
    """Say how far the grid is; empty if all trials have ended or the store does not say how many there are."""
    ended, planned = len(experiment.trials), experiment.planned
    return f"{ended:,} of {planned:,} trials have ended." if planned is not None and ended < planned else ""


def _without_secrets(manifest: str) -> str:
    """Hide what an earlier version, which knew fewer kinds of secrets, wrote down."""
    return "\n".join(f"{indent}{mask_message(text)}" for indent, text in re.findall(r"( *)(.*)", manifest) if text)


def _subtitle(experiment: Experiment) -> str:
    """Say what was trained; any entry may be missing from a manifest that another program wrote."""
    trials, manifest = experiment.trials, experiment.manifest
    epochs = count(int(trials["epochs"].max()), "epoch")
    parts = [count(trials["cell_key"].nunique(), "cell"), f"{count(len(trials), 'trial')} of at most {epochs}"]
    data = experiment.described("data")
    sizes = {name: data.get(f"{split}_images") for split, name in SPLITS.items()}
    images = [f"{size:,} {name}" for name, size in sizes.items() if isinstance(size, int)]
    data_name = f"{data['name']}: " if "name" in data else ""
    parts += [f"{data_name}{' and '.join(images)} images"] if images else []
    parts += [f"commit {manifest['commit']}"] if "commit" in manifest else []
    return "; ".join(parts)
