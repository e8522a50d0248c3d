"""How fast trials are that share one device: measured with real ones, each a process of its own as in a grid."""

import multiprocessing
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from grid.config import TrialConfig
from grid.data.dataset import DataShape
from grid.parts.files import PartsFile, load, loaded
from grid.plan.packing import Sharing
from grid.train.hardware import keep_freed_memory, numeric_settings, one_thread
from grid.train.trial import DeviceData, Trial, random_data

SECONDS = 1.5
"""Of training, for each number of trials."""
PATIENCE_SECONDS = 300.0
"""How long all of it may take, the import of torch in every process included; what is known by then has to do."""
FEW_IMAGES = 1280
"""In an epoch that is timed: on more, an epoch takes longer, but an image does not."""
GONE_SECONDS = 5.0
"""How long a process may take to end."""
LONGER = 10_000
"""Epochs that may be timed: a schedule has an end."""
ROOM = 0.9
"""Share of a GPU's free memory that trials may take."""
OWN_BYTES = 3 * 2**29
"""Of a GPU, that this process may hold: a context. More is held by other programs."""


class NotMeasuredError(Exception):
    """A process that was to train for the measurement ended, or did not answer."""


def measure_sharing(trials: Sequence[TrialConfig], shape: DataShape, most: int) -> Sharing:
    """Measure how fast trials are that share the first device of this machine.

    Args:
        trials: One or a few for each net. Memory is that of the hungriest, speed that of the slowest.
        shape: Of the data that they train on.
        most: Trials at once that are of interest.

    Raises:
        NotMeasuredError: Not even one of them trains, or other programs use the device.
    """
    device = trials[0].device
    deadline = time.monotonic() + PATIENCE_SECONDS
    _check_idle(device)
    with ExitStack() as stack:
        before = _free_bytes(device)
        first = _Child(stack, trials, shape, deadline)
        slowest = first.answer()
        left = _free_bytes(device)
        if device == "cuda" and left >= before:
            raise NotMeasuredError("other programs use its memory")
        more = min(most - 1, int(ROOM * left / (before - left))) if left < before else most - 1
        others = [_Child(stack, trials[slowest : slowest + 1], shape, deadline) for _ in range(more)]
        speeds = _speeds([first, *(child for child in others if child.is_ready())])
    return Sharing(speeds, before - left, _cpu_speed(trials[slowest], shape))


def _speeds(children: Sequence["_Child"]) -> dict[int, float]:
    """Return the speed of 1, 2, 4 and more of them at once, as far as they answer in time."""
    speeds: dict[int, float] = {}
    for number in _doubling(len(children)):
        try:
            for child in children[:number]:
                child.train()
            speeds[number] = sum(child.answer() for child in children[:number])
        except (NotMeasuredError, OSError):
            if not speeds:
                raise
            break
    return speeds


def _doubling(most: int) -> list[int]:
    """Return 1, 2, 4 and so on, and `most`."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


class _Child:
    """A process that trains on request; it ends with the stack."""

    def __init__(
        self,
        stack: ExitStack,
        trials: Sequence[TrialConfig],
        shape: DataShape,
        deadline: float,
    ):
        self._deadline = deadline
        context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_train_on_request, args=(theirs, loaded(), trials, shape), daemon=True)
        process.start()
        theirs.close()  # so that the death of the process is seen
        stack.callback(process.join, GONE_SECONDS)  # not for ever: a process may be stuck in a driver
        stack.callback(process.kill)
        stack.callback(process.join, GONE_SECONDS)
        stack.callback(self._connection.close)

    def train(self) -> None:
        """Ask for `SECONDS` of training."""
        self._connection.send(SECONDS)

    def answer(self) -> Any:
        """Return what the process says next.

        Raises:
            NotMeasuredError: It has failed, or says nothing.
        """
        try:
            waits = max(0.0, self._deadline - time.monotonic())
            found = self._connection.recv() if self._connection.poll(waits) else "does not answer in time"
        except EOFError:
            found = "has died"
        if isinstance(found, str):
            raise NotMeasuredError(found)
        return found

    def is_ready(self) -> bool:
        """Wait until it has trained for the first time; return whether it could."""
        try:
            self.answer()
        except NotMeasuredError:
            return False
        return True


def _train_on_request(
    connection: Connection,
    files: Sequence[PartsFile],
    trials: Sequence[TrialConfig],
    shape: DataShape,
) -> None:
    """Say which of the trials is the slowest, then train it for as long as asked, again and again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the process that asked
    try:
        torch.set_num_threads(1)
        keep_freed_memory()
        load(files)
        everything = random_data(shape.train_images, shape.image, shape.classes, trials[0].device)  # takes its memory
        data = _first(everything, max(FEW_IMAGES, 2 * trials[0].batch_size))
        seconds = [_epoch_seconds(trial, data) for trial in trials]
        if all(isinstance(each, str) for each in seconds):
            connection.send(seconds[0])
            return
        slowest = max(range(len(trials)), key=lambda index: -1 if isinstance(seconds[index], str) else seconds[index])
        training = _begun(trials[slowest], data)
        connection.send(slowest)
        while True:
            connection.send(_speed(training, connection.recv()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  (whatever a driver or torch raises)
        connection.send(f"{type(error).__name__}: {error}")


def _epoch_seconds(trial: TrialConfig, data: DeviceData) -> float | str:
    """Return how long an epoch takes, or why there is none; one cell may fail without its net."""
    try:
        return _begun(trial, data).run_epoch().epoch_seconds
    except Exception as error:  # noqa: BLE001  (whatever a net, a driver or torch raises)
        return f"{type(error).__name__}: {error}"


def _begun(trial: TrialConfig, data: DeviceData) -> Trial:
    """Return a training after its first epoch, which allocates memory and compiles kernels."""
    training = Trial(replace(trial, epochs=LONGER), data)
    training.run_epoch()
    return training


def _first(data: DeviceData, images: int) -> DeviceData:
    few = max(1, images // 6)
    return replace(
        data,
        train_images=data.train_images[:images],
        train_labels=data.train_labels[:images],
        val_images=data.val_images[:few],
        val_labels=data.val_labels[:few],
    )


def _speed(training: Trial, seconds: float) -> float:
    """Train whole epochs until some seconds have passed; return training images per second."""
    epochs, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < seconds:
        training.run_epoch()
        epochs += 1
    return epochs * len(training.data.train_labels) / taken


def _cpu_speed(trial: TrialConfig, shape: DataShape) -> float:
    """Return training images per second of one thread of a CPU; 0 if none trains this net."""
    params = {**trial.to_params(), **numeric_settings("cpu"), "epochs": f"{LONGER}"}
    images = random_data(min(shape.train_images, 4 * trial.batch_size), shape.image, shape.classes)
    with one_thread():
        try:
            return _speed(_begun(TrialConfig.from_params(params), images), SECONDS)
        except Exception:  # noqa: BLE001  (a net of the user may need a GPU)
            return 0.0


def _free_bytes(device: str) -> int:
    """Return the free memory of the first GPU; 0 on CPUs."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def _check_idle(device: str) -> None:
    """Free what this process holds of the first GPU; raise if other programs hold much of it."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        if total - free > OWN_BYTES:
            raise NotMeasuredError(f"other programs hold {(total - free) / 2**30:.1f} GiB of its memory")
