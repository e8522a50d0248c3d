"""The test of a finalist's net: once per net, on the test set, with all that is recorded of it."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from grid.config import InputError, TrialConfig
from grid.data.dataset import Dataset
from grid.driver.pictures import MISTAKES, confusion_picture, mistake_sheet
from grid.record.predictor import forget_models, log_predictor
from grid.record.store import Store, StoredTrial
from grid.train.checkpoints import Checkpoints
from grid.train.evaluation import (
    ClassScore,
    ConfusedPair,
    Evaluation,
    confused_pairs,
    evaluate,
    inference_state,
    per_class,
)
from grid.train.trial import DeviceData

PAIRS = 20
"""Confused pairs that are recorded."""


@dataclass(frozen=True)
class FinalTest:
    """What a net is tested with."""

    store: Store
    dataset: Dataset
    data: DeviceData
    """The same data, on the device that tests."""
    checkpoints: Checkpoints
    """With the weights of the finalists."""
    images: NDArray[np.uint8]
    """Of the test set, as in `Dataset`."""
    labels: NDArray[np.int64]
    """`[image]`, from 0."""

    @classmethod
    def prepare(
        cls,
        trials: Sequence[TrialConfig],
        store: Store,
        dataset: Dataset,
        checkpoints: Checkpoints,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
    ) -> "FinalTest":
        """Put the data on the device where finalists are tested."""
        return cls(
            store, dataset, DeviceData.from_dataset(dataset, _device_here(trials[0])), checkpoints, images, labels
        )

    def run(self, trial: StoredTrial) -> None:
        """Test one net and record the result; the numbers come last, and make it count as tested.

        Raises:
            InputError: Its weights are gone.
        """
        config = trial.config
        if config.device != _device_here(config):
            config = replace(config, device="cpu", fused=False)
        state = self.checkpoints.load(trial.config.trial_key, config.device)
        if state is None:
            hint = f"delete run {trial.run_id} in MLflow and run again"
            raise InputError(f"the weights of {trial.config.name} are gone from the storage; {hint}")
        result = evaluate(config, state, self.data, self.images, self.labels)
        self.store.attach(trial.run_id, _files(result, trial.config, self.dataset, self.images))
        client, classes, example = self.store.client, self.dataset.classes, self.dataset.val_images[:4]
        weights = inference_state(config, state, self.data)
        forget_models(client, trial.run_id)
        model_id = log_predictor(client, trial.run_id, trial.config, weights, self.data, classes, example)
        self.store.log_test(trial.run_id, result.metrics, model_id)
        self.checkpoints.delete(trial.config.trial_key)
        print(f"tested  {result.accuracy_as_validated:.2%}  {trial.config.name}", flush=True)


def _device_here(config: TrialConfig) -> str:
    """Return the kind of device to test a net on: that of its training, unless this machine has none."""
    return config.device if config.device == "cpu" or torch.cuda.is_available() else "cpu"


def _files(result: Evaluation, config: TrialConfig, dataset: Dataset, images: NDArray[np.uint8]) -> dict[str, bytes]:
    """Return the files that go with the numbers: path -> content."""
    classes, wrong = dataset.classes, result.mistakes
    most_confident = wrong.indices[:MISTAKES]
    pictured = images[most_confident], wrong.true[:MISTAKES], wrong.predicted[:MISTAKES], wrong.confidence[:MISTAKES]
    matrix = ([name, *row] for name, row in zip(classes, result.confusion, strict=True))
    return {
        "test/confusion.csv": _csv(["true", *classes], matrix),
        "test/confusion.png": confusion_picture(result.confusion, classes, config.name),
        "test/per_class.csv": _csv(ClassScore._fields, per_class(result.confusion, classes)),
        "test/confused_pairs.csv": _csv(ConfusedPair._fields, confused_pairs(result.confusion, classes, PAIRS)),
        "test/mistakes.png": mistake_sheet(*pictured, classes),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()
