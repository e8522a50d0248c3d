"""The sections of the report: each one words, pictures and the numbers behind them, from a verdict."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import pandas as pd
from markupsafe import Markup

from analysis import plot
from analysis.rank import tie_letters
from analysis.store import read_artifact, read_curves
from analysis.verdict import Verdict, name_of

LEADERS, LEADERS_PER_MODEL = 20, 5
PAIRS, HARDEST = 12, 12

Spell = Callable[[float], str]


def percent(value: float) -> str:
    """Return a fraction as `12.34%`; nothing for NaN."""
    return "" if isnan(value) else f"{value:.2%}"


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, signed."""
    return "" if isnan(value) else f"{100 * value:+.2f}"


def number(value: float) -> str:
    """Return a number in four significant digits, an integer whole."""
    if isnan(value):
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


SPELLINGS: Mapping[str, Spell] = {
    **dict.fromkeys(("mean", "accuracy", "share", "rate", "saved", "lowest", "median", "highest"), percent),
    **dict.fromkeys(("winner", "best_stopped_control", "beat_winner_high", "omega_squared"), percent),
    **dict.fromkeys(("effect", "margin"), points),
    "hours": lambda hours: f"{hours:.3f}",
}
"""How the numbers of a column are spelled; the others by `number`."""
HEADERS = {"p_holm": "p (Holm)", "omega_squared": "omega squared", "predicted": "read as"}


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
    cells, notes = verdict.cells, verdict.experiment.notes
    text = [
        "Finalists come first, then cells that had the full budget, then the stopped ones by rung. Of one tier and one "
        "number of epochs, cells with a common letter under tie can't be told apart from the best of them; "
        "+- is half the width of the 95 % interval.",
        *map(sentence, notes),
    ]
    tables = [Table("The best of all", _leaders(cells.head(LEADERS)))]
    models = cells["model"].unique()
    if len(models) > 1:
        best = [cells[cells["model"] == model].head(LEADERS_PER_MODEL) for model in models]
        tables += [Table(f"The best {model}", _leaders(some)) for model, some in zip(models, best, strict=True)]
    return Section("Leaderboard", text, tables=tables if len(cells) else ())


def effects(verdict: Verdict) -> Section:
    """What each level does."""
    found = verdict.effects
    if found is None:
        return Section("Main effects", [sentence(verdict.faults["effects"])])
    bars = plot.variance_bars(found.variance)
    lead = (
        f"After epoch {found.epoch} no cell has been stopped: the one place where all levels can be compared fairly. "
        "What a level does is averaged over all combinations of the others."
    )
    figures = [
        Figure(
            f"What each level does to the validation accuracy after epoch {found.epoch}, with 95 % intervals",
            Markup(plot.draw_main_effects(found.levels)),  # noqa: S704  (drawn here)
            spell(found.levels, low=points, high=points),
        ),
        Figure(
            "What explains the differences between the cells (blue: factors, orange: pairs of them)",
            Markup(plot.draw_variance(bars)),  # noqa: S704
            spell(found.variance),
        ),
    ]
    return Section("Main effects", [lead, *map(sentence, found.notes)], figures)


def interactions(verdict: Verdict) -> Section:
    """Which levels help or hinder each other."""
    found = verdict.effects
    pairs = plot.strongest_interactions(found.variance) if found is not None else []
    if found is None or not pairs:
        return Section("Interactions", ["No two factors vary here whose interaction could be estimated."])
    text = ["Percentage points beyond what the two levels do on their own: orange helps, purple hinders."]
    figures = []
    for one, other in pairs:
        chosen = (found.interactions["factor"] == one) & (found.interactions["other_factor"] == other)
        figures.append(
            Figure(
                f"{one} x {other}",
                Markup(plot.draw_interaction(plot.interaction_map(found.interactions, (one, other)), (one, other))),  # noqa: S704
                spell(found.interactions[chosen], low=points, high=points),
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
            spell(table[table["model"] == model]),
        )
        for model in sorted(table["model"].unique())
    ]
    figures.append(Figure("How many trials came how far", Markup(plot.draw_funnel(funnel)), spell(funnel)))  # noqa: S704
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
    rows = spell(rates[rates["diverged"] > 0], low=percent, high=percent)
    return Section("Divergence", text, tables=[Table("Rate per level, with 95 % intervals", rows)])


def cost(verdict: Verdict) -> Section:
    """What the grid took."""
    text = ["Hours add up all trials, as if one had run after the other; several ran at once."]
    return Section("Cost", text, tables=[Table("By model", spell(plot.cost_table(verdict.experiment.trials)))])


def stopping(verdict: Verdict) -> Section:
    """What early stopping saved, and what it may have missed."""
    found = verdict.audit
    if found is None:
        return Section("Early stopping", [sentence(verdict.faults["audit"])])
    named = {
        "Epochs saved": spell(found.savings),
        "Controls that would have been stopped, and how they ended": spell(
            found.false_stops, low=percent, high=percent
        ),
        "How well an early rank tells the last one (Spearman, controls)": spell(found.correlations),
        "How far the best of the stopped controls stayed behind": spell(found.regret),
        "Beside it: one epoch for all, then the best to the end, for as many epochs": spell(found.baseline),
    }
    tables = [Table(caption, rows) for caption, rows in named.items() if len(rows)]
    return Section("Early stopping", [sentence(note) for note in found.notes], tables=tables)


def finalists(verdict: Verdict) -> Section:
    """How the best did when trained again, and on the test set."""
    cells = verdict.cells[verdict.cells["tier"] == "finalist"]
    if not len(cells):
        name = verdict.experiment.name
        return Section("Finalists", [f"None yet: python -m grid.confirm --experiment {name} trains the best again."])
    seeds = int(cells["seeds"].max())
    text = [
        f"The best cells of each model, trained again to the full budget on {seeds} seeds that the grid had not seen, "
        "then tested, each net once. Validation decides the order; the test set only tells.",
    ]
    names = list(map(name_of, cells.to_dict("records")))
    picture = Markup(plot.draw_finalists(cells, names))  # noqa: S704
    figures = [
        Figure(
            "Accuracy of the finalists, with 95 % intervals of the mean over seeds",
            picture,
            _leaders(cells, tested=True),
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


def sentence(text: str) -> str:
    """Return a remark as a sentence."""
    names_a_level = text.split(" ")[0].endswith(":")
    return f"{text[:1] if names_a_level else text[:1].upper()}{text[1:].rstrip('.')}."


def spell(table: pd.DataFrame, **spellings: Spell) -> pd.DataFrame:
    """Return a table as text, ready to be shown.

    Args:
        table: Any.
        spellings: By column, where `SPELLINGS` does not fit.
    """
    known = {**SPELLINGS, **spellings}
    spelled = {}
    for name in table.columns:
        header = HEADERS.get(name, name.replace("_", " "))
        column = table[name]
        if pd.api.types.is_bool_dtype(column):
            spelled[header] = ["yes" if value else "no" for value in column]
        elif pd.api.types.is_numeric_dtype(column):
            spelled[header] = [known.get(name, number)(float(value)) for value in column]
        else:
            spelled[header] = [str(value) for value in column]
    return pd.DataFrame(spelled)


def _leaders(cells: pd.DataFrame, *, tested: bool = False) -> pd.DataFrame:
    columns = {
        "rank": list(cells["rank"]),
        "tie": [tie_letters(group) for group in cells["group"]],
        "val acc": [percent(value) for value in cells["val_accuracy"]],
        "+-": [points(half).lstrip("+") for half in (cells["high"] - cells["low"]) / 2],
        "test acc": [percent(value) for value in cells["test_accuracy"]],
        "seeds": list(cells["seeds"]),
        "epochs": [f"{run}/{full}" for run, full in zip(cells["epochs_run"], cells["epochs"], strict=True)],
        "cell": list(map(name_of, cells.to_dict("records"))),
    }
    if not tested and cells["test_accuracy"].isna().all():
        del columns["test acc"]
    return pd.DataFrame(columns)


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
        yield Figure(f"Who is taken for whom: {who}", _image(matrix, "confusion matrix"), spell(pairs.head(PAIRS)))
    if classes is not None and (sheet := read_artifact(experiment.uri, run["run_id"], "test/mistakes.png")):
        hardest = classes.sort_values("accuracy").head(HARDEST)
        yield Figure(
            "Its most confident mistakes; under numbers: the hardest characters",
            _image(sheet, "mistakes"),
            spell(hardest),
        )


def _read_table(verdict: Verdict, run_id: str, name: str) -> pd.DataFrame | None:
    content = read_artifact(verdict.experiment.uri, run_id, f"test/{name}.csv")
    characters = dict.fromkeys(("true", "predicted", "character"), "str")  # a 4 is a character here
    return None if content is None else pd.read_csv(io.BytesIO(content), dtype=characters)


def _image(png: bytes, name: str) -> Markup:
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(name, base64.b64encode(png).decode())
