"""Has every node that is up train each net for a step, and measures how trials share its GPU, before anything runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from grid.config import InputError, TrialConfig
from grid.parts.files import PartsFile, load, loaded
from grid.plan.packing import Packing, Sharing, most_per_gpu, pack_as_measured
from grid.plan.sharing import NotMeasuredError, measure_sharing
from grid.train.canary import try_steps
from grid.tune import connection


@dataclass(frozen=True)
class Tried:
    """What a node says of itself."""

    problem: str = ""
    """Why it can't train; empty if it can."""
    sharing: Sharing | None = None
    """How trials share its GPU."""
    unmeasured: str = ""
    """Why that is not known."""


def try_nodes(
    trials: Sequence[TrialConfig],
    image_shape: tuple[int, int, int],
    classes: int,
    train_images: int,
    packing: Packing,
    *,
    connected: bool = True,
) -> Packing:
    """Raise unless a trial of each net takes a step on every node that will train.

    Args:
        trials: The first and the last one of each net are tried.
        image_shape: Channels, height and width of the images.
        classes: Number of classes.
        train_images: Number of training images.
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
    most = most_per_gpu(packing) if packing.gpus_per_trial else 0
    arguments = tried, image_shape, classes, train_images, most
    found: dict[str, Tried | str]
    if connected:
        on_nodes = connection.call_on_nodes(_try_there, loaded(), *arguments, packing=packing)
        found = {f"node {name}": answer for name, answer in on_nodes.items()}
    else:
        found = {"this machine": _try_here(*arguments)}
    said = {name: Tried(answer) if isinstance(answer, str) else answer for name, answer in found.items()}
    if problems := [f"{name} {each.problem}" for name, each in said.items() if each.problem]:
        raise InputError("\n".join(problems))
    for name, each in said.items():
        if each.unmeasured:
            print(f"note: on {name} it was not measured how trials share a GPU: {each.unmeasured}", file=sys.stderr)
    sharings = [each.sharing for each in said.values() if each.sharing is not None]
    return pack_as_measured(packing, sharings) if sharings else packing


def _try_there(
    files: Sequence[PartsFile],
    trials: Sequence[TrialConfig],
    image_shape: tuple[int, int, int],
    classes: int,
    train_images: int,
    most: int,
) -> Tried:
    """Try in a worker, which does not know the parts files yet."""
    load(files)
    return _try_here(trials, image_shape, classes, train_images, most)


def _try_here(
    trials: Sequence[TrialConfig], image_shape: tuple[int, int, int], classes: int, train_images: int, most: int
) -> Tried:
    """Try in this process; measure how up to `most` trials share its GPU, if it has one."""
    problem = try_steps(trials, image_shape, classes, train_images)
    if problem or not most:
        return Tried(problem)
    try:
        return Tried(sharing=measure_sharing(trials, image_shape, classes, train_images, most))
    except NotMeasuredError as error:
        return Tried(unmeasured=str(error))
