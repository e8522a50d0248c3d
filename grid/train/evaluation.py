"""Evaluation of a trained net on images that it has never seen: the test of a finalist.

It runs the same code, in the same batches, as the validation after every epoch of the training.
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
from grid.metrics import AS_VALIDATED_METRIC
from grid.train.trial import DeviceData, Trial, with_channels


@dataclass(frozen=True, eq=False)
class Mistakes:
    """The misclassified images, the most confident mistake first; all arrays are `[mistake]`."""

    indices: NDArray[np.int64]
    """Positions among the evaluated images."""
    true: NDArray[np.int64]
    """True classes."""
    predicted: NDArray[np.int64]
    """Predicted classes."""
    confidence: NDArray[np.float64]
    """Probability of the predicted class according to the net, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a net classifies a set of labelled images."""

    images: int
    accuracy: float
    """Share of images classified correctly, in [0, 1]."""
    accuracy_as_validated: float
    """Accuracy of each class, weighted by its share of the validation images, in [0, 1]."""
    balanced_accuracy: float
    """Mean over the classes of the share of their images that are classified correctly, in [0, 1]."""
    loss: float
    """Mean cross-entropy in nats."""
    parameters: int
    """Trainable weights of the net."""
    milliseconds_per_image: float
    """Inference time on the device: the median over batches, after one to warm up."""
    confusion: NDArray[np.int64]
    """Number of images by true class (row) and predicted class (column), `[true, predicted]`."""
    mistakes: Mistakes

    @property
    def metrics(self) -> dict[str, float]:
        """The scalar results, by the names of their MLflow metrics."""
        return {
            "test_accuracy": self.accuracy,
            AS_VALIDATED_METRIC: self.accuracy_as_validated,
            "test_balanced_accuracy": self.balanced_accuracy,
            "test_loss": self.loss,
            "test_images": float(self.images),
            "parameters": float(self.parameters),
            "inference_ms_per_image": self.milliseconds_per_image,
        }


class ClassScore(NamedTuple):
    """How well the images of one class were classified."""

    character: str
    images: int
    correct: int
    accuracy: float
    """Share of its images classified correctly, in [0, 1]; NaN if it has none."""


class ConfusedPair(NamedTuple):
    """One class mistaken for another."""

    true: str
    predicted: str
    images: int
    share: float
    """Share of the images of the true class, in (0, 1]."""


def evaluate(
    config: TrialConfig,
    state: Mapping[str, Any],
    data: DeviceData,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> Evaluation:
    """Evaluate a trained net.

    Args:
        config: The configuration that was trained.
        state: `Trial.state_dict()` after the last epoch, on the device that `config` names.
        data: The data that it was trained on.
        images: As in `grid.data.dataset.Dataset`.
        labels: Their classes, `[image]`, from 0.
    """
    trial = _restore(config, state, data)
    on_device = with_channels(torch.tensor(images, device=config.device))
    targets = torch.tensor(labels, device=config.device)
    seconds, loss, predicted, confidence = [], 0.0, [], []
    size = trial.evaluation_batch_size
    with trial.evaluating():
        trial.logits(on_device[:size])
        for batch, true in zip(on_device.split(size), targets.split(size), strict=True):
            logits, elapsed = _timed_logits(trial, batch)
            seconds.append(elapsed / len(batch))
            loss += F.cross_entropy(logits, true, reduction="sum").item()
            predicted.append(logits.argmax(dim=1))
            confidence.append(logits.double().softmax(dim=1).amax(dim=1))
    guesses = torch.cat(predicted).cpu().numpy()
    confusion = _confusion(labels, guesses, data.classes)
    return Evaluation(
        images=len(labels),
        accuracy=float(np.mean(guesses == labels)),
        accuracy_as_validated=reweighted_accuracy(confusion, data.val_labels.cpu().numpy()),
        balanced_accuracy=reweighted_accuracy(confusion, np.arange(data.classes)),
        loss=loss / len(labels),
        parameters=sum(parameter.numel() for parameter in trial.net.parameters() if parameter.requires_grad),
        milliseconds_per_image=1000 * statistics.median(seconds),
        confusion=confusion,
        mistakes=_mistakes(labels, guesses, torch.cat(confidence).cpu().numpy()),
    )


def inference_state(config: TrialConfig, state: Mapping[str, Any], data: DeviceData) -> dict[str, Tensor]:
    """Return the weights that a trained net predicts with; under `asgd`, averages and matching batch norm buffers.

    Args:
        config: The configuration that was trained.
        state: `Trial.state_dict()` after the last epoch, on the device that `config` names.
        data: The data that it was trained on.

    Returns:
        State dict of the net that `grid.train.trial.build_net` builds: contiguous copies on the CPU.
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


def reweighted_accuracy(confusion: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the accuracy if the classes had the shares that they have among other labels.

    Validation images may be balanced by class where test images are not; then only this compares with validation.

    Args:
        confusion: `[true, predicted]`; classes without an image are left out.
        labels: Classes, `[image]`, from 0.

    Reference: direct standardisation, Cochran 1977, Sampling Techniques, section 5A.9 (poststratification)
    """
    sizes = confusion.sum(axis=1)
    weights = np.bincount(labels, minlength=len(sizes)) * (sizes > 0)
    return float(weights @ (confusion.diagonal() / np.maximum(sizes, 1)) / max(1, weights.sum()))


def confused_pairs(confusion: NDArray[np.int64], classes: Sequence[str], count: int) -> list[ConfusedPair]:
    """Return the pairs of classes that were confused, most images first, ties in the order of the classes.

    Args:
        confusion: `[true, predicted]`.
        classes: Their names.
        count: Maximum number of pairs.
    """
    sizes = confusion.sum(axis=1)
    errors = confusion - np.diag(confusion.diagonal())
    most_first = np.argsort(-errors, axis=None, kind="stable")[: min(count, np.count_nonzero(errors))]
    pairs = zip(*np.unravel_index(most_first, errors.shape), strict=True)
    return [
        ConfusedPair(classes[true], classes[guess], int(errors[true, guess]), float(errors[true, guess] / sizes[true]))
        for true, guess in pairs
    ]


def _restore(config: TrialConfig, state: Mapping[str, Any], data: DeviceData) -> Trial:
    trial = Trial(config, data)
    trial.load_state_dict(state)
    return trial


def _timed_logits(trial: Trial, images: UInt8[Tensor, "batch channels height width"]) -> tuple[Tensor, float]:
    """Return the logits and the seconds that they took, waiting for a device that runs asynchronously."""
    _synchronize(trial.config.device)
    begun = time.perf_counter()
    logits = trial.logits(images)
    _synchronize(trial.config.device)
    return logits, time.perf_counter() - begun


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _confusion(true: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    counts = np.bincount(true * classes + predicted, minlength=classes**2)
    return counts.astype(np.int64).reshape(classes, classes)


def _mistakes(true: NDArray[np.int64], predicted: NDArray[np.int64], confidence: NDArray[np.float64]) -> Mistakes:
    wrong = np.flatnonzero(true != predicted)
    ranked = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return Mistakes(ranked, true[ranked], predicted[ranked], confidence[ranked])
