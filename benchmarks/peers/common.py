"""Data, nets, optimizers and one epoch for both scripts, written as torch's and torchvision's documentation recommends.

Imports nothing from this project: the split into train and validation is read from a file.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adagrad, Adam, Optimizer, RMSprop
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import EMNIST

BATCH_SIZE = 128
VALIDATION_BATCH_SIZE = 1000
DATALOADER_WORKERS = 0
"""The faster choice: with 2 workers an epoch of the MLP takes a third longer, as every core already runs a trial."""
MEAN, STD = 0.1722, 0.3309
"""Of EMNIST's pixels, in [0, 1]."""
DROPOUT_RATE = 0.25

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=2e-3),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1e-3),
    "asgd": lambda parameters: ASGD(parameters, lr=0.5, lambd=0.0),
    "adagrad": lambda parameters: Adagrad(parameters, lr=2e-2),
}
"""With the learning rates of `grid/parts/builtin.py`, measured for these nets; `lambd` is ASGD's own weight decay."""


class Glyphs(EMNIST):  # type: ignore[misc]
    """Reads `grid.data.glyphs`, whose files are in `Glyphs/raw` as EMNIST's are in `EMNIST/raw`."""

    splits = ("glyphs",)
    classes_split_dict = {"glyphs": [str(label) for label in range(47)]}  # noqa: RUF012 (torchvision's name and type)


@dataclass(frozen=True)
class Task:
    """Arguments of a script."""

    model: str
    """`mlp` or `cnn`."""
    optimizers: tuple[str, ...]
    activations: tuple[str, ...]
    data: str
    """`glyphs`, or `emnist-` followed by the name of a split in torchvision."""
    data_dir: Path
    split: Path
    """NumPy file with the positions of the `train` and the `val` images."""
    epochs: int
    slots: int
    """Trials at once."""
    seeds: tuple[int, ...]
    """Each cell is trained once with each seed."""
    store: str
    """MLflow tracking URI."""


def read_task() -> Task:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--optimizers", required=True, type=_names)
    parser.add_argument("--activations", required=True, type=_names)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--split", required=True, type=Path)
    parser.add_argument("--epochs", required=True, type=int)
    parser.add_argument("--slots", required=True, type=int)
    parser.add_argument("--seeds", required=True, type=_numbers)
    parser.add_argument("--store", required=True)
    return Task(**vars(parser.parse_args()))


def open_dataset(name: str, data_dir: Path, transform: Callable[..., Tensor] | None = None) -> EMNIST:
    """Open the training images of a data set."""
    if name == "glyphs":
        return Glyphs(data_dir, split="glyphs", train=True, transform=transform)
    return EMNIST(data_dir, split=name.removeprefix("emnist-"), train=True, transform=transform)


def load_data(task: Task) -> tuple["DataLoader[Tensor]", "DataLoader[Tensor]", int]:
    """Return a loader of the training images, one of the validation images, and the number of classes."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    dataset = open_dataset(task.data, task.data_dir, transform)
    split = np.load(task.split)
    train = DataLoader(
        Subset(dataset, split["train"].tolist()),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,  # batch norm needs more than one image
        num_workers=DATALOADER_WORKERS,
    )
    val = DataLoader(
        Subset(dataset, split["val"].tolist()), batch_size=VALIDATION_BATCH_SIZE, num_workers=DATALOADER_WORKERS
    )
    return train, val, len(dataset.classes)


def build_net(model: str, activation: str, classes: int) -> nn.Sequential:
    """Build the net; torch draws its initial weights."""
    act = ACTIVATIONS[activation]
    if model == "mlp":
        layers = [nn.Flatten(), *_dense(28 * 28, 512, act), *_dense(512, 256, act), *_dense(256, 128, act)]
        return nn.Sequential(*layers, nn.Linear(128, classes))
    layers = [*_convolution(1, 32, act), *_convolution(32, 64, act), *_convolution(64, 128, act)]
    return nn.Sequential(*layers, nn.Flatten(), *_dense(128 * 3 * 3, 256, act), nn.Linear(256, classes))


def run_epoch(
    net: nn.Module, optimizer: Optimizer, train: "DataLoader[Tensor]", val: "DataLoader[Tensor]"
) -> dict[str, float]:
    """Train one epoch, validate, and return the metrics."""
    begun = time.perf_counter()
    train_loss = train_epoch(net, optimizer, train)
    val_loss, val_accuracy = validate(net, val)
    return {
        "train_loss": train_loss,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "epoch_seconds": time.perf_counter() - begun,
    }


def train_epoch(net: nn.Module, optimizer: Optimizer, loader: "DataLoader[Tensor]") -> float:
    """Train one epoch and return the mean loss."""
    net.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def validate(net: nn.Module, loader: "DataLoader[Tensor]") -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    net.eval()
    total, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = net(images)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum().item())
            count += len(labels)
    return total / count, correct / count


def _dense(in_size: int, out_size: int, act: type[nn.Module]) -> list[nn.Module]:
    return [nn.Linear(in_size, out_size, bias=False), nn.BatchNorm1d(out_size), act(), nn.Dropout(DROPOUT_RATE)]


def _convolution(in_size: int, out_size: int, act: type[nn.Module]) -> list[nn.Module]:
    layer = nn.Conv2d(in_size, out_size, kernel_size=3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(out_size), act(), nn.MaxPool2d(2), nn.Dropout(DROPOUT_RATE)]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
