"""One real training step of each net, on the device that is to train, before anything is recorded.

A driver that is too old, a GPU without kernels in this torch, too little memory or a net that can't take these images
would otherwise show as a grid of failed trials.
"""

from collections.abc import Iterable

import torch

from grid.config import TrialConfig
from grid.train.device_errors import DeviceError
from grid.train.hardware import precision_problem
from grid.train.trial import DeviceData, Trial
from grid.wording import first_line

STEPS = 2
CPU_HINT = "or pass --device cpu"


def try_steps(trials: Iterable[TrialConfig], image_shape: tuple[int, int, int], classes: int) -> str:
    """Return why one of some trials can't be trained in this process; empty if all can.

    Args:
        trials: One for each net.
        image_shape: Channels, height and width of the images.
        classes: Number of classes.
    """
    for trial in trials:
        if problem := precision_problem(trial.device, trial.precision):
            return problem
        try:
            images = _random_images(STEPS * trial.batch_size, image_shape, classes, trial.device)
            Trial(trial, images).run_epoch()
        except Exception as error:  # noqa: BLE001  (whatever a net, a driver or torch raises)
            failure = DeviceError.of(error)
            if failure is None:
                reason = f"{type(error).__name__}: {first_line(error)}"
                return f"can't train model '{trial.model}' for a single step ({reason}); see python -m grid.check"
            return _explain(failure, trial)
    return ""


def _explain(failure: DeviceError, trial: TrialConfig) -> str:
    low = str(failure).lower()
    if failure.out_of_memory:
        what = f"has too little memory for one trial of model '{trial.model}' ({failure})"
        return f"{what}; pass a smaller --set batch_size, {CPU_HINT}"
    if "no kernel image" in low:
        return f"has a GPU for which torch {torch.__version__} has no kernels; install a torch that has, {CPU_HINT}"
    if "driver" in low:
        built = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        return f"has an NVIDIA driver that {built} can't use ({failure}); update it, {CPU_HINT}"
    return f"has a device that fails ({failure}); look at nvidia-smi and dmesg, {CPU_HINT}"


def _random_images(number: int, image_shape: tuple[int, int, int], classes: int, device: str) -> DeviceData:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, *image_shape), dtype=torch.uint8, generator=draws).to(device)
    labels = (torch.arange(number) % classes).to(device)
    return DeviceData(images, labels, images[:1], labels[:1], classes, mean=128.0, std=74.0)
