"""The sections of the report: each one words, pictures and the numbers behind them, from a verdict."""

import base64
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from analysis import plot
from analysis.audit import Audit
from analysis.effects import Effects
from analysis.formatting import INTERVAL, format_table, hundredths, number, percent, points, sentence
from analysis.rank import tie_letters
from analysis.store import read_artifact, read_curves
from analysis.verdict import Verdict, name_of

LEADERS, LEADERS_PER_MODEL = 20, 5
PAIRS, HARDEST = 12, 12

AUDIT_TABLES: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "savings": (
        "What stopping saved",
        "What diverged and failed trials left out is not counted as saved.",
        {"model": "model", "trials": "trials", "epochs_run": "epochs run"}
        | {"epochs_full": "without stopping", "saved": "saved"},
    ),
    "correlations": (
        "Does the order at a rung foretell the order at the end?",
        "Rank correlation (Spearman) over the controls: 1 is the same order, 0 is none in common.",
        {"model": "model", "rung": "after epoch", "controls": "controls", "spearman": "rank correlation"} | INTERVAL,
    ),
    "false_stops": (
        "How many that stopping ends would have beaten the median survivor?",
        "Counted among the controls: they ran on where any other trial would have been stopped.",
        {"model": "model", "controls": "controls", "stopped": "would be stopped", "false_stops": "beat the median"}
        | {"rate": "rate"}
        | INTERVAL,
    ),
    "regret": (
        "Did stopping lose a trial that is better than the winner?",
        "The last column: of the stopped trials at most so many would have beaten the winner, with 95 % confidence.",
        {"model": "model", "winner": "winner", "best_stopped_control": "best stopped control"}
        | {"margin": "points between", "stopped": "stopped trials", "at_most": "better, at most"},
    ),
    "baseline": (
        "Would a plain rule have done as well: all until epoch {start}, then the best K to the end?",
        "K is as large as the epochs that were really spent allow.",
        {"model": "model", "epochs": "epochs", "kept": "K", "winner_rank": "winner's rank then"}
        | {"winner_kept": "winner kept", "top_kept": "best survivors kept"},
    ),
}
"""Table of the audit -> caption, how to read it, and what its columns are called."""


@dataclass(frozen=True)
class Figure:
    """A picture with its numbers."""

    caption: str
    picture: Markup
    table: pd.DataFrame | None = None


@dataclass(frozen=True)
class Table:
    """Numbers that need no picture."""

    caption: str
    rows: pd.DataFrame
    remark: str = ""
    """How to read it."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()

    @property
    def anchor(self) -> str:
        """What links to it name."""
        return self.title.lower().replace(" ", "-")


def sections(verdict: Verdict) -> Iterator[Section]:
    """Yield the sections in the order of the page.

    Raises:
        InputError: The store does not answer.
    """
    yield leaderboard(verdict)
    yield effects(verdict)
    yield interactions(verdict)
    yield curves(verdict)
    yield divergence(verdict)
    yield cost(verdict)
    yield stopping(verdict)
    yield finalists(verdict)
    yield samples(verdict)


def leaderboard(verdict: Verdict) -> Section:
    """Which cells are best."""
    cells, notes = verdict.cells, [sentence(note) for note in verdict.experiment.notes]
    if not len(cells):
        return Section("Leaderboard", ["No trial reached an accuracy: all diverged or failed.", *notes])
    text = [
        "Finalists come first, then cells that had the full budget, then those that were stopped, the later the better."
    ]
    if cells["group"].notna().any():
        text.append(
            "Of one tier and one number of epochs, cells with a common letter under tie can't be told apart from the "
            "best of them; ± is half the width of the 95 % interval, in percentage points."
        )
    tables = [Table("The best of all", _leaders(cells.head(LEADERS)))]
    models = cells["model"].unique()
    if len(models) > 1:
        best = [cells[cells["model"] == model].head(LEADERS_PER_MODEL) for model in models]
        tables += [Table(f"The best {model}", _leaders(some)) for model, some in zip(models, best, strict=True)]
    return Section("Leaderboard", text + notes, tables=tables)


def effects(verdict: Verdict) -> Section:
    """What each level does."""
    found = verdict.effects
    if found is None:
        return Section("Main effects", [sentence(verdict.problems["effects"])])
    bars = plot.variance_bars(found.variance)
    lead = (
        f"Accuracies are those after epoch {found.epoch}, before any cell was stopped: the one place where all levels "
        "can be compared fairly. What a level does is averaged over all combinations of the others. A technique that "
        "starts slowly looks worse here than it is; what the levels do at the end is told by the controls alone."
    )
    figures = [_level_figure(found, "")]
    if (last := verdict.effects_at_end) is not None:
        figures.append(_level_figure(last, f", from the {last.observations:,} controls alone"))
        notes = (*found.notes, *(f"controls: {note}" for note in last.notes[1:]))
    else:
        notes = (*found.notes, verdict.problems.get("effects_at_end", ""))
    figures.append(
        Figure(
            f"What explains the differences after epoch {found.epoch} (blue: factors, orange: pairs of them)",
            Markup(plot.draw_variance(bars)),  # noqa: S704  (drawn here)
            format_table(found.variance),
        )
    )
    return Section("Main effects", [lead, *(sentence(note) for note in notes if note)], figures)


def _level_figure(found: Effects, whose: str) -> Figure:
    rows = plot.effect_rows(found.levels)
    caption = f"What each level does to the validation accuracy after epoch {found.epoch}{whose}, with 95 % intervals"
    picture = Markup(plot.draw_main_effects(rows, f"effects after epoch {found.epoch}"))  # noqa: S704
    return Figure(caption, picture, format_table(rows, low=points, high=points))


def interactions(verdict: Verdict) -> Section:
    """Which levels help or hinder each other."""
    found = verdict.effects
    pairs = plot.strongest_interactions(found.variance) if found is not None else []
    if found is None or not pairs:
        return Section("Interactions", ["No two factors vary here whose interaction could be estimated."])
    text = ["Percentage points beyond what the two levels do on their own: orange helps, purple hinders."]
    maps = [plot.interaction_map(found.interactions, pair) for pair in pairs]
    most = max(float(effects.abs().to_numpy().max()) for effects in maps)
    figures = []
    for (one, other), effects in zip(pairs, maps, strict=True):
        chosen = (found.interactions["factor"] == one) & (found.interactions["other_factor"] == other)
        rows = found.interactions[chosen].drop(columns=["factor", "other_factor"])
        figures.append(
            Figure(
                f"{one} x {other}",
                Markup(plot.draw_interaction(effects, (one, other), most)),  # noqa: S704
                format_table(rows, {"level": one, "other_level": other}, low=points, high=points),
            )
        )
    return Section("Interactions", text, figures)


def curves(verdict: Verdict) -> Section:
    """How the trainings went, and how many came how far."""
    trials = verdict.experiment.trials
    funnel = plot.funnel_table(trials)
    chosen = plot.curve_sample(trials)
    read = read_curves(verdict.experiment, chosen["run_id"])
    table = plot.curve_table(chosen, read)
    figures = [
        Figure(
            f"Learning curves, {model}: completed trials (blue) and stopped ones (orange)",
            Markup(plot.draw_curves(chosen, read, str(model))),  # noqa: S704
            format_table(table[table["model"] == model]),
        )
        for model in sorted(table["model"].unique())
    ]
    figures.append(Figure("How many trials came how far", Markup(plot.draw_funnel(funnel)), format_table(funnel)))  # noqa: S704
    text = [
        f"At most {plot.CURVES_PER_MODEL} curves of each kind are drawn, chosen at random. Means over trials that "
        "early stopping has picked are no fair comparison; for that see the main effects."
    ]
    return Section("Learning curves", text, figures)


def divergence(verdict: Verdict) -> Section:
    """Whose loss was not finite."""
    trials, found = verdict.experiment.trials, verdict.effects
    diverged = int((trials["status"] == "diverged").sum())
    lead = f"{diverged:,} of {len(trials):,} trials diverged (their loss was not finite)"
    if not diverged or found is None:
        return Section("Divergence", [f"{lead}."])
    rates = found.divergence.sort_values("rate", ascending=False)
    text = [f"{lead}. They have no accuracy: none is set to 0, none is forgotten. Levels without any are left out."]
    rows = format_table(rates[rates["diverged"] > 0], low=percent, high=percent)
    return Section("Divergence", text, tables=[Table("Rate per level, with 95 % intervals", rows)])


def cost(verdict: Verdict) -> Section:
    """What the grid took."""
    text = ["Hours add up all trials, as if one had run after the other; several ran at once."]
    return Section("Cost", text, tables=[Table("By model", format_table(plot.cost_table(verdict.experiment.trials)))])


def stopping(verdict: Verdict) -> Section:
    """What early stopping saved, and what it may have missed."""
    found = verdict.audit
    if found is None:
        return Section("Early stopping", [sentence(verdict.problems["audit"])])
    return Section("Early stopping", [sentence(note) for note in found.notes], tables=list(_audit_tables(found)))


def finalists(verdict: Verdict) -> Section:
    """How the best did when trained again, and on the test set."""
    cells = verdict.cells[verdict.cells["tier"] == "finalist"]
    if not len(cells):
        command = shlex.join(["python", "-m", "grid.confirm", "--experiment", verdict.experiment.name])
        lead = Markup("None yet. This trains the best cells again, on new seeds: <code>{}</code>")
        return Section("Finalists", [lead.format(command)])
    seeds = int(cells["seeds"].max())
    text = [
        f"The best cells of each model, trained again to the full budget on {seeds} new seed{'s' * (seeds > 1)}, then "
        "tested, each net once. Validation decides the order; the test set only tells.",
    ]
    names = list(map(name_of, cells.to_dict("records")))
    picture = Markup(plot.draw_finalists(cells, names))  # noqa: S704
    figures = [
        Figure(
            "Accuracy of the finalists, with 95 % intervals of the mean over seeds",
            picture,
            _leaders(cells),
        ),
        *_readings(verdict),
    ]
    return Section("Finalists", text, figures)


def samples(verdict: Verdict) -> Section:
    """What the images look like."""
    experiment = verdict.experiment
    sheet = read_artifact(experiment.uri, experiment.parent_id, "samples.png")
    if sheet is None:
        return Section("Samples", ["The store has no picture of the images."])
    return Section("Samples", figures=[Figure("Training images, a few of each class", _image(sheet, "sample images"))])


def _audit_tables(found: Audit) -> Iterator[Table]:
    """Yield what the audit found, each table with how to read it; those without a row are left out."""
    baseline = found.baseline
    kept = baseline["top_kept"].astype(str) + " of " + baseline["top"].astype(str)
    tables = {
        "savings": found.savings,
        "correlations": found.correlations,
        "false_stops": found.false_stops,
        "regret": found.regret,
        "baseline": baseline.assign(top_kept=kept),
    }
    interval = {"correlations": hundredths, "false_stops": percent}
    for name, (caption, remark, headers) in AUDIT_TABLES.items():
        style = interval.get(name, number)
        rows = format_table(tables[name][list(headers)], headers, low=style, high=style)
        if len(rows):
            yield Table(caption.format(start=f"{min(found.rungs, default=1)}"), rows, remark)


def _leaders(cells: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "rank": list(cells["rank"]),
        "cell": list(map(name_of, cells.to_dict("records"))),
        "val acc": [percent(value) for value in cells["val_accuracy"]],
        "±": [points(half).lstrip("+") for half in (cells["high"] - cells["low"]) / 2],
        "tie": [tie_letters(group) for group in cells["group"]],
        "test acc": [percent(value) for value in cells["test_accuracy"]],
        "lr": ["" if scale == 1 else f"x{scale:g}" for scale in cells["lr_scale"]],
        "seeds": list(cells["seeds"]),
        "epochs": [f"{run} of {full}" for run, full in zip(cells["epochs_run"], cells["epochs"], strict=True)],
    }
    return pd.DataFrame({name: values for name, values in columns.items() if any(values)})


def _readings(verdict: Verdict) -> Iterator[Figure]:
    """Yield what the best net of the best finalist read, and misread."""
    experiment, best = verdict.experiment, name_of(verdict.cells.iloc[0].to_dict())
    tested = experiment.finalists[experiment.finalists["test_accuracy"].notna()]
    of_best = tested[[name_of(row) == best for row in tested.to_dict("records")]]
    if not len(of_best):
        return
    run = of_best.sort_values("best_val_accuracy").iloc[-1].to_dict()
    who = f"{name_of(run)}, seed {run['seed']}"
    pairs, classes = (_read_table(verdict, run["run_id"], name) for name in ("confused_pairs", "per_class"))
    if pairs is not None and (matrix := read_artifact(experiment.uri, run["run_id"], "test/confusion.png")):
        yield Figure(
            f"Who is taken for whom: {who}", _image(matrix, "confusion matrix"), format_table(pairs.head(PAIRS))
        )
    if classes is not None and (sheet := read_artifact(experiment.uri, run["run_id"], "test/mistakes.png")):
        hardest = classes.sort_values("accuracy").head(HARDEST)
        yield Figure(
            "Its most confident mistakes; the numbers below: the hardest characters",
            _image(sheet, "mistakes"),
            format_table(hardest),
        )


def _read_table(verdict: Verdict, run_id: str, name: str) -> pd.DataFrame | None:
    content = read_artifact(verdict.experiment.uri, run_id, f"test/{name}.csv")
    characters = dict.fromkeys(("true", "predicted", "character"), "str")  # a 4 is a character here
    return None if content is None else pd.read_csv(io.BytesIO(content), dtype=characters)


def _image(png: bytes, name: str) -> Markup:
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(name, base64.b64encode(png).decode())
