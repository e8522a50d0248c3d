"""Has every node that is up train each net for a step, before anything is recorded."""

from collections.abc import Sequence
from typing import Any

from grid.config import InputError, TrialConfig
from grid.parts.files import PartsFile, load, loaded
from grid.plan.packing import Packing
from grid.train.canary import try_steps
from grid.tune import connection


def try_nodes(
    trials: Sequence[TrialConfig],
    image_shape: tuple[int, int, int],
    classes: int,
    packing: Packing,
    *,
    connected: bool = True,
) -> None:
    """Raise unless one trial of each net takes a step on every node that will train.

    Args:
        trials: Those of each net that are tried are the first.
        image_shape: Channels, height and width of the images.
        classes: Number of classes.
        packing: Where trials run.
        connected: Whether Ray is; otherwise they are tried in this process.

    Raises:
        InputError: A net can't take a step; one line for each node.
    """
    by_model: dict[str, TrialConfig] = {}
    for trial in trials:
        by_model.setdefault(trial.model, trial)
    firsts = list(by_model.values())
    if not connected:
        problem = try_steps(firsts, image_shape, classes)
        problems = {"this machine": problem} if problem else {}
    else:
        found = connection.call_on_nodes(_try_there, loaded(), firsts, image_shape, classes, packing=packing)
        problems = {name: problem for name, problem in found.items() if problem}
    if problems:
        raise InputError("\n".join(f"{name} {problem}" for name, problem in problems.items()))


def _try_there(files: Sequence[PartsFile], *arguments: Any) -> str:
    """Try in a worker, which does not know the parts files yet."""
    load(files)
    return try_steps(*arguments)
