"""The sections of the report: text, figures and the numbers behind them, from a verdict."""

import base64
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from analysis import plot
from analysis.audit import WORDING, caption_of
from analysis.curves import read_curves
from analysis.estimates.cells import combine_halves, rank_refits
from analysis.estimates.earned import Earned, describe_together
from analysis.formatting import INTERVAL, format_table, hundredths, number, percent, points, sentence
from analysis.stopping.figures import Audit
from analysis.store import Experiment, read_artifact, read_artifacts
from analysis.verdict import Unavailable, Verdict, name_of
from grid.wording import count

LEADERS, LEADERS_PER_MODEL = 20, 5
PAIRS, HARDEST = 12, 12
DIFFERENCES = {
    "factor": "factor",
    "level": "level",
    "other_level": "over",
    "difference": "points",
    "sure": "sure",
}


@dataclass(frozen=True)
class Figure:
    """A picture and its numbers."""

    caption: str
    picture: Markup
    table: pd.DataFrame | None = None


@dataclass(frozen=True)
class Table:
    """Numbers without a picture."""

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
        """Its id in the page."""
        return self.title.lower().replace(" ", "-")


def sections(verdict: Verdict) -> Iterator[Section]:
    """Yield the sections that have something to say, in the order of the page.

    Raises:
        InputError: The store does not answer.
    """
    parts = (leaderboard, effects, interactions, first_rung, curves, divergence, cost, stopping, finalists, samples)
    for part in parts:
        if section := part(verdict):
            yield section


def headline_figure(verdict: Verdict) -> Figure | None:
    """Return the picture beside what matters at the end."""
    if isinstance(verdict.effects, Unavailable):
        return None
    rows = plot.difference_rows(verdict.effects.differences)
    picture = Markup(plot.draw_differences(rows))  # noqa: S704  (drawn here)
    return Figure(
        "The largest difference of each factor, with 95% intervals",
        picture,
        format_table(rows, DIFFERENCES, difference=points, low=points, high=points),
    )


def leaderboard(verdict: Verdict) -> Section:
    """Return the best cells."""
    cells, notes = verdict.cells, [sentence(note) for note in verdict.experiment.notes]
    if not len(cells):
        return Section("Leaderboard", ["No trial has an accuracy: all diverged or failed.", *notes])
    text = ["Finalists come first, then cells with the full budget, then stopped cells, those with more epochs first."]
    if cells["low"].notna().any():
        text.append("± is half the width of a 95% interval in points, for another seed and for other images.")
        text.append(
            "Cells with “yes” under “tie” may be as good as the best, finalists among finalists and other cells among "
            "all that trained to the full budget in the grid."
        )
    if (cells["controls"] > 0).any():
        text.append(
            "A cell with * has an unstopped control, which counts as stopped at the rung at which ASHA would have "
            "stopped it; “control” is where it ended."
        )
    tables = [Table("Best cells", _leaders(cells.head(LEADERS)))]
    models = cells["model"].unique()
    if len(models) > 1:
        of_models = [cells[cells["model"] == model].head(LEADERS_PER_MODEL) for model in models]
        tables += [Table(f"Best {model} cells", _leaders(best)) for model, best in zip(models, of_models, strict=True)]
    return Section("Leaderboard", text + notes, tables=tables)


def effects(verdict: Verdict) -> Section | None:
    """Return the effect of each level at the end of training; None for a single cell."""
    found = verdict.effects
    if isinstance(found, Unavailable):
        return Section("Effects at the end", [sentence(found.reason)]) if len(verdict.cells) > 1 else None
    lead = (
        f"What each level does to the validation accuracy after {count(found.epochs, 'epoch')}, averaged over all "
        "combinations of the other factors. "
    )
    if found.stopped:
        lead += (
            f"{count(found.stopped, 'trial')} of {found.trials:,} were stopped early. Their ends are estimated from "
            f"what they showed before, and corrected by {count(found.probed, 'unstopped control')}: trials that early "
            "stopping would have ended but that, drawn at random, trained on. So slow starters are compared fairly."
        )
    rows = plot.effect_rows(found.levels)
    picture = Markup(plot.draw_main_effects(rows, "effects at the end"))  # noqa: S704  (drawn here)
    caption = "Effect of each level at the end, each with its own 95% interval"
    figures = [Figure(caption, picture, format_table(rows, low=points, high=points))]
    tables = [
        Table(
            "Differences between levels",
            format_table(found.differences, DIFFERENCES, difference=points, low=points, high=points),
            "Intervals hold for all differences of a factor at once (Tukey).",
        )
    ]
    if found.earned is not None:
        tables.insert(0, _earned(found.earned))
    return Section("Effects at the end", [lead, *map(sentence, found.notes)], figures, tables)


def _earned(earned: Earned) -> Table:
    """Return what each of the best levels, or each technique, earns over the plain one."""
    rows = earned.table
    halves = {which: (rows[f"{which}_high"] - rows[f"{which}_low"]) / 2 for which in ("alone", "average", "last")}
    shown = pd.DataFrame({"factor": rows["factor"], "level": rows["level"] + " over " + rows["plain"]})
    for which, title in (("alone", "alone"), ("average", "on average"), ("last", "added last")):
        shown[title] = [
            f"{points(value)} ±{100 * half:.2f}" for value, half in zip(rows[which], halves[which], strict=True)
        ]
    chosen = "" if earned.surely_better else "Fewer than two earn something for sure, so these are all of two levels. "
    return Table(
        "What the best levels earn" if earned.surely_better else "What all techniques earn",
        shown,
        f"{chosen}In points, over the plain level, the first of each factor: added to the plain levels of the other "
        "rows, averaged over all levels of all other factors, and added to the levels of the other rows. "
        f"{sentence(describe_together(earned))}",
    )


def first_rung(verdict: Verdict) -> Section | None:
    """Return what the levels do after the first rung, who learns fast; None if there is no rung or no effect."""
    found = verdict.first
    if found is None or isinstance(found, Unavailable):
        return None
    lead = (
        f"Accuracies after epoch {found.epoch}, before any trial was stopped. This is another question than who ends "
        "well: techniques that start slowly look worse here than they are."
    )
    rows = plot.effect_rows(found.levels)
    picture = Markup(plot.draw_main_effects(rows, f"effects after epoch {found.epoch}"))  # noqa: S704
    shares = Markup(plot.draw_variance(plot.variance_bars(found.variance)))  # noqa: S704
    figures = [
        Figure(
            f"Effect of each level after epoch {found.epoch}, with 95% intervals",
            picture,
            format_table(rows, low=points, high=points),
        ),
        Figure(
            f"What explains the differences after epoch {found.epoch} (blue: factors, orange: pairs of factors)",
            shares,
            format_table(found.variance),
        ),
    ]
    return Section("Who learns fast", [lead, *map(sentence, found.notes)], figures)


def interactions(verdict: Verdict) -> Section | None:
    """Return the pairs of factors whose levels help or hinder each other most at the end; None without estimates."""
    found = verdict.effects
    if isinstance(found, Unavailable) or found.interactions.empty:
        return None
    pairs = plot.strongest_interactions(found.interactions)
    if not pairs:
        return Section("Interactions", ["No pair of levels stands out beyond the sum of its two effects."])
    text = [
        "Percentage points at the end, beyond the sum of the two levels' effects: orange helps, purple hinders. "
        "Shown are the factors with the strongest pairs that stand out (after Holm's correction over all pairs)."
    ]
    maps = [plot.interaction_map(found.interactions, pair) for pair in pairs]
    largest = max(float(effects.abs().to_numpy().max()) for effects in maps)
    figures = []
    for (first, second), effects in zip(pairs, maps, strict=True):
        chosen = (found.interactions["factor"] == first) & (found.interactions["other_factor"] == second)
        rows = found.interactions[chosen].drop(columns=["factor", "other_factor"])
        figures.append(
            Figure(
                f"{first} x {second}",
                Markup(plot.draw_interaction(effects, (first, second), largest)),  # noqa: S704
                format_table(rows, {"level": first, "other_level": second}, low=points, high=points),
            )
        )
    return Section("Interactions", text, figures)


def curves(verdict: Verdict) -> Section:
    """Return the learning curves, and how far trials got."""
    trials = verdict.experiment.trials
    funnel = plot.funnel_table(trials)
    sample = plot.curve_sample(trials)
    histories = read_curves(verdict.experiment, sample["run_id"])
    table = plot.curve_table(sample, histories)
    figures = [
        Figure(
            f"Learning curves, {model}: completed trials (blue) and stopped ones (orange)",
            Markup(plot.draw_curves(sample, histories, str(model))),  # noqa: S704
            format_table(table[table["model"] == model]),
        )
        for model in sorted(table["model"].unique())
    ]
    figures.append(Figure("How far trials got", Markup(plot.draw_funnel(funnel)), format_table(funnel)))  # noqa: S704
    text = [
        f"For each model and outcome at most {plot.CURVES_PER_MODEL} curves are drawn, chosen at random. Averages over "
        "the trials that survived early stopping are not a fair comparison of techniques; the effects at the end are."
    ]
    return Section("Learning curves", text, figures)


def divergence(verdict: Verdict) -> Section:
    """Return the rate of divergence of each level."""
    trials, found = verdict.experiment.trials, verdict.effects
    diverged = int((trials["status"] == "diverged").sum())
    lead = f"{diverged:,} of {count(len(trials), 'trial')} diverged (their loss was not finite)"
    if not diverged or isinstance(found, Unavailable):
        return Section("Divergence", [f"{lead}."])
    rates = found.divergence.sort_values("rate", ascending=False)
    text = [f"{lead}. They have no accuracy and do not count as zero. Levels that never diverged are not listed."]
    rows = format_table(rates[rates["diverged"] > 0], low=percent, high=percent)
    return Section("Divergence", text, tables=[Table("Rate by level, with 95% intervals", rows)])


def cost(verdict: Verdict) -> Section:
    """Return what the grid cost."""
    text = ["Hours are summed over trials; several trials ran at once, so the grid took less."]
    return Section("Cost", text, tables=[Table("By model", format_table(plot.cost_table(verdict.experiment.trials)))])


def stopping(verdict: Verdict) -> Section:
    """Return what early stopping saved, and what it may have missed."""
    found = verdict.audit
    if isinstance(found, Unavailable):
        return Section("Early stopping", [sentence(found.reason)])
    return Section("Early stopping", [sentence(note) for note in found.notes], tables=list(_audit_tables(found)))


def finalists(verdict: Verdict) -> Section:
    """Return the accuracies of the best cells, trained again and tested."""
    cells = verdict.cells[verdict.cells["tier"] == "finalist"]
    if not len(cells):
        command = shlex.join(["python", "-m", "grid.confirm", "--experiment", verdict.experiment.name])
        lead = Markup("None yet. This command trains the best cells again on new seeds: <code>{}</code>")
        return Section("Finalists", [lead.format(command)])
    seeds = int(cells["seeds"].max())
    text = [
        f"The best cells of each model, trained again to the full budget on {count(seeds, 'new seed')}; then each net "
        "was tested once. The order is by validation accuracy; test accuracies are only reported.",
        *_refit(verdict.experiment),
    ]
    names = list(map(name_of, cells.to_dict("records")))
    picture = Markup(plot.draw_finalists(cells, names))  # noqa: S704
    figures = [
        Figure(
            "Accuracy of the finalists, with 95% intervals of the mean over seeds",
            picture,
            _leaders(cells),
        ),
        *_readings(verdict),
    ]
    return Section("Finalists", text, figures)


def _refit(experiment: Experiment) -> list[str]:
    """Say what the best finalist reaches that was trained on most validation images as well."""
    return [
        f"Trained on most validation images as well, {name_of(row)} reaches {row['test_accuracy_as_validated']:.2%} on "
        f"the test set{_within(row)}, the mean of {count(row['seeds'], 'seed')}."
        for row in rank_refits(experiment).to_dict("records")
        if pd.notna(row["test_accuracy_as_validated"])
    ]


def _within(row: Mapping[Any, Any]) -> str:
    half = combine_halves(row["test_seed_half"], row["test_image_half"])
    return "" if pd.isna(half) else f" (±{100 * half:.2f} points)"


def samples(verdict: Verdict) -> Section | None:
    """Return a picture of training images; None if the store has none."""
    experiment = verdict.experiment
    sheet = read_artifact(experiment.uri, experiment.parent_id, "samples.png")
    if sheet is None:
        return None
    return Section("Samples", figures=[Figure("Training images, a few of each class", _image(sheet, "sample images"))])


def _audit_tables(found: Audit) -> Iterator[Table]:
    """Yield the tables of the audit that have a row, each with how to read it."""
    kept = found.baseline["top_kept"].astype(str) + " of " + found.baseline["top"].astype(str)
    interval_styles = {"correlations": hundredths, "false_stops": percent}
    for name, wording in WORDING.items():
        table = found.baseline.assign(top_kept=kept) if name == "baseline" else getattr(found, name)
        headers = {**wording.headers, **(INTERVAL if wording.has_interval else {})}
        style = interval_styles.get(name, number)
        rows = format_table(table[list(headers)], headers, low=style, high=style)
        if len(rows):
            yield Table(caption_of(name, found), rows, wording.remark.format(sure=f"{found.confidence:.0%}"))


def _leaders(cells: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "rank": list(cells["rank"]),
        "cell": list(map(name_of, cells.to_dict("records"))),
        "val acc": [
            percent(value) + "*" * (controls > 0)
            for value, controls in zip(cells["val_accuracy"], cells["controls"], strict=True)
        ],
        "± seed": [points(half).lstrip("+") for half in cells["seed_half"]],
        "± images": [points(half).lstrip("+") for half in cells["image_half"]],
        "tie": ["yes" if tied else "" for tied in cells["tied"] & cells["low"].notna()],
        "balanced": [percent(value) for value in cells["val_balanced_accuracy"]],
        "test acc": [percent(value) for value in cells["test_accuracy_as_validated"]],
        "test balanced": [
            percent(value) if known else ""
            for value, known in zip(
                cells["test_balanced_accuracy"], cells["val_balanced_accuracy"].notna(), strict=True
            )
        ],
        "control": [percent(value) for value in cells["controls_end"]],
        "diverged": [number or "" for number in cells["diverged"]],
        "lr": ["" if scale == 1 else f"x{scale:g}" for scale in cells["lr_scale"]],
        "seeds": list(cells["seeds"]),
        "epochs": [f"{run} of {full}" for run, full in zip(cells["epochs_run"], cells["epochs"], strict=True)],
    }
    return pd.DataFrame({name: values for name, values in columns.items() if any(values)})


def _readings(verdict: Verdict) -> Iterator[Figure]:
    """Yield what the best net of the best finalist confused on the test set."""
    experiment, best = verdict.experiment, name_of(verdict.cells.iloc[0].to_dict())
    tested = experiment.finalists[experiment.finalists["test_accuracy"].notna()]
    of_best = tested[[name_of(row) == best for row in tested.to_dict("records")]]
    if not len(of_best):
        return
    run = of_best.sort_values("final_val_accuracy").iloc[-1].to_dict()
    net = f"{name_of(run)}, seed {run['seed']}"
    names = ("confused_pairs.csv", "per_class.csv", "confusion.png", "mistakes.png")
    files = read_artifacts(experiment.uri, run["run_id"], [f"test/{name}" for name in names])
    pairs, classes, matrix, sheet = (files.get(f"test/{name}") for name in names)
    if pairs and matrix:
        table = format_table(_read_table(pairs).head(PAIRS))
        yield Figure(f"Which classes are confused: {net}", _image(matrix, "confusion matrix"), table)
    if classes and sheet:
        hardest = _read_table(classes).sort_values("accuracy").head(HARDEST)
        yield Figure(
            "Its most confident mistakes, and (as numbers) the classes it got wrong most",
            _image(sheet, "mistakes"),
            format_table(hardest),
        )


def _read_table(content: bytes) -> pd.DataFrame:
    names = dict.fromkeys(("true", "predicted", "character"), "str")  # a 4 is a name here
    return pd.read_csv(io.BytesIO(content), dtype=names)


def _image(png: bytes, name: str) -> Markup:
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(name, base64.b64encode(png).decode())
