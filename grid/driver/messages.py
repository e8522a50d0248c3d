"""What a person reads before a grid starts and after it has ended, as plain values; `print_facts` prints them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grid.driver.progress import top_table
from grid.driver.watcher import Watcher
from grid.masking import mask
from grid.plan.asha import StoppingRule
from grid.plan.budget import EXHAUSTED
from grid.plan.controls import FEWEST
from grid.plan.forecast import Forecast
from grid.plan.packing import Packing
from grid.plan.request import Place, Request, resume_command
from grid.plan.trials import Plan
from grid.record.store import Store
from grid.recorded import describe_unreadable
from grid.store_uri import is_default
from grid.wording import count, format_seconds


def describe_plan(request: Request, plan: Plan) -> dict[str, str]:
    """Return what is trained: the grid, its trials, their budget."""
    levels = " x ".join(str(len(levels)) for levels in request.levels.values() if len(levels) > 1)
    facts = {"grid": f"{request.grid}: {f'{levels} levels, ' if levels else ''}{count(len(plan.cells), 'cell')}"}
    if plan.excluded:
        facts["excluded"] = "; ".join(f"{count(cells, 'cell')}: {reason}" for reason, cells in plan.excluded.items())
    facts["trials"] = (
        f"{len(plan.trials):,} = cells x {count(request.seeds, 'seed')} x "
        f"{count(len(request.lr_scales), 'lr scale')}; {_describe_controls(request, plan)}"
    )
    if request.settings:
        facts["settings"] = ", ".join(f"{name}={value}" for name, value in request.settings.items())
    facts["budget"] = f"{count(request.epochs, 'epoch')}; {_describe_rule(plan.rule, request.epochs)}"
    if not is_default(request.store):
        facts["store"] = mask(request.store)
    return facts


def _describe_controls(request: Request, plan: Plan) -> str:
    controls = count(len(plan.controls), "unstopped control")
    if not plan.control_chance:
        return controls
    raised = plan.control_chance * len(plan.trials) > request.controls * len(plan.trials) + 1
    least = f", at least {FEWEST} or a third of the trials" if raised else ""
    return f"{controls} (a chance of {plan.control_chance:.1%} each{least})"


def _describe_rule(rule: StoppingRule, epochs: int) -> str:
    if rule.factor == 1:
        return "no early stopping"
    rungs = ", ".join(map(str, rule.rungs(epochs)))
    if not rungs:
        return "too short for early stopping"
    whose = f"of each {' x '.join(rule.within)} the best" if rule.within else "the best"
    return f"{whose} 1/{rule.factor} continue after epoch {rungs}"


def describe_left_out(store: Store) -> dict[str, str]:
    """Return which of the recorded runs are left out because somebody has edited them, and why; nothing if none is."""
    reasons = describe_unreadable(store.left_out, "run")
    return {"left out": "; ".join(reason.replace(" left out", "") for reason in reasons)} if reasons else {}


def describe_packing(packing: Packing) -> dict[str, str]:
    """Return where trials run, how many at once, and why."""
    facts = {"where": packing.machines, "at once": f"{packing} ({packing.reason})"}
    return facts | ({"note": packing.note} if packing.note else {})


def describe_cost(cost: Forecast, timed_on: str, packing: Packing, price_per_hour: float | None) -> dict[str, str]:
    """Return what a grid is expected to take.

    Args:
        cost: The forecast.
        timed_on: Where the trials were timed that it is based on.
        packing: How trials share the machines.
        price_per_hour: Of all machines together; None leaves the price out.
    """
    saved = 1 - cost.epochs / cost.full_epochs
    hours = cost.seconds / 3600
    facts = {
        "epochs": f"{cost.epochs:,.0f} expected of {cost.full_epochs:,} ({saved:.0%} saved by early stopping)",
        "time": f"{format_seconds(cost.seconds)}, timed on {timed_on} (cells vary by {cost.spread:.0%})",
    }
    if packing.gpus_per_trial:
        facts["GPU-hours"] = f"{hours * packing.concurrency * packing.gpus_per_trial:,.1f}"
    if price_per_hour is not None:
        facts["price"] = f"{hours * price_per_hour:,.2f} at {price_per_hour:g} per hour"
    return facts


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and their facts, one per line."""
    for name, text in facts.items():
        print(f"{name:<9}  {text}", flush=True)


@dataclass(frozen=True)
class Conclusion:
    """How a run of `grid.run` ended."""

    exit_code: int
    table: str
    """The best cells."""
    complaints: Sequence[str] = ()
    """For stderr: what went wrong, and the command that continues."""
    next_commands: Mapping[str, str] | None = None
    """What to look at next; None if the run ended early."""


def conclude(request: Request, watcher: Watcher, undelivered: str) -> Conclusion:
    """Return how a run ended and what its user should know.

    Args:
        request: What the user asked for.
        watcher: How the trials ended.
        undelivered: Why not everything has reached the store; empty if it has.
    """
    summaries = list(watcher.summaries.values())
    table = top_table(summaries)
    complaints = [*_survived(watcher), *_undelivered(request, undelivered)]
    if watcher.problem:
        hint = f"{watcher.problem}; free disk space, then continue with:  {resume_command()}"
        return Conclusion(1, table, [*complaints, hint])
    if watcher.unusable:
        return Conclusion(1, table, [*complaints, f"{watcher.unusable}; then continue with:  {resume_command()}"])
    if watcher.interrupted:
        return Conclusion(130, table, [*complaints, f"interrupted; continue with:  {resume_command()}"])
    if watcher.exhausted and len(summaries) < watcher.total:
        return Conclusion(EXHAUSTED, table, [*complaints, _explain_budget(request, watcher)], _next_commands(request))
    failed = any(summary.status == "failed" for summary in summaries)
    exit_code = 1 if failed or undelivered or len(summaries) < watcher.total else 0
    return Conclusion(exit_code, table, complaints, _next_commands(request))


def _explain_budget(request: Request, watcher: Watcher) -> str:
    spent, left = request.budget.describe(watcher.spent), count(watcher.total - len(watcher.summaries), "trial")
    option = watcher.exhausted.partition(" ")[0]
    return f"{watcher.exhausted} is reached ({spent}); a larger {option} trains the {left} left:  {resume_command()}"


def experiment_options(place: Place) -> str:
    """Return the options that name an experiment in this folder, without secrets and without the default store."""
    store = [] if is_default(place.store) else ["--store", mask(place.store)]
    return shlex.join(["--experiment", place.experiment, *store])


def _survived(watcher: Watcher) -> list[str]:
    return [f"{problem} ({count(times, 'time')})" for problem, times in watcher.notices.items()]


def _undelivered(request: Request, reason: str) -> list[str]:
    if not reason:
        return []
    replay = f"python -m grid.record --replay {experiment_options(request)}"
    return [
        f"not everything has reached {mask(request.store)}: {reason}",
        f"the rest is kept in {request.spool}; deliver it with:  {replay}",
    ]


def _next_commands(request: Request) -> dict[str, str]:
    experiment, address = experiment_options(request), shlex.quote(mask(request.store))
    is_default = request.data_dir == Path("data").absolute()
    data_dir = "" if is_default else f" --data-dir {shlex.quote(str(request.data_dir))}"
    parts = "".join(f" --parts {shlex.quote(str(file))}" for file in request.parts)
    server = f"mlflow server --host 127.0.0.1 --backend-store-uri {address}"
    return {
        "ranking": f"python -m analysis.rank {experiment}",
        "all runs": address if request.store.startswith("http") else server,
        "finalists": f"python -m grid.confirm {experiment}{data_dir}{parts}",
    }
