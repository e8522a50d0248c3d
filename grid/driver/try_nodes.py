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
    train_images: int,
    packing: Packing,
    *,
    connected: bool = True,
) -> None:
    """Raise unless a trial of each net takes a step on every node that will train.

    Args:
        trials: The first and the last one of each net are tried.
        image_shape: Channels, height and width of the images.
        classes: Number of classes.
        train_images: Number of training images.
        packing: Where trials run.
        connected: Whether Ray is; otherwise they are tried in this process.

    Raises:
        InputError: A net can't take a step; one line for each node.
    """
    by_model: dict[str, list[TrialConfig]] = {}
    for trial in trials:
        by_model.setdefault(trial.model, []).append(trial)
    tried = [trial for of_model in by_model.values() for trial in dict.fromkeys((of_model[0], of_model[-1]))]
    if not connected:
        problem = try_steps(tried, image_shape, classes, train_images)
        problems = {"this machine": problem} if problem else {}
    else:
        found = connection.call_on_nodes(
            _try_there, loaded(), tried, image_shape, classes, train_images, packing=packing
        )
        problems = {f"node {name}": problem for name, problem in found.items() if problem}
    if problems:
        raise InputError("\n".join(f"{name} {problem}" for name, problem in problems.items()))


def _try_there(files: Sequence[PartsFile], *arguments: Any) -> str:
    """Try in a worker, which does not know the parts files yet."""
    load(files)
    return try_steps(*arguments)
