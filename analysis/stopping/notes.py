"""Says in sentences what an audit's figures mean, what is missing from them, and which levels the rungs treat badly."""

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.stopping.bounds import MIN_FOR_INTERVAL
from analysis.stopping.verdicts import WITHIN, has_verdicts, held_back
from grid.config import STEP_PARTS
from grid.wording import count


def describe_rule(
    classified: pd.DataFrame,
    rungs: Sequence[int],
    factor: int,
    within: Sequence[str],
    agreement: float,
    decided: int,
) -> Iterator[str]:
    """Yield what the rule was, and how its verdicts on controls are known.

    Args:
        classified: The trials, as the figures of an audit are made of them.
        rungs: Epochs at which trials were stopped; empty for none.
        factor: One trial in this many continued; 1 for no stopping.
        within: Trials were compared with those that have the same levels of these factors.
        agreement: Share of the trials about which the replayed rule agrees with ASHA.
        decided: Number of these trials; 0 if nothing is replayed.
    """
    if not rungs:
        budget = count(int(classified["epochs"].iloc[0]), "epoch")
        yield f"no rung below the budget of {budget}: no trial was stopped, so nothing can be lost"
        return
    if factor == 1:
        yield "the grid was trained without early stopping: no trial was stopped, so nothing can be lost"
        return
    rule = f"at each rung the best 1 in {factor} of {_whose(within)} trials that reached it continue"
    if has_verdicts(classified):
        yield f"{rule}; ASHA's verdict on controls is recorded, and those it would have stopped count at no later rung"
        return
    agreed = f"; the two agree on {agreement:.0%} of {count(decided, 'trial')}" if decided else ""
    yield (
        f"the rule is replayed: {rule}; controls and diverged trials count, as in ASHA; ASHA itself compared each "
        f"trial with earlier arrivals only{agreed}"
    )


def _whose(within: Sequence[str]) -> str:
    """Return the genitive of the group in which trials are compared."""
    if not within:
        return "all"
    return "a model's" if tuple(within) == WITHIN else f"a {' x '.join(within)} group's"


def describe_gaps(
    classified: pd.DataFrame, rungs: Sequence[int], factor: int, within: Sequence[str], confidence: float
) -> Iterator[str]:
    """Yield what the tables mean, what is missing from them, and which levels the rungs treat badly.

    Args:
        classified: As for `describe_rule`, as are the next three.
        rungs: See there.
        factor: See there.
        within: See there.
        confidence: That no level is named if all continue alike.
    """
    if not rungs or factor == 1:
        return
    yield from _control_notes(classified[classified["control"]])
    for name, trials in classified.groupby("row"):
        if not trials["survived"].any():
            yield f"{name}: no completed trial that the rule would not have stopped, so there is no winner yet"
        if classified["ended_control"].any() and not trials["ended_control"].any():
            yield f"{name}: no control has completed or diverged, so the cost of stopping is unknown"
    for column, noun in (("seed", "seed"), ("lr_scale", "learning-rate scale")):
        if (values := classified[column].nunique()) > 1:
            yield f"{count(values, noun)}: every trial counts, because each was stopped or not individually"
    yield from _level_notes(classified, rungs, within, confidence)


def _level_notes(
    classified: pd.DataFrame, rungs: Sequence[int], within: Sequence[str], confidence: float
) -> Iterator[str]:
    for row in held_back(classified, classified["verdict"], rungs, confidence).to_dict("records"):
        level = f"{row['factor']}={row['level']}"
        remedies = [f"--stop-within {','.join([*within, row['factor']])}"]
        remedies += [f"--grace {later}" for later in rungs[rungs.index(row["rung"]) + 1 :][:1]]
        yield (
            f"after epoch {row['rung']} only {row['rate']:.0%} of {level} continued, but {row['others']:.0%} of the "
            "others: the ranking says little about it; what it is worth at the end is what analysis.effects estimates; "
            f"if it only starts slowly, {' or '.join(remedies)} gives it a chance"
        )
    alike = [rung for rung in rungs if rung * STEP_PARTS <= classified["epochs"].iloc[0]]
    if alike and {"constant", "step"} <= set(classified["lr_schedule"]):
        yield (
            f"lr_schedule=constant and step are the same procedure for the first 1/{STEP_PARTS} of the budget: what "
            f"differs between them after epoch {', '.join(map(str, alike))} is chance"
        )


def _control_notes(controls: pd.DataFrame) -> Iterator[str]:
    if controls.empty:
        yield "no unstopped controls: the cost of stopping is unknown; run grid.run with --controls 0.05 next time"
        return
    ended = controls[controls["ended_control"]]
    yield (
        "unstopped controls were drawn at random, so they show how stopped trials would have ended; a false stop is a "
        "control that the rule would have stopped and that ended above the median of the survivors with which it is "
        "compared (completed trials that were not stopped)"
    )
    if without_end := len(controls) - len(ended):
        yield f"left out: {without_end} of {count(len(controls), 'control')}, which failed or were stopped after all"
    if diverged := int((ended["status"] == "diverged").sum()):
        before = int(((ended["status"] == "diverged") & ended["verdict"].notna()).sum())
        yield (
            f"{diverged} of {count(len(ended), 'control')} diverged: they rank lowest and are never false stops; the "
            f"rule would have stopped {before} of them before"
        )
    if ended["row"].value_counts().lt(MIN_FOR_INTERVAL).any():
        yield f"a rank correlation of fewer than {MIN_FOR_INTERVAL} controls has no interval"
