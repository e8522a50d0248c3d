"""What a trained net is worth on images that it has never seen: the test of a finalist.

The net is evaluating by the same code, and in the same batches, as after every epoch of its training.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from grid.config import TrialConfig
from grid.train.trial import EVALUATION_BATCH_SIZE, DeviceData, Trial


@dataclass(frozen=True, eq=False)
class Mistakes:
    """The images that were read wrongly, the most confident mistake first; all arrays are `[mistake]`."""

    indices: NDArray[np.int64]
    """Positions in the images that were evaluated."""
    true: NDArray[np.int64]
    """Classes that the images belong to."""
    predicted: NDArray[np.int64]
    """Classes that the net saw in them."""
    confidence: NDArray[np.float64]
    """Probability that the net gave to the predicted class, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a net reads a set of labelled images."""

    images: int
    accuracy: float
    """Share of images classified rightly, in [0, 1]."""
    loss: float
    """Mean cross-entropy in nats."""
    parameters: int
    """Trainable weights of the net."""
    milliseconds_per_image: float
    """Of inference on the device; the median over batches of `EVALUATION_BATCH_SIZE`, after one to warm up."""
    confusion: NDArray[np.int64]
    """Images of a class (row) that were read as a class (column), `[true, predicted]`."""
    mistakes: Mistakes

    @property
    def metrics(self) -> dict[str, float]:
        """The single numbers, by the names of their MLflow metrics."""
        return {
            "test_accuracy": self.accuracy,
            "test_loss": self.loss,
            "test_images": float(self.images),
            "parameters": float(self.parameters),
            "inference_ms_per_image": self.milliseconds_per_image,
        }


class ClassScore(NamedTuple):
    """How the images of one class were read."""

    character: str
    images: int
    correct: int
    accuracy: float
    """Share of its images read rightly, in [0, 1]; NaN if it has none."""


class ConfusedPair(NamedTuple):
    """One class taken for another."""

    true: str
    predicted: str
    images: int
    share: float
    """Of the images of the true class, in (0, 1]."""


def evaluate(
    config: TrialConfig,
    state: Mapping[str, Any],
    data: DeviceData,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> Evaluation:
    """Evaluate a trained net.

    Args:
        config: What was trained.
        state: `Trial.state_dict()` after the last epoch, on the device that `config` names.
        data: What it was trained with.
        images: Upright, white on black, `[image, row, column]`.
        labels: Their classes, `[image]`, from 0.
    """
    trial = _restore(config, state, data)
    on_device = torch.tensor(images, device=config.device).unsqueeze(1)
    wanted = torch.tensor(labels, device=config.device)
    seconds, loss, predicted, confidence = [], 0.0, [], []
    with trial.evaluating():
        trial.logits(on_device[:EVALUATION_BATCH_SIZE])
        for some, true in zip(on_device.split(EVALUATION_BATCH_SIZE), wanted.split(EVALUATION_BATCH_SIZE), strict=True):
            logits, elapsed = _timed_logits(trial, some)
            seconds.append(elapsed / len(some))
            loss += F.cross_entropy(logits, true, reduction="sum").item()
            predicted.append(logits.argmax(dim=1))
            confidence.append(logits.double().softmax(dim=1).amax(dim=1))
    read = torch.cat(predicted).cpu().numpy()
    return Evaluation(
        images=len(labels),
        accuracy=float(np.mean(read == labels)),
        loss=loss / len(labels),
        parameters=sum(parameter.numel() for parameter in trial.net.parameters() if parameter.requires_grad),
        milliseconds_per_image=1000 * statistics.median(seconds),
        confusion=_confusion(labels, read, data.classes),
        mistakes=_mistakes(labels, read, torch.cat(confidence).cpu().numpy()),
    )


def inference_state(config: TrialConfig, state: Mapping[str, Any], data: DeviceData) -> dict[str, Tensor]:
    """Return the weights that a trained net predicts with: averaged under `asgd`, with the batch norm buffers to match.

    Args:
        config: What was trained.
        state: `Trial.state_dict()` after the last epoch, on the device that `config` names.
        data: What it was trained with.

    Returns:
        State dict of the net that `grid.train.trial.build_net` builds; contiguous copies on the CPU.
    """
    trial = _restore(config, state, data)
    with trial.evaluating():
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in trial.net.state_dict().items()
        }


def per_class(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[ClassScore]:
    """Return a row per class, in the order of the classes."""
    rows = zip(classes, confusion.sum(axis=1).tolist(), confusion.diagonal().tolist(), strict=True)
    return [ClassScore(name, images, correct, correct / images if images else nan) for name, images, correct in rows]


def confused_pairs(confusion: NDArray[np.int64], classes: Sequence[str], count: int) -> list[ConfusedPair]:
    """Return the pairs that were confused, most images first, equal ones in the order of the classes.

    Args:
        confusion: `[true, predicted]`.
        classes: Their names.
        count: Most pairs to return.
    """
    sizes = confusion.sum(axis=1)
    errors = confusion - np.diag(confusion.diagonal())
    most_first = np.argsort(-errors, axis=None, kind="stable")[: min(count, np.count_nonzero(errors))]
    pairs = zip(*np.unravel_index(most_first, errors.shape), strict=True)
    return [
        ConfusedPair(classes[true], classes[read], int(errors[true, read]), float(errors[true, read] / sizes[true]))
        for true, read in pairs
    ]


def _restore(config: TrialConfig, state: Mapping[str, Any], data: DeviceData) -> Trial:
    trial = Trial(config, data)
    trial.load_state_dict(state)
    return trial


def _timed_logits(trial: Trial, images: UInt8[Tensor, "batch 1 side side"]) -> tuple[Tensor, float]:
    """Return the logits and the seconds that they took, also where the device runs behind the program."""
    _finish(trial.config.device)
    begun = time.perf_counter()
    logits = trial.logits(images)
    _finish(trial.config.device)
    return logits, time.perf_counter() - begun


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _confusion(true: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    counts = np.bincount(true * classes + predicted, minlength=classes**2)
    return counts.astype(np.int64).reshape(classes, classes)


def _mistakes(true: NDArray[np.int64], predicted: NDArray[np.int64], confidence: NDArray[np.float64]) -> Mistakes:
    wrong = np.flatnonzero(true != predicted)
    ranked = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return Mistakes(ranked, true[ranked], predicted[ranked], confidence[ranked])
