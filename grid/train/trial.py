"""One training in pure torch: takes a configuration, data and a callback, and returns values.

It knows neither Ray nor MLflow. All randomness comes from generators that belong to the trial, so that on a CPU two
trials of one configuration yield the same bits (with the same number of threads).
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.metrics import EpochReport
from grid.parts.registry import ActivationSpec, check_known, find
from grid.train.actions import Actions, acting, change_net
from grid.train.hardware import describe_machine, use_precision
from grid.train.techniques.averaging import Averages, averaged_weights, averages_of
from grid.train.techniques.optimizers import build_optimizer
from grid.train.techniques.penalties import penalised_weights
from grid.train.techniques.schedules import Schedule
from nets.activations import Activation
from nets.blocks import NetSpec, Techniques

Pixels = UInt8[Tensor, "batch channels height width"]
Inputs = Float[Tensor, "batch channels height width"]
EVALUATION_BATCH_SIZE, LARGE_IMAGE = 1000, 4 * 28 * 28
"""Images that are evaluated at once, and the numbers in an image above which they are fewer, to save memory."""
NORM_BATCHES = 20
"""Training batches from which the batch norm statistics of averaged weights are estimated, at most."""


@dataclass(frozen=True)
class DeviceData:
    """The images and labels of a data set on the device that trains."""

    train_images: UInt8[Tensor, "train channels height width"]
    train_labels: Int[Tensor, " train"]
    val_images: UInt8[Tensor, "val channels height width"]
    val_labels: Int[Tensor, " val"]
    classes: int
    mean: float
    """Mean of the training pixels, in [0, 255]."""
    std: float
    """Standard deviation of the training pixels; at least 1."""

    @classmethod
    def from_dataset(cls, dataset: Dataset, device: str = "cpu") -> "DeviceData":
        """Copy a data set to `device`, once for all trials that run there; on a CPU, share its memory instead."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's shared memory is read-only, and nothing here writes to it
            tensors = [
                torch.from_numpy(array).to(device)
                for array in (dataset.train_images, dataset.train_labels, dataset.val_images, dataset.val_labels)
            ]
        train_images, train_labels, val_images, val_labels = tensors
        counts = torch.bincount(train_images.flatten(), minlength=256).cpu().numpy()
        levels = np.arange(256)
        mean = float(np.average(levels, weights=counts))
        std = math.sqrt(np.average((levels - mean) ** 2, weights=counts))
        return cls(
            train_images=with_channels(train_images),
            train_labels=train_labels,
            val_images=with_channels(val_images),
            val_labels=val_labels,
            classes=len(dataset.classes),
            mean=mean,
            std=max(1.0, std),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


@dataclass(frozen=True)
class TrialResult:
    """How a training ended, and what it reported."""

    status: str
    """`completed`, `stopped` (by the callback) or `diverged`."""
    reports: tuple[EpochReport, ...]

    @property
    def best_val_accuracy(self) -> float | None:
        """Highest validation accuracy of all epochs; None if the first one diverged."""
        return max((report.val_accuracy for report in self.reports if not report.diverged), default=None)


def train(
    config: TrialConfig, data: DeviceData, on_epoch: Callable[[EpochReport], bool] = lambda report: False
) -> TrialResult:
    """Train one configuration to its full budget.

    Args:
        config: What to train.
        data: Images on the device that `config` names.
        on_epoch: Called with the report of every epoch; a true return value stops the training.
    """
    trial = Trial(config, data)
    reports: list[EpochReport] = []
    while True:
        reports.append(trial.run_epoch())
        stopped = on_epoch(reports[-1])
        if reports[-1].diverged:
            return TrialResult("diverged", tuple(reports))
        if trial.epoch == config.epochs:
            return TrialResult("completed", tuple(reports))
        if stopped:
            return TrialResult("stopped", tuple(reports))


class Trial:
    """A training that is run epoch by epoch, and can be saved and resumed between two epochs.

    Args:
        config: What to train.
        data: Images on the device that `config` names.
    """

    def __init__(self, config: TrialConfig, data: DeviceData):
        check_known(config)
        self.config = config
        self.data = data
        self.epoch = 0
        self._order = _generator(config, "order", "cpu")
        self._dropout = _generator(config, "dropout", config.device)
        self._actions = actions_of(config)
        self._layout = torch.channels_last if config.memory_format == "channels_last" else torch.contiguous_format
        self.net = build_net(config, data, self._dropout).to(device=config.device)
        self.net = self.net.to(memory_format=self._layout)
        self._penalise = find("regularization", config.regularization).resolve()
        self._weights = penalised_weights(self.net)
        self._parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self._averages = Averages(self._parameters) if self._actions.keeps_averages else None
        self._val_sizes = np.bincount(data.val_labels.cpu().numpy(), minlength=data.classes)
        self._batch_size = min(config.batch_size, len(data.train_labels))
        self._steps = len(data.train_labels) // self._batch_size
        self._optimizer = build_optimizer(config, self.net.parameters(), average_from_step=self._steps)
        self._schedule = Schedule(config, self._optimizer, config.epochs * self._steps)

    def run_epoch(self) -> EpochReport:
        """Train one epoch and validate."""
        begun = time.perf_counter()
        use_precision(self.config.device, self.config.precision)
        train_loss, train_accuracy, learning_rate, finite = self._train_epoch()
        trained = time.perf_counter()
        val_loss, correct = self._validate() if finite else (math.nan, np.empty(0, dtype=np.bool_))
        finite = finite and math.isfinite(val_loss)
        if finite:
            self._schedule.after_epoch(val_loss)
        self.epoch += 1
        return EpochReport(
            epoch=self.epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy if finite else math.nan,
            val_loss=val_loss if finite else math.nan,
            val_accuracy=float(correct.mean()) if finite else math.nan,
            val_balanced_accuracy=self._balanced_accuracy(correct) if finite else math.nan,
            learning_rate=learning_rate,
            epoch_seconds=time.perf_counter() - begun,
            samples_per_second=self._steps * self._batch_size / (trained - begun),
            diverged=not finite,
            val_correct=np.packbits(correct).tobytes() if finite and self.epoch == self.config.epochs else b"",
            machine=describe_machine(self.config.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the remaining epochs depend on: live tensors, to be saved before the next epoch."""
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "order": self._order.get_state(),
            "dropout": self._dropout.get_state(),
            "own": {name: generator.get_state() for name, generator in self._actions.generators.items()},
            **({"averages": self._averages.state_dict()} if self._averages else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another trial of the same configuration and data."""
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._order.set_state(state["order"].cpu())
        self._dropout.set_state(state["dropout"].cpu())
        for name, generator in self._actions.generators.items():
            generator.set_state(state["own"][name].cpu())
        if self._averages:
            self._averages.load_state_dict(state["averages"])

    def _train_epoch(self) -> tuple[float, float, float, bool]:
        self.net.train()
        totals = torch.zeros(2, dtype=torch.float64, device=self.config.device)
        learning_rate = self._schedule.learning_rate
        for images, labels in self._batches():
            learning_rate = self._schedule.learning_rate
            totals += self._step(images, labels)
        loss, correct = (totals / self._steps).tolist()
        return loss, correct / self._batch_size, learning_rate, math.isfinite(loss)

    def _step(self, images: Inputs, labels: Int[Tensor, " batch"]) -> Float[Tensor, "2"]:
        self._optimizer.zero_grad(set_to_none=True)
        images, targets = self._actions.on_batch(images, labels, self.data.classes)
        logits = self._logits(images.contiguous(memory_format=self._layout))
        loss = F.cross_entropy(logits, targets)
        self._actions.on_loss(loss, logits, labels).backward()
        self._penalise(self._weights, self.config)
        self._actions.on_gradients(self._parameters)
        self._optimizer.step()
        if self._averages:
            self._averages.update(self._actions.on_averages)
        self._schedule.after_step()
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        return torch.stack((loss.detach(), correct.to(loss.dtype)))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode: no gradients, and averaged weights if a factor or the optimizer keeps them."""
        use_precision(self.config.device, self.config.precision)
        self.net.eval()
        pairs = self._averages.pairs if self._averages else averages_of(self._optimizer)
        with torch.no_grad(), averaged_weights(self.net, pairs, self._norm_batches()):
            yield

    def logits(self, images: Pixels) -> Float[Tensor, "batch classes"]:
        """Return the logits of unscaled images; call it within `evaluating`."""
        return self._actions.predict(self._logits, self._scaled(images))

    @property
    def evaluation_batch_size(self) -> int:
        """Images that are evaluated at once."""
        return max(1, EVALUATION_BATCH_SIZE * LARGE_IMAGE // max(LARGE_IMAGE, math.prod(self.data.image_shape)))

    def _validate(self) -> tuple[float, NDArray[np.bool_]]:
        """Return the mean cross-entropy of the validation images, and which of them are classified correctly."""
        images, labels = self.data.val_images, self.data.val_labels
        loss = torch.zeros((), dtype=torch.float64, device=self.config.device)
        correct = []
        with self.evaluating():
            for batch, true in zip(
                images.split(self.evaluation_batch_size), labels.split(self.evaluation_batch_size), strict=True
            ):
                logits = self.logits(batch)
                correct.append(logits.argmax(dim=1) == true)
                loss += F.cross_entropy(logits, true, reduction="sum")
        return loss.item() / len(labels), torch.cat(correct).cpu().numpy()

    def _balanced_accuracy(self, correct: NDArray[np.bool_]) -> float:
        """Return the mean accuracy over the classes; NaN where it is the accuracy, as all classes have one size."""
        sizes = self._val_sizes
        if (sizes == sizes[0]).all():
            return math.nan
        hits = np.bincount(self.data.val_labels.cpu().numpy(), weights=correct, minlength=len(sizes))
        return float((hits[sizes > 0] / sizes[sizes > 0]).mean())

    def _logits(self, images: Inputs) -> Float[Tensor, "batch classes"]:
        with torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            logits: Tensor = self.net(images)
        return logits.float()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches in a new order; images beyond the last full batch are left out of this epoch."""
        order = torch.randperm(len(self.data.train_labels), generator=self._order).to(self.config.device)
        for rows in order.split(self._batch_size)[: self._steps]:
            images = self.data.train_images.index_select(0, rows)
            yield self._scaled(images), self.data.train_labels.index_select(0, rows)

    def _norm_batches(self) -> Iterator[Tensor]:
        """Yield full batches only: a last one may hold a single image, which has no variance."""
        for images in self.data.train_images.split(self._batch_size)[: min(self._steps, NORM_BATCHES)]:
            yield self._scaled(images)

    def _scaled(self, images: Pixels) -> Inputs:
        return images.float().sub_(self.data.mean).div_(self.data.std).contiguous(memory_format=self._layout)


def random_data(number: int, image_shape: tuple[int, int, int], classes: int, device: str = "cpu") -> DeviceData:
    """Return random images and labels, the first of them for validation: the speed of training does not depend on them.

    Args:
        number: Of images.
        image_shape: Channels, height and width of an image.
        classes: Number of classes.
        device: Where to put them.
    """
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, *image_shape), dtype=torch.uint8, generator=draws).to(device)
    labels = torch.randint(0, classes, (number,), generator=draws).to(device)
    few = max(1, number // 6)
    return DeviceData(images, labels, images[:few], labels[:few], classes, mean=128.0, std=74.0)


def with_channels(images: Tensor) -> UInt8[Tensor, "image channels height width"]:
    """Return grey images `[image, row, column]` with one channel, others as they are."""
    return images.unsqueeze(1) if images.ndim == 3 else images


def build_net(config: TrialConfig, data: DeviceData, dropout: torch.Generator) -> nn.Module:
    """Build the net of a configuration on the CPU, its weights drawn by its seed.

    Args:
        config: What to build.
        data: Gives the shape of an image and the number of classes.
        dropout: Draws the dropout masks; on the device that trains.

    Raises:
        InputError: A level is unknown in this process.
    """
    return assemble_net(config, image_shape=data.image_shape, classes=data.classes, dropout=dropout)


def assemble_net(
    config: TrialConfig, *, image_shape: tuple[int, int, int], classes: int, dropout: torch.Generator
) -> nn.Module:
    """Build the net of a configuration for images of so many channels, rows and columns, as `build_net` does."""
    activation: ActivationSpec = find("activation", config.activation)
    build = find("model", config.model)
    spec = NetSpec(
        image_shape=image_shape,
        classes=classes,
        techniques=Techniques(
            activation=Activation(activation.build.resolve(), activation.shape),
            batch_norm=config.batch_norm,
            dropout_rate=config.dropout_rate if config.dropout else 0.0,
            initialization=config.initialization,
        ),
        weights=_generator(config, "weights", "cpu"),
        masks=dropout,
    )
    with torch.random.fork_rng(devices=[]):  # torch's own layers draw from the global generator
        torch.default_generator.manual_seed(spec.weights.initial_seed())
        return change_net(build(config, spec), config, _generators(config, "net", "cpu"))


def actions_of(config: TrialConfig) -> Actions:
    """Return what factors beside those of every grid do to the batches and predictions of a trial, at its start."""
    return Actions(config, _generators(config, "batches", config.device))


def _generators(config: TrialConfig, purpose: str, device: str) -> dict[str, torch.Generator]:
    """Return a generator for each factor beside those of every grid that does something in a trial."""
    return {name: _generator(config, f"{name} on {purpose}", device) for name in acting(config)}


def _generator(config: TrialConfig, purpose: str, device: str) -> torch.Generator:
    """Return a generator whose stream differs for every purpose and seed and, unless the seed is shared, every cell.

    If all cells drew the same weights, their deviations would be correlated, and no interval for an effect would cover
    it. The learning-rate scales of a cell draw the same, so that they are compared on equal terms.
    """
    cell = "" if config.shared_seed else f" {config.cell_key}"
    digest = hashlib.sha256(f"{purpose} {config.seed}{cell}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
