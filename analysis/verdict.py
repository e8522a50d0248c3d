"""All results of an experiment, and its headline: what to use, what matters at the end, what stopping cost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from analysis.audit import summarise_loss
from analysis.estimates.cells import rank_cells
from analysis.estimates.final_effects import FinalEffects, measure_experiment
from analysis.estimates.rung_effects import RungEffects, measure_rung_effects
from analysis.formatting import sentence
from analysis.stopping.figures import Audit, audit_experiment
from analysis.store import Experiment
from grid.config import InputError, cell_name, factors_among
from grid.metrics import recorded_rungs
from grid.wording import count

SHOWN_SHIFTS = 2
"""Factors whose change between the first rung and the end is named."""
ALIKE = 0.8
"""Correlation of the effects after the first rung with those at the end from which on the two look alike."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fact:
    """One answer of the headline."""

    question: str
    answer: str
    remark: str
    details: tuple[str, ...] = ()
    """One sentence each, shown as a list."""
    kind: str = ""
    """Its name in the page: `use`, `matters`, `fast`, `stopping` or `scope`."""


@dataclass(frozen=True)
class Unavailable:
    """Stands for a result that the trials do not yield."""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """An experiment and its results."""

    experiment: Experiment
    cells: pd.DataFrame
    """From `analysis.estimates.cells.rank_cells`."""
    effects: FinalEffects | Unavailable = Unavailable("not measured")
    """At the end of training, from all trials."""
    first: RungEffects | Unavailable | None = None
    """After the first rung: who learns fast. None if there is no rung below the budget."""
    audit: Audit | Unavailable = Unavailable("not audited")


def analyse(experiment: Experiment) -> Verdict:
    """Rank the cells, measure the effects and audit early stopping.

    Raises:
        InputError: The trials have different budgets.
    """
    trials = experiment.trials
    cells = rank_cells(trials, experiment.finalists, val_images=experiment.val_images)
    effects = _attempt(lambda: measure_experiment(experiment))
    has_rung = any(rung < trials["epochs"].max() for rung in recorded_rungs(trials.columns))
    first = _attempt(lambda: measure_rung_effects(trials)) if has_rung else None
    return Verdict(experiment, cells, effects, first, _attempt(lambda: audit_experiment(experiment)))


def _attempt(measure: Callable[[], Result]) -> Result | Unavailable:
    try:
        return measure()
    except InputError as error:
        return Unavailable(str(error))


def headline(verdict: Verdict) -> Iterator[Fact]:
    """Yield the main results, each in a few sentences."""
    yield _winner(verdict)
    if isinstance(verdict.effects, FinalEffects):
        yield what_matters(verdict.effects)
        if isinstance(verdict.first, RungEffects):
            yield _who_learns_fast(verdict.first, verdict.effects)
    elif len(verdict.cells) > 1:
        yield Fact("Matters at the end", "unknown", sentence(verdict.effects.reason), kind="matters")
    if isinstance(verdict.audit, Audit):
        yield _what_stopping_cost(verdict.audit)
    yield _scope(verdict.experiment)


def name_of(cell: Mapping[Any, Any]) -> str:
    """Return the name of a cell, given as a row of the ranking or of the trials."""
    return cell_name({factor: str(cell[factor]) for factor in factors_among(cell.keys())})


def _winner(verdict: Verdict) -> Fact:
    cells, question = verdict.cells, "Use"
    if not len(cells):
        return Fact(question, "nothing yet", "No trial has an accuracy: all diverged or failed.", kind="use")
    best = cells.iloc[0]
    seeds = "one seed" if best["seeds"] == 1 else f"{best['seeds']} {'new ' * (best['tier'] == 'finalist')}seeds"
    details = [f"{best['val_accuracy']:.2%} of the validation images ({seeds}{_margins(best, '')})."]
    if not pd.isna(best["test_accuracy_as_validated"]):
        margins = _margins(best, "test_").removeprefix("; ")
        details.append(f"{best['test_accuracy_as_validated']:.2%} on the test set{f' ({margins})' if margins else ''}.")
    details.append(_lead(cells))
    if best["tier"] != "finalist" and len(cells) > 1:
        details.append(
            f"As the best of {count(len(verdict.experiment.trials), 'trial')} it was partly lucky: expect less of "
            "another seed. grid.confirm trains the best again on new seeds, and tests them."
        )
    details += _spared_winners(cells)
    return Fact(question, name_of(best.to_dict()), "", tuple(details), kind="use")


def _spared_winners(cells: pd.DataFrame) -> list[str]:
    """Say which unstopped control ended above the best cell, though ASHA would have stopped it."""
    best = cells.iloc[0]
    ends = cells["controls_end"].astype(float)
    if best["tier"] == "finalist" or not (ends > best["val_accuracy"]).any():
        return []
    higher = cells.assign(end=ends).dropna(subset="end").sort_values("end").to_dict("records")[-1]
    return [
        f"{name_of(higher)}, an unstopped control that early stopping would have ended, reached "
        f"{ends.max():.2%}: train it again before you choose."
    ]


def _margins(best: "pd.Series[Any]", prefix: str) -> str:
    """Return how far an accuracy may be off for another seed and for other images."""
    kinds = {"seed_half": "for another seed", "image_half": "for other images"}
    known = [
        f"±{100 * best[prefix + name]:.1f} {kind}" for name, kind in kinds.items() if not pd.isna(best[prefix + name])
    ]
    return "; " + ", ".join(known) if known else ""


def _lead(cells: pd.DataFrame) -> str:
    """Say how certain the first place is."""
    best = cells.iloc[0]
    if len(cells) == 1:
        return "It is the only cell."
    rivals = cells[(cells["tier"] == best["tier"]) & (cells["epochs_run"] == best["epochs_run"])]
    if len(rivals) == 1:
        return "No other cell trained for as many epochs."
    ahead = f"It is {100 * (best['val_accuracy'] - rivals['val_accuracy'].iloc[1]):.2f} points above the next"
    margins = _margins(rivals.iloc[1], "behind_").removeprefix("; ")
    ahead += f" ({margins}, on the same seeds and images)" if margins else ""
    tied = int(rivals["tied"].sum()) - 1
    if tied > 0:
        return f"{ahead}; {count(tied, 'other')} may be as good."
    if pd.isna(best["low"]):
        return f"{ahead}. How certain that is remains unknown: the store does not say how many images validate."
    return f"{ahead}, more than chance explains."


def what_matters(effects: FinalEffects) -> Fact:
    """Return which factors matter at the end of training, the largest difference first, and which do not."""
    largest = effects.differences.drop_duplicates("factor")
    sure = largest[largest["sure"]].sort_values("difference", ascending=False, kind="stable")
    rest = largest[~largest["sure"]].sort_values("difference", ascending=False, kind="stable")
    lines = [_difference(effects, row) for row in sure.to_dict("records")]
    lines += [_bound(effects, factor) for factor in rest["factor"]]
    lines += _pairs(effects)
    question = f"Matters at the end ({count(effects.epochs, 'epoch')})"
    return Fact(question, ", ".join(sure["factor"]) or "nothing for sure", "", tuple(lines), kind="matters")


def _bound(effects: FinalEffects, factor: str) -> str:
    """Say how much a factor can matter at most."""
    largest = effects.differences.loc[effects.differences["factor"] == factor, "high"].max()
    if pd.isna(largest):
        return f"{factor}: too few trials to say"
    return f"{factor}: less than {100 * largest:.1f} points between any two levels"


def _difference(effects: FinalEffects, row: Mapping[Any, Any]) -> str:
    """Say how the best level of a factor compares with the worst one, and which others may be as good."""
    half = 50 * (row["high"] - row["low"])
    text = (
        f"{row['factor']}: {row['level']} over {row['other_level']}, {100 * row['difference']:.1f} ±{half:.1f} points"
    )
    of_factor = effects.differences[effects.differences["factor"] == row["factor"]]
    of_best = of_factor[(of_factor["level"] == row["level"]) & ~of_factor["sure"]]
    others = ", ".join(of_best.sort_values("difference")["other_level"])
    return f"{text}; {others} may be as good as {row['level']}" if others else text


def _pairs(effects: FinalEffects) -> list[str]:
    found = effects.interactions[effects.interactions["stands_out"].astype(bool)]
    if found.empty:
        return ["no pair of levels stands out beyond the sum of its two effects"] if len(effects.interactions) else []
    best = found.sort_values("effect", key=abs).to_dict("records")[-1]
    others = len(found.drop_duplicates(["factor", "other_factor"])) - 1
    more = f"; {count(others, 'weaker interaction')} more" if others else ""
    return [
        f"{best['factor']}={best['level']} with {best['other_factor']}={best['other_level']}: "
        f"{100 * best['effect']:+.1f} points beyond the sum of both{more}"
    ]


def _who_learns_fast(first: RungEffects, end: FinalEffects) -> Fact:
    """Compare the effects after the first rung with those at the end."""
    both = first.levels.merge(end.levels, on=["factor", "level"], suffixes=("_first", "_end"))
    both = both.dropna(subset=["effect_first", "effect_end"])
    spread = both[["effect_first", "effect_end"]].std().min()
    correlation = float(np.corrcoef(both["effect_first"], both["effect_end"])[0, 1]) if spread > 0 else np.nan
    moved = both.assign(change=(both["effect_first"] - both["effect_end"]).abs())
    widest = moved.sort_values("change", ascending=False).drop_duplicates("factor").head(SHOWN_SHIFTS)
    shifts = [
        f"{row['factor']}={row['level']} {100 * row['effect_first']:+.1f} points then, "
        f"{100 * row['effect_end']:+.1f} at the end"
        for row in widest.to_dict("records")
    ]
    alike = correlation >= ALIKE
    lesson = "" if alike else " Who learns fast is not who ends well."
    remark = f"Correlation of the effects then with those at the end: {correlation:.2f}.{lesson}"
    answer = "it looked much the same" if alike else "it looked different"
    return Fact(f"After epoch {first.epoch}", answer, remark, tuple(shifts), kind="fast")


def _what_stopping_cost(audit: Audit) -> Fact:
    if not audit.rungs or audit.factor == 1:
        return Fact("Early stopping", "none", "Every trial had the full budget.", kind="stopping")
    savings = audit.savings
    saved = (savings["saved"] * savings["epochs_full"]).sum() / max(1, savings["epochs_full"].sum())
    lost = [sentence(loss) for loss in summarise_loss(audit)]
    unknown = "What it cost is unknown: no unstopped control that ASHA would have stopped has completed."
    return Fact("Early stopping", f"saved {saved:.0%} of the epochs", "" if lost else unknown, tuple(lost), "stopping")


def _scope(experiment: Experiment) -> Fact:
    """Say what the results hold for, and what may not be concluded."""
    data = experiment.described("data")
    per_class = data.get("per_class")
    images = f"{per_class} images per class" if isinstance(per_class, int) else "all training images"
    epochs = count(int(experiment.trials["epochs"].max()), "epoch")
    name = data.get("name")
    answer = f"{name}, {images}, {epochs}" if isinstance(name, str) else f"these images, {epochs}"
    return Fact("Holds for", answer, "", tuple(_limits(experiment)), kind="scope")


def _limits(experiment: Experiment) -> Iterator[str]:
    """Yield what may not be concluded."""
    scales = experiment.trials["lr_scale"].nunique()
    if scales > 1:
        yield f"Each cell was trained with {scales} learning-rate scales; other rates may change the order."
    else:
        yield "One base learning rate per optimizer: what needs another rate may look worse than it is."
    yield (
        "The intervals of effects say what another seed would change. They do not cover other images, data sets, "
        "networks or longer training."
    )
