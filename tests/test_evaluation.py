from copy import deepcopy
from math import isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.metrics import EpochReport
from grid.train import evaluation
from grid.train import trial as trial_module
from grid.train.evaluation import (
    Evaluation,
    confused_pairs,
    evaluate,
    inference_state,
    per_class,
    reweighted_accuracy,
)
from grid.train.trial import DeviceData, Trial, build_net

CLASSES = "abcd"
CONFUSION = np.array([[7, 2, 1, 0], [0, 0, 0, 0], [2, 0, 8, 0], [4, 0, 0, 0]])
CONFUSIONS = arrays(np.int64, (4, 4), elements=st.integers(0, 50))


def noise(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, len(CLASSES), count)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset("noise", tuple(CLASSES), *noise(96, seed=0), *noise(37, seed=1), fingerprint="")


@pytest.fixture(scope="module")
def data(dataset) -> DeviceData:
    return DeviceData.from_dataset(dataset)


def trained(data: DeviceData, **changes: object) -> tuple[Trial, EpochReport]:
    small = {"hidden_sizes": "24-16", "channels": "4-6", "dense_size": 16, "batch_size": 32, "epochs": 3}
    config = TrialConfig(**{"learning_rate": 0.01, "batch_norm": True, "dropout": True, **small, **changes})
    trial = Trial(config, data)
    return trial, [trial.run_epoch() for _ in range(config.epochs)][-1]


def evaluated(trial: Trial, dataset: Dataset) -> Evaluation:
    return evaluate(trial.config, trial.state_dict(), trial.data, dataset.val_images, dataset.val_labels)


CELLS = [
    {"optimizer": "asgd"},
    {"optimizer": "asgd", "model": "cnn"},
    {"model": "cnn", "memory_format": "channels_last"},
    {"precision": "bfloat16"},
    {"batch_norm": False, "lr_schedule": "plateau"},
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_net_is_evaluated_bit_by_bit_as_after_its_last_epoch(dataset, data, cell):
    trial, report = trained(data, **cell)
    result = evaluated(trial, dataset)
    assert (result.loss, result.accuracy) == (report.val_loss, report.val_accuracy)


@pytest.mark.parametrize("cell", CELLS[:3])
def test_the_inference_state_holds_the_weights_that_were_evaluated(dataset, data, cell):
    trial, report = trained(data, **cell)
    net = build_net(trial.config, data, torch.Generator()).eval()
    net.load_state_dict(inference_state(trial.config, trial.state_dict(), data))
    logits = net((data.val_images.float() - data.mean) / data.std)
    assert F.cross_entropy(logits, data.val_labels).item() == pytest.approx(report.val_loss, rel=1e-6)


def test_the_inference_state_is_a_contiguous_copy(data):
    trial, _ = trained(data, model="cnn", memory_format="channels_last")
    state = inference_state(trial.config, trial.state_dict(), data)
    assert all(value.is_contiguous() for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert not {value.data_ptr() for value in state.values()} & {value.data_ptr() for value in trial.net.parameters()}


@pytest.mark.parametrize("read", [evaluate, inference_state])
def test_reading_a_state_does_not_change_it(dataset, data, read):
    trial, _ = trained(data, optimizer="asgd")
    state = trial.state_dict()
    before = deepcopy(state)
    read(trial.config, state, data, *([dataset.val_images, dataset.val_labels] if read is evaluate else []))
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_the_batch_size_changes_only_rounding(dataset, data, monkeypatch):
    trial, _ = trained(data)
    whole = evaluated(trial, dataset)
    monkeypatch.setattr(trial_module, "EVALUATION_BATCH_SIZE", 5)
    parts = evaluated(trial, dataset)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert np.array_equal(parts.confusion, whole.confusion)


def test_confusion_counts_images_by_true_class_in_rows(dataset, data):
    trial, report = trained(data)
    confusion = evaluated(trial, dataset).confusion
    assert confusion.sum(axis=1).tolist() == np.bincount(dataset.val_labels, minlength=4).tolist()
    assert confusion.trace() / len(dataset.val_labels) == report.val_accuracy


def test_mistakes_are_all_misclassified_images_the_most_confident_first(dataset, data):
    trial, _ = trained(data)
    mistakes = evaluated(trial, dataset).mistakes
    with trial.evaluating():
        confidence, predicted = trial.logits(data.val_images).double().softmax(dim=1).max(dim=1)
    wrong = np.flatnonzero(predicted.numpy() != dataset.val_labels)
    assert sorted(mistakes.indices) == wrong.tolist() != []
    assert np.array_equal(mistakes.true, dataset.val_labels[mistakes.indices])
    assert np.array_equal(mistakes.predicted, predicted[mistakes.indices])
    assert mistakes.confidence == pytest.approx(confidence[mistakes.indices].numpy())
    assert (np.diff(mistakes.confidence) <= 0).all()


@pytest.mark.parametrize(("seconds", "median"), [([4, 1, 10, 3], 3.5), ([2, 2, 40, 2], 2)])
def test_milliseconds_per_image_are_the_median_over_batches(dataset, data, monkeypatch, seconds, median):
    """Three batches of ten images and a last batch of seven."""
    trial, _ = trained(data)
    sizes = [10, 10, 10, 7]
    times = [value for second, size in zip(seconds, sizes, strict=True) for value in (0.0, second * size / 1000)]
    clock = iter(times)
    monkeypatch.setattr(trial_module, "EVALUATION_BATCH_SIZE", 10)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert evaluated(trial, dataset).milliseconds_per_image == pytest.approx(median)


def test_the_first_batch_warms_up_untimed(dataset, data, monkeypatch):
    trial, _ = trained(data)
    seen: list[int] = []
    logits = Trial.logits
    monkeypatch.setattr(trial_module, "EVALUATION_BATCH_SIZE", 20)
    monkeypatch.setattr(Trial, "logits", lambda self, images: seen.append(len(images)) or logits(self, images))
    evaluated(trial, dataset)
    assert seen == [20, 20, 17]


def test_metrics_have_their_names_in_the_store(dataset, data):
    trial, report = trained(data, batch_norm=False)
    result = evaluated(trial, dataset)
    weights = 784 * 24 + 24 + 24 * 16 + 16 + 16 * 4 + 4
    assert result.metrics == {
        "test_accuracy": report.val_accuracy,
        "test_accuracy_as_validated": pytest.approx(report.val_accuracy),
        "test_balanced_accuracy": pytest.approx(np.mean(result.confusion.diagonal() / result.confusion.sum(axis=1))),
        "test_loss": report.val_loss,
        "test_images": 37,
        "parameters": weights,
        "inference_ms_per_image": result.milliseconds_per_image,
    }


def test_a_test_is_weighted_by_the_classes_of_the_validation_images(dataset, data):
    """Nine in ten test images are of one class; validation images are of all alike."""
    trial, _ = trained(data)
    labels = np.concatenate([np.zeros(333, np.int64), dataset.val_labels])
    images = np.concatenate(
        [np.repeat(dataset.val_images[dataset.val_labels == 0][:1], 333, axis=0), dataset.val_images]
    )
    result = evaluate(trial.config, trial.state_dict(), data, images, labels)
    shares = np.bincount(dataset.val_labels, minlength=4) / len(dataset.val_labels)
    by_class = np.array([score.accuracy for score in per_class(result.confusion, CLASSES)])
    assert result.accuracy_as_validated == pytest.approx(shares @ by_class)
    assert abs(result.accuracy - result.accuracy_as_validated) > 0.01
    assert result.metrics["test_accuracy"] == np.diagonal(result.confusion).sum() / 370


def test_classes_without_a_test_image_have_no_weight():
    assert reweighted_accuracy(CONFUSION, np.array([0, 1, 1, 1, 2])) == pytest.approx((0.7 + 0.8) / 2)
    assert reweighted_accuracy(CONFUSION, np.array([1])) == 0


@given(CONFUSIONS)
def test_with_equal_shares_weights_change_nothing(confusion):
    labels = np.repeat(np.arange(4), confusion.sum(axis=1))
    plain = confusion.trace() / max(1, confusion.sum())
    assert reweighted_accuracy(confusion, labels) == pytest.approx(plain)


def test_per_class_has_a_row_per_class():
    rows = per_class(CONFUSION, CLASSES)
    assert [row[:3] for row in rows] == [("a", 10, 7), ("b", 0, 0), ("c", 10, 8), ("d", 4, 0)]
    assert [rows[label].accuracy for label in (0, 2, 3)] == [0.7, 0.8, 0]
    assert isnan(rows[1].accuracy)


def test_confused_pairs_are_ordered_by_images_and_then_by_class():
    expected = [("d", "a", 4, 1.0), ("a", "b", 2, 0.2), ("c", "a", 2, 0.2), ("a", "c", 1, 0.1)]
    assert confused_pairs(CONFUSION, CLASSES, 10) == expected
    assert confused_pairs(CONFUSION, CLASSES, 3) == expected[:3]


def test_a_net_without_mistakes_confuses_no_pair():
    assert confused_pairs(np.diag([3, 1, 4, 1]), CLASSES, 10) == []


@given(CONFUSIONS)
def test_tables_account_for_every_image(confusion):
    right = sum(row.correct for row in per_class(confusion, CLASSES))
    assert right + sum(pair.images for pair in confused_pairs(confusion, CLASSES, 16)) == confusion.sum()
