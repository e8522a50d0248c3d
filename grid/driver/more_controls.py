"""Draws controls after a grid has ended, among the trials that were stopped, and opens these again.

They train from the start, as their checkpoints are gone; what the store has of them is not recorded again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from grid.config import InputError
from grid.metrics import FINAL_STATUSES
from grid.plan.controls import draw_more
from grid.plan.space import ORDER_SEED
from grid.plan.trials import Plan
from grid.record.rounds import record_rounds
from grid.record.store import Store, StoredTrial
from grid.recorded import Round
from grid.wording import count


def reopen_drawn(store: Store, stored: Mapping[str, StoredTrial], rounds: Sequence[Round]) -> dict[str, StoredTrial]:
    """Return the recorded trials, those that were drawn but have not been trained to the end as open ones.

    Args:
        store: Holds their epochs.
        stored: What it has, by trial key.
        rounds: All that were drawn.
    """
    drawn = {key for each in rounds for key in each.drawn}
    return {
        key: store.reopen(trial) if key in drawn and trial.status == "stopped" else trial
        for key, trial in stored.items()
    }


def draw_if_asked(
    wanted: int | None, plan: Plan, stored: Mapping[str, StoredTrial], store: Store, rounds: Sequence[Round]
) -> tuple[Plan, dict[str, StoredTrial], str]:
    """Draw a further round of controls, unless an earlier one is not finished.

    Args:
        wanted: How many to draw; None for none.
        plan: All trials of the grid.
        stored: From `reopen_drawn`.
        store: Where the round is recorded, before anything trains.
        rounds: All that were drawn before.

    Returns:
        The plan with the new controls, the recorded trials with those opened again, and a remark for people, empty if
        no control is left to train.

    Raises:
        InputError: The grid has not ended, no trial can be drawn, or the store does not answer.
    """
    plan = replace(plan, rounds_before=len(rounds))
    if left := sum(trial.trial_key in stored and stored[trial.trial_key].reopened for trial in plan.trials):
        later = "; run the same command again to draw more" if wanted else ""
        return plan, dict(stored), f"round {len(rounds)} has {count(left, 'control')} left to train{later}"
    if not wanted:
        return plan, dict(stored), ""
    fresh = draw_round(wanted, plan, stored, number=len(rounds) + 1, experiment=store.experiment)
    record_rounds(store, [*rounds, fresh])
    plan = replace(plan, controls=plan.controls.union(fresh.drawn), rounds_before=len(rounds) + 1)
    among = count(fresh.among, "stopped trial")
    remark = f"round {len(rounds) + 1}: {len(fresh.drawn):,} more, drawn among {among}"
    return plan, reopen_drawn(store, stored, [fresh]), remark


def draw_round(wanted: int, plan: Plan, stored: Mapping[str, StoredTrial], *, number: int, experiment: str) -> Round:
    """Draw controls among all stopped trials of an experiment, each with the same chance.

    Args:
        wanted: How many; all if there are fewer.
        plan: All trials of the grid.
        stored: What the store has, by trial key.
        number: Of the round, from 1.
        experiment: Its name.

    Raises:
        InputError: Not all trials have ended, the plan leaves some out, or none was stopped.
    """
    ended = {key for key, trial in stored.items() if trial.status in FINAL_STATUSES}
    planned = {trial.trial_key for trial in plan.trials}
    everything = planned | stored.keys()
    if left := len(everything - ended):
        share, hint = f"{left:,} of {len(everything):,} trials", "run the same command without it first"
        raise InputError(f"--more-controls draws when a grid has ended, and {share} have not; {hint}")
    if others := len(ended - planned):
        hint = "ask for the same --grid, --only, --seeds and --lr-scales"
        raise InputError(f"--more-controls draws among all of '{experiment}', and {others:,} were left out; {hint}")
    stopped = [key for key, trial in stored.items() if trial.status == "stopped"]
    if not stopped:
        raise InputError(f"--more-controls has no trial to draw: all of '{experiment}' were trained to their ends")
    return Round(len(stopped), tuple(draw_more(stopped, wanted, ORDER_SEED, number)))
