"""How fast trials are that share one device: measured with real ones, each a process of its own as in a grid."""

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from grid.config import TrialConfig
from grid.parts.files import PartsFile, load, loaded
from grid.plan.packing import Sharing
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.trial import DeviceData, Trial, random_data

SECONDS = 1.5
"""Of training, for each number of trials."""
PATIENCE_SECONDS = 90.0
"""How long a process may take to answer; it imports torch first."""
MOST_IMAGES = 12_800
"""In an epoch that is timed: on more, an epoch takes longer, but an image does not."""
LONGER = 10_000
"""Epochs that may be timed: a schedule has an end."""
ROOM = 0.9
"""Share of a GPU's free memory that trials may take."""


class NotMeasuredError(Exception):
    """A process that was to train for the measurement ended, or did not answer."""


def measure_sharing(
    trials: Sequence[TrialConfig], image_shape: tuple[int, int, int], classes: int, train_images: int, most: int
) -> Sharing:
    """Measure how fast trials are that share the first device of this machine.

    Args:
        trials: One or a few for each net. Memory is that of the hungriest, speed that of the slowest.
        image_shape: Channels, height and width of the images.
        classes: Number of classes.
        train_images: Number of training images.
        most: Trials at once that are of interest.

    Raises:
        NotMeasuredError: Not even one of them trains.
    """
    data = image_shape, classes, train_images
    with ExitStack() as stack:
        before = _free_bytes(trials[0].device)
        children = [_Child(stack, trials, data)]
        slowest = children[0].answer()
        left = _free_bytes(trials[0].device)
        trial_bytes = max(0, before - left)
        more = most - 1 if not trial_bytes else min(most - 1, int(ROOM * left / trial_bytes))
        started = [_Child(stack, trials[slowest : slowest + 1], data) for _ in range(more)]
        children += [child for child in started if child.is_ready()]
        speeds = {}
        for number in _doubling(len(children)):
            for child in children[:number]:
                child.train()
            speeds[number] = sum(child.answer() for child in children[:number])
        return Sharing(speeds, trial_bytes, _cpu_speed(trials[slowest], data))


def _doubling(most: int) -> list[int]:
    """Return 1, 2, 4 and so on, and `most`."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


class _Child:
    """A process that trains on request; it ends with the stack."""

    def __init__(self, stack: ExitStack, trials: Sequence[TrialConfig], data: tuple[tuple[int, int, int], int, int]):
        context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_train_on_request, args=(theirs, loaded(), trials, *data), daemon=True)
        process.start()
        theirs.close()  # so that the death of the process is seen
        stack.callback(process.join)
        stack.callback(process.kill)

    def train(self) -> None:
        """Ask for `SECONDS` of training."""
        self._connection.send(SECONDS)

    def answer(self) -> Any:
        """Return what the process says next.

        Raises:
            NotMeasuredError: It has failed, or says nothing.
        """
        try:
            found = self._connection.recv() if self._connection.poll(PATIENCE_SECONDS) else "does not answer"
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
    image_shape: tuple[int, int, int],
    classes: int,
    train_images: int,
) -> None:
    """Say which of the trials is the slowest, then train it for as long as asked, again and again."""
    try:
        torch.set_num_threads(1)
        keep_freed_memory()
        load(files)
        everything = random_data(train_images, image_shape, classes, trials[0].device)  # takes its memory
        data = _first(everything, MOST_IMAGES)
        trainings = [Trial(replace(trial, epochs=LONGER), data) for trial in trials]
        seconds = []
        for training in trainings:
            training.run_epoch()  # allocates memory, and compiles kernels
            seconds.append(training.run_epoch().epoch_seconds)
        slowest = seconds.index(max(seconds))
        connection.send(slowest)
        while True:
            connection.send(_speed(trainings[slowest], connection.recv()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  (whatever a net, a driver or torch raises)
        connection.send(f"{type(error).__name__}: {error}")


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


def _cpu_speed(trial: TrialConfig, data: tuple[tuple[int, int, int], int, int]) -> float:
    """Return training images per second of one thread of a CPU."""
    image_shape, classes, train_images = data
    params = {**trial.to_params(), **numeric_settings("cpu"), "epochs": f"{LONGER}"}
    images = random_data(min(train_images, 4 * trial.batch_size), image_shape, classes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = Trial(TrialConfig.from_params(params), images)
        training.run_epoch()
        return _speed(training, SECONDS)
    finally:
        torch.set_num_threads(threads)


def _free_bytes(device: str) -> int:
    """Return the free memory of the first GPU; 0 on CPUs."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0
