"""Has every node that is up train each net for a step, and measures how trials share its GPU, before anything runs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grid.config import InputError, TrialConfig
from grid.data.dataset import DataShape
from grid.plan.packing import Packing, Sharing, most_per_gpu, pack_as_measured
from grid.plan.sharing import NotMeasuredError, measure_sharing
from grid.train.canary import try_steps
from grid.tune import connection
from grid.wording import count, first_line


def try_nodes(
    trials: Sequence[TrialConfig],
    shape: DataShape,
    packing: Packing,
    *,
    connected: bool = True,
) -> Packing:
    """Raise unless a trial of each net takes a step on every node that will train.

    Args:
        trials: The first and the last one of each net are tried.
        shape: Of the data that they train on.
        packing: Where trials run.
        connected: Whether Ray is; otherwise they are tried in this process.

    Returns:
        How trials share the machines, by what was measured on their GPUs.

    Raises:
        InputError: A net can't take a step; one line for each node.
    """
    by_model: dict[str, list[TrialConfig]] = {}
    for trial in trials:
        by_model.setdefault(trial.model, []).append(trial)
    tried = [trial for of_model in by_model.values() for trial in dict.fromkeys((of_model[0], of_model[-1]))]
    arguments = tried, shape
    if connected:
        said = connection.call_on_nodes(try_steps, *arguments, packing=packing, failing="can't train a step")
        problems = {f"node {name}": problem for name, problem in said.items()}
    else:
        problems = {"this machine": try_steps(*arguments)}
    if any(problems.values()):
        raise InputError("\n".join(f"{name} {problem}" for name, problem in problems.items() if problem))
    if not packing.gpus_per_trial:
        return packing
    measured: dict[str, Sharing | str]
    if connected:
        failing = "can't measure how trials share a GPU"
        found = connection.call_on_nodes(_measure, *arguments, most_per_gpu(packing), packing=packing, failing=failing)
        measured = {f"node {name}": sharing for name, sharing in found.items()}
    else:
        measured = {"this machine": _measure(*arguments, most_per_gpu(packing))}
    return _pack_again(packing, measured)


def _pack_again(packing: Packing, measured: Mapping[str, Sharing | str]) -> Packing:
    """Return how trials share GPUs by what was measured, by machine; say of which it is not known, and why."""
    for name, found in measured.items():
        if isinstance(found, str):
            print(f"note: on {name} it was not measured how trials share a GPU: {found}", file=sys.stderr)
        elif (most := max(found.speeds)) < most_per_gpu(packing) and packing.wanted is not None:
            print(f"note: on {name} a GPU holds {count(most, 'trial')} at once, fewer than asked for", file=sys.stderr)
    sharings = [found for found in measured.values() if isinstance(found, Sharing)]
    return pack_as_measured(packing, sharings) if sharings else packing


def _measure(*arguments: Any) -> Sharing | str:
    """Return how trials share the GPU of this machine, or why that is not known: no reason not to train."""
    try:
        return measure_sharing(*arguments)
    except NotMeasuredError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (whatever a driver raises)
        return f"{type(error).__name__}: {first_line(error)}"
