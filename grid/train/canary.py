"""One real training step of each net, on the device that is to train, before anything is recorded.

A driver that is too old, a GPU without kernels in this torch, too little memory or a net that can't take these images
would otherwise show as a grid of failed trials.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from grid.config import TrialConfig
from grid.data.dataset import DataShape
from grid.train.device_errors import DeviceError
from grid.train.hardware import precision_problem
from grid.train.trial import Trial, random_data
from grid.wording import first_line

STEPS = 2
LONGER = 100
"""Epochs on top of the budget, so that a schedule has as many steps as on more images."""
CPU_HINT = "or pass --device cpu"


def try_steps(trials: Iterable[TrialConfig], shape: DataShape) -> str:
    """Return why a net can't be trained in this process; empty if all can.

    What a device lacks counts at once. Another error counts if no trial of its net gets through: a single cell that
    fails is recorded as failed.

    Args:
        trials: One or a few for each net.
        shape: Of the data. A batch has no more than its training images.
    """
    errors: dict[str, str] = {}
    sound: set[str] = set()
    for trial in trials:
        if problem := precision_problem(trial.device, trial.precision):
            return problem
        try:
            number = STEPS * max(1, min(trial.batch_size, shape.train_images))
            images = random_data(number, shape.image, shape.classes, trial.device)
            longer = replace(trial, epochs=trial.epochs + LONGER, batch_size=max(2, number // STEPS))
            Trial(longer, images).run_epoch()
        except Exception as error:  # noqa: BLE001  (whatever a net, a driver or torch raises)
            failure = DeviceError.of(error)
            if failure is not None:
                return _explain(failure, trial)
            errors.setdefault(trial.model, f"{type(error).__name__}: {first_line(error)}")
        else:
            sound.add(trial.model)
    for model, reason in errors.items():
        if model not in sound:
            return f"can't train model '{model}' for a single step ({reason}); see python -m grid.check"
    return ""


def _explain(failure: DeviceError, trial: TrialConfig) -> str:
    low = str(failure).lower()
    if failure.out_of_memory:
        what = f"has too little memory for one trial of model '{trial.model}' ({failure})"
        return f"{what}; a grid can have a smaller batch_size (--set), {CPU_HINT}"
    if "no kernel image" in low:
        return f"has a GPU for which torch {torch.__version__} has no kernels; install a torch that has, {CPU_HINT}"
    if "nvidia driver" in low:
        built = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        return f"has an NVIDIA driver that {built} can't use ({failure}); update it, {CPU_HINT}"
    return f"has a device that fails ({failure}); look at nvidia-smi and dmesg, {CPU_HINT}"
