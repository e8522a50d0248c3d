import io
import math
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.metrics import EPOCH_METRICS, STATUSES, EpochReport
from grid.parts import LEVELS
from grid.parts.registry import LR_SCHEDULES, OPTIMIZERS, REGULARIZATIONS
from grid.train import trial as trial_module
from grid.train.techniques.penalties import penalised_weights
from grid.train.trial import DeviceData, Trial, TrialResult, build_net, train
from nets.dropout import SeededDropout

CLASSES, PER_CLASS, VAL_PER_CLASS, SIDE = 8, 24, 6, 28
SECONDS = ("epoch_seconds", "samples_per_second")
CELLS = [(factor, level) for factor, levels in LEVELS.items() for level in levels]


def noisy_templates(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images of one fixed template of noise per class, each blended with its own noise."""
    templates = np.random.default_rng(0).integers(0, 256, (CLASSES, SIDE, SIDE))
    labels = np.tile(np.arange(CLASSES), per_class)
    noise = np.random.default_rng(seed).integers(0, 256, (len(labels), SIDE, SIDE))
    return ((templates[labels] + 2 * noise) // 3).astype(np.uint8), labels.astype(np.int64)


def dataset(**changes: object) -> Dataset:
    train_images, train_labels = noisy_templates(PER_CLASS, seed=1)
    val_images, val_labels = noisy_templates(VAL_PER_CLASS, seed=2)
    arrays = {
        "train_images": train_images,
        "train_labels": train_labels,
        "val_images": val_images,
        "val_labels": val_labels,
    }
    return Dataset(**{"name": "noise", "classes": tuple("abcdefgh"), "fingerprint": "", **arrays, **changes})


@pytest.fixture(scope="module")
def data() -> DeviceData:
    return DeviceData.from_dataset(dataset())


def config(**changes: object) -> TrialConfig:
    """Return a small net with batch norm, dropout and six batches per epoch, trained at the optimizer's base rate."""
    rate = OPTIMIZERS[str(changes.get("optimizer", "adam"))].base_learning_rate
    small = {"hidden_sizes": "24-16", "channels": "4-6", "dense_size": 16, "batch_size": 32}
    return TrialConfig(**{"learning_rate": rate, "epochs": 2, "batch_norm": True, "dropout": True, **small, **changes})


def cell_config(factor: str, level: str) -> TrialConfig:
    plain = config(batch_norm=False, dropout=False, epochs=1).to_params()
    return TrialConfig.from_params({**plain, factor: level})


def untimed(report: EpochReport) -> dict[str, float]:
    return {name: value for name, value in asdict(report).items() if name not in SECONDS}


def untimed_reports(result: TrialResult) -> list[dict[str, float]]:
    return [untimed(report) for report in result.reports]


def through_file(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def images_seen(trial: Trial) -> list[Tensor]:
    """Return the batches of the next epoch."""
    seen: list[Tensor] = []
    hook = trial.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]) if net.training else None)
    trial.run_epoch()
    hook.remove()
    return seen


def assert_same_bits(first: object, second: object) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def scaled(images: Tensor, data: DeviceData) -> Tensor:
    return (images.float() - data.mean) / data.std


@pytest.mark.parametrize("model", LEVELS["model"])
def test_one_configuration_yields_the_same_bits_again(data, model):
    assert untimed_reports(train(config(model=model), data)) == untimed_reports(train(config(model=model), data))


@pytest.mark.parametrize("model", LEVELS["model"])
def test_another_seed_yields_other_numbers(data, model):
    first, second = (train(config(model=model, seed=seed), data).reports[-1] for seed in (0, 1))
    assert first.val_loss != second.val_loss


def test_another_seed_draws_other_weights_another_order_and_other_masks(data):
    first, second = (Trial(config(seed=seed), data).state_dict() for seed in (0, 1))
    for generator in ("order", "dropout"):
        assert not torch.equal(first[generator], second[generator])
    assert not torch.equal(first["net"]["layers.1.weight"], second["net"]["layers.1.weight"])
    assert not torch.equal(first["order"], first["dropout"])


def test_random_draws_of_other_code_change_nothing(data):
    def draw(report: EpochReport) -> bool:
        torch.manual_seed(1)
        np.random.seed(1)
        return bool(torch.rand(5).sum() < 0)

    assert untimed_reports(train(config(), data, draw)) == untimed_reports(train(config(), data))


def test_a_training_leaves_the_global_generator_alone(data):
    state = torch.get_rng_state()
    train(config(), data)
    assert torch.equal(torch.get_rng_state(), state)


OTHER_IMAGES = ("model", "augmentation", "mixup")


@pytest.mark.parametrize(("factor", "level"), [cell for cell in CELLS if cell[0] not in OTHER_IMAGES])
def test_cells_that_share_a_seed_start_from_the_same_draws(data, factor, level):
    """Weights differ by their range only; the images come in the same order."""
    other = replace(cell_config(factor, level), shared_seed=True)
    base, other = Trial(config(shared_seed=True), data), Trial(other, data)
    for weights in zip(penalised_weights(base.net), penalised_weights(other.net), strict=True):
        torch.testing.assert_close(*(weight / weight.abs().max() for weight in weights))
    assert_same_bits(images_seen(base), images_seen(other))


def test_models_that_share_a_seed_see_the_images_in_the_same_order(data):
    mlp, cnn = (Trial(config(model=model, shared_seed=True), data) for model in ("mlp", "cnn"))
    assert_same_bits(images_seen(mlp), images_seen(cnn))


PLAIN = cell_config("dropout", "off")


@pytest.mark.parametrize(
    ("factor", "level"), [(factor, level) for factor, level in CELLS if PLAIN.cell[factor] != level]
)
def test_cells_that_do_not_share_a_seed_draw_other_weights_another_order_and_other_masks(data, factor, level):
    base, other = Trial(PLAIN, data), Trial(cell_config(factor, level), data)
    for generator in ("order", "dropout"):
        assert not torch.equal(base.state_dict()[generator], other.state_dict()[generator])
    for weights in zip(penalised_weights(base.net), penalised_weights(other.net), strict=factor != "model"):
        first, second = (weight / weight.abs().max() for weight in weights)
        assert first.shape != second.shape or not torch.allclose(first, second)


@pytest.mark.parametrize("shared", [False, True])
def test_learning_rate_scales_of_a_cell_start_from_the_same_draws(data, shared):
    base = Trial(config(shared_seed=shared), data)
    scaled_up = Trial(config(shared_seed=shared, lr_scale=2.0, learning_rate=0.002), data)
    for name in ("net", "order", "dropout"):
        assert_same_bits(base.state_dict()[name], scaled_up.state_dict()[name])


def test_a_budget_does_not_change_the_draws_of_a_cell(data):
    assert_same_bits(Trial(config(), data).state_dict()["net"], Trial(config(epochs=5), data).state_dict()["net"])


@pytest.mark.parametrize("optimizer", ["adam", "asgd"])
def test_validation_does_not_change_the_training(data, optimizer):
    fewer = replace(data, val_images=data.val_images[:9], val_labels=data.val_labels[:9])
    runs = [train(config(optimizer=optimizer, epochs=4), images).reports for images in (data, fewer)]
    first, second = ([(report.train_loss, report.train_accuracy) for report in reports] for reports in runs)
    assert first == second
    assert runs[0][-1].val_loss != runs[1][-1].val_loss


def test_batches_are_full_and_contain_no_image_twice(data):
    seen = images_seen(Trial(config(batch_size=50), data))
    assert [len(images) for images in seen] == [50] * 3
    assert len(torch.cat(seen).unique(dim=0)) == 150


def test_every_epoch_has_another_order(data):
    trial = Trial(config(), data)
    first, second = torch.cat(images_seen(trial)), torch.cat(images_seen(trial))
    assert not torch.equal(first, second)
    assert torch.equal(first.unique(dim=0), second.unique(dim=0))


def test_a_batch_larger_than_the_data_is_all_of_it(data):
    assert [len(images) for images in images_seen(Trial(config(batch_size=10_000), data))] == [CLASSES * PER_CLASS]


@pytest.mark.parametrize("model", LEVELS["model"])
def test_64_images_with_random_labels_are_memorised(data, model):
    labels = torch.randint(CLASSES, (64,), generator=torch.Generator().manual_seed(0))
    few = replace(data, train_images=data.train_images[:64], train_labels=labels)
    sizes = {"hidden_sizes": "64", "channels": "16-32", "dense_size": 64}
    free = config(model=model, batch_norm=False, dropout=False, epochs=40, **sizes)
    last = train(free, few).reports[-1]
    assert last.train_accuracy == 1
    assert last.train_loss < 0.1


def test_an_epoch_equals_a_textbook_training_loop(data):
    trial = Trial(config(optimizer="sgd", dropout=False), data)
    net = deepcopy(trial.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=trial.config.learning_rate, momentum=0.9)
    pairs = zip(scaled(data.train_images, data), data.train_labels, strict=True)
    label_of = {image.numpy().tobytes(): label for image, label in pairs}
    for images in images_seen(trial):
        labels = torch.stack([label_of[image.numpy().tobytes()] for image in images])
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(trial.net.state_dict(), net.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_at_its_base_rate(data, optimizer):
    result = train(config(optimizer=optimizer, epochs=12, dropout=False, batch_size=16), data)
    assert result.best_val_accuracy > 0.9


@pytest.mark.parametrize(("factor", "level"), CELLS)
def test_every_level_trains(data, factor, level):
    trial = Trial(cell_config(factor, level), data)
    before = [weight.detach().clone() for weight in penalised_weights(trial.net)]
    report = trial.run_epoch()
    assert math.isfinite(report.train_loss)
    assert math.isfinite(report.val_loss)
    assert not report.diverged
    assert not any(map(torch.equal, before, penalised_weights(trial.net)))


@pytest.mark.parametrize("model", LEVELS["model"])
def test_bfloat16_stays_close_to_float32_and_keeps_weights_in_float32(data, model):
    rough = Trial(config(model=model, precision="bfloat16"), data)
    kinds = set()
    rough.net.register_forward_hook(lambda net, inputs, logits: kinds.add(logits.dtype))
    report, exact = rough.run_epoch(), Trial(config(model=model), data).run_epoch()
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in rough.net.parameters()} == {torch.float32}
    assert report.train_loss == pytest.approx(exact.train_loss, rel=0.02)
    assert report.train_loss != exact.train_loss


@pytest.mark.parametrize("changes", [{"memory_format": "channels_last"}, {"fused": True}])
def test_layout_and_fused_kernels_change_only_rounding(data, changes):
    plain, fast = (
        train(config(model="cnn", dropout=False, **settings), data).reports[-1] for settings in ({}, changes)
    )
    assert fast.train_loss == pytest.approx(plain.train_loss, rel=1e-3)
    assert fast.val_loss == pytest.approx(plain.val_loss, rel=1e-2)


def test_fused_reaches_the_optimizer(data):
    for fused in (False, True):
        groups = Trial(config(fused=fused), data).state_dict()["optimizer"]["param_groups"]
        assert bool(groups[0]["fused"]) == fused


def test_channels_last_is_the_layout_of_convolution_weights(data):
    trial = Trial(config(model="cnn", memory_format="channels_last"), data)
    second_convolution = penalised_weights(trial.net)[1]
    assert second_convolution.is_contiguous(memory_format=torch.channels_last)
    assert not second_convolution.is_contiguous()


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_rate_counts_only_where_dropout_is_on(data, dropout):
    net = build_net(config(dropout=dropout, dropout_rate=0.125), data, torch.Generator())
    rates = [module.rate for module in net.modules() if isinstance(module, SeededDropout)]
    assert rates == [0.125, 0.125] * dropout


def frozen_report(data: DeviceData, **changes: object) -> tuple[nn.Module, EpochReport]:
    """Return a net and the report of an epoch of four batches, whose steps are too small to change it."""
    frozen = {"batch_size": 48, "learning_rate": 1e-30, "batch_norm": False, "dropout": False, "shared_seed": True}
    trial = Trial(config(**frozen, **changes), data)
    return trial.net, trial.run_epoch()


@pytest.mark.parametrize("model", LEVELS["model"])
def test_losses_and_accuracies_are_means_over_the_images(data, model, monkeypatch):
    monkeypatch.setattr(trial_module, "EVALUATION_BATCH_SIZE", 7)
    net, report = frozen_report(data, model=model)
    splits = (data.train_images, data.train_labels), (data.val_images, data.val_labels)
    for name, (images, labels) in zip(("train", "val"), splits, strict=True):
        logits = net(scaled(images, data))
        assert getattr(report, f"{name}_loss") == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert getattr(report, f"{name}_accuracy") == pytest.approx(accuracy)


@pytest.mark.parametrize("regularization", sorted(set(REGULARIZATIONS) - {"none"}))
def test_penalties_are_left_out_of_the_reported_losses(data, regularization):
    _, free = frozen_report(data)
    _, penalised = frozen_report(data, regularization=regularization, l1_strength=1e3, l2_strength=1e3)
    assert (penalised.train_loss, penalised.val_loss) == (free.train_loss, free.val_loss)


@pytest.mark.parametrize("regularization", sorted(set(REGULARIZATIONS) - {"none"}))
def test_penalties_shrink_the_weights(data, regularization):
    strong = {"l1_strength": 0.01, "l2_strength": 0.1, "optimizer": "sgd", "shared_seed": True}
    free, penalised = Trial(config(**strong), data), Trial(config(**strong, regularization=regularization), data)
    sizes = []
    for trial in (free, penalised):
        trial.run_epoch()
        sizes.append(sum(weight.abs().sum().item() for weight in penalised_weights(trial.net)))
    assert sizes[1] < 0.98 * sizes[0]


def test_learning_rate_is_that_of_the_last_step_of_the_epoch(data):
    reports = train(config(lr_schedule="exponential", learning_rate=0.01), data).reports
    steps = 2 * CLASSES * PER_CLASS // 32
    expected = [0.01 * 0.01 ** ((step - 1) / steps) for step in (steps / 2, steps)]
    assert [report.learning_rate for report in reports] == pytest.approx(expected)


def test_plateau_follows_the_validation_loss_of_every_epoch(data, monkeypatch):
    monkeypatch.setattr(Trial, "_validate", lambda trial: (1.0, np.ones(4, np.bool_)))
    reports = train(config(lr_schedule="plateau", learning_rate=0.01, epochs=6), data).reports
    assert [report.learning_rate for report in reports] == pytest.approx([0.01] * 3 + [0.003] * 2 + [0.0009])


def test_asgd_is_validated_with_its_averages_from_the_second_epoch_on(data):
    trial = Trial(config(optimizer="asgd", batch_norm=False, dropout=False), data)
    reported, own = [], []
    for _ in range(2):
        reported.append(trial.run_epoch().val_loss)
        own.append(F.cross_entropy(trial.net(scaled(data.val_images, data)), data.val_labels).item())
    assert reported[0] == pytest.approx(own[0], rel=1e-5)
    assert reported[1] != pytest.approx(own[1], rel=1e-3)


@pytest.mark.parametrize(("batches", "images"), [(20, 150), (2, 100)])
def test_norms_of_averages_are_estimated_from_full_training_batches(data, monkeypatch, batches, images):
    monkeypatch.setattr(trial_module, "NORM_BATCHES", batches)
    trial, seen = Trial(config(optimizer="asgd", batch_size=50, dropout=False), data), []
    trial.run_epoch()
    norm = next(module for module in trial.net.modules() if isinstance(module, nn.BatchNorm1d))
    trial.net.register_forward_pre_hook(
        lambda net, inputs: seen.append(inputs[0]) if norm.training and not net.training else None
    )
    trial.run_epoch()
    torch.testing.assert_close(torch.cat(seen), scaled(data.train_images[:images], data))


def test_seconds_and_throughput_agree(data):
    report = Trial(config(batch_size=50), data).run_epoch()
    assert 0 < 150 / report.samples_per_second < report.epoch_seconds


def test_metrics_are_the_epoch_metrics(data):
    report = Trial(config(), data).run_epoch()
    assert set(report.metrics) == {*EPOCH_METRICS} - {"val_balanced_accuracy"}  # all classes have one size
    assert report.metrics["val_loss"] == report.val_loss


def test_where_classes_differ_in_size_each_counts_alike_in_the_balanced_accuracy(data):
    shown = [*range(9), *torch.argwhere(data.train_labels == 0).flatten()]
    uneven = replace(data, val_images=data.train_images[shown], val_labels=data.train_labels[shown])
    trial = Trial(config(epochs=5), uneven)
    *_, report = [trial.run_epoch() for _ in range(5)]
    with trial.evaluating():
        right = trial.logits(uneven.val_images).argmax(dim=1) == uneven.val_labels
    shares = [right[uneven.val_labels == label].double().mean().item() for label in uneven.val_labels.unique()]
    assert report.val_balanced_accuracy == pytest.approx(sum(shares) / len(shares))
    assert report.val_balanced_accuracy != report.val_accuracy


@pytest.mark.parametrize("model", LEVELS["model"])
def test_after_the_last_epoch_a_report_says_which_validation_images_were_right(data, model):
    trial = Trial(config(model=model, epochs=3), data)
    first, second, last = (trial.run_epoch() for _ in range(3))
    assert first.val_correct == second.val_correct == b""
    images = len(data.val_labels)
    bits = np.unpackbits(np.frombuffer(last.val_correct, np.uint8))
    with trial.evaluating():
        right = (trial.logits(data.val_images).argmax(dim=1) == data.val_labels).numpy()
    assert bits[:images].tolist() == right.tolist()
    assert not bits[images:].any()
    assert len(last.val_correct) == math.ceil(images / 8)
    assert last.val_accuracy == bits.sum() / images


def test_a_training_that_diverges_in_its_last_epoch_says_nothing_about_single_images(data, monkeypatch):
    monkeypatch.setattr(Trial, "_validate", lambda trial: (math.nan, np.ones(4, np.bool_)))
    assert Trial(config(epochs=1), data).run_epoch().val_correct == b""


def test_best_val_accuracy_is_the_highest_of_all_epochs():
    report = EpochReport(epoch=1, val_accuracy=0.5)
    better, broken = replace(report, val_accuracy=0.75), replace(report, val_accuracy=math.nan, diverged=True)
    assert TrialResult("diverged", (report, better, report, broken)).best_val_accuracy == 0.75
    assert TrialResult("diverged", (broken,)).best_val_accuracy is None


def status_and_epochs(result: TrialResult) -> tuple[str, list[int]]:
    assert result.status in STATUSES
    return result.status, [report.epoch for report in result.reports]


def test_a_full_budget_is_completed_and_reported_epoch_by_epoch(data):
    reports: list[EpochReport] = []
    result = train(config(epochs=3), data, lambda report: bool(reports.append(report)))
    assert status_and_epochs(result) == ("completed", [1, 2, 3])
    assert tuple(reports) == result.reports


@pytest.mark.parametrize(("stop_at", "expected"), [(2, ("stopped", [1, 2])), (3, ("completed", [1, 2, 3]))])
def test_the_callback_stops_a_training_that_is_not_over(data, stop_at, expected):
    assert status_and_epochs(train(config(epochs=3), data, lambda report: report.epoch == stop_at)) == expected


@pytest.mark.parametrize("batch_size", [32, 10_000])
@pytest.mark.parametrize("stop", [False, True])
def test_a_loss_that_is_not_finite_ends_the_training_as_diverged(data, batch_size, stop):
    """With one batch per epoch the training loss is still finite; the validation loss is not."""
    absurd = config(optimizer="sgd", learning_rate=1e30, batch_size=batch_size, batch_norm=False, epochs=5)
    result = train(absurd, data, lambda report: stop)
    assert status_and_epochs(result) == ("diverged", [1])
    last = result.reports[-1]
    assert last.diverged
    assert math.isnan(last.val_loss)
    assert math.isnan(last.val_accuracy)
    assert not {"val_loss", "val_accuracy"} & set(last.metrics)
    assert math.isfinite(last.train_loss) == ("train_loss" in last.metrics) == (batch_size == 10_000)


def test_an_infinite_validation_loss_is_reported_as_nan(data, monkeypatch):
    monkeypatch.setattr(Trial, "_validate", lambda trial: (math.inf, np.ones(4, np.bool_)))
    report = Trial(config(), data).run_epoch()
    assert report.diverged
    assert math.isnan(report.val_loss)
    assert math.isnan(report.val_accuracy)


def test_weights_that_a_penalty_makes_infinite_after_the_last_batch_are_a_divergence(data):
    one_batch = {"batch_size": 10_000, "optimizer": "sgd", "regularization": "l2", "l2_strength": 1e38}
    report = Trial(config(**one_batch), data).run_epoch()
    assert report.diverged
    assert math.isfinite(report.train_loss)


def assert_resumes_identically(config: TrialConfig, data: DeviceData, epochs_before: int) -> None:
    whole, first, second = Trial(config, data), Trial(config, data), Trial(config, data)
    reports = [untimed(whole.run_epoch()) for _ in range(config.epochs)]
    for _ in range(epochs_before):
        first.run_epoch()
    second.load_state_dict(through_file(first.state_dict()))
    assert [untimed(second.run_epoch()) for _ in range(config.epochs - epochs_before)] == reports[epochs_before:]
    for name in ("net", "order", "dropout"):
        assert_same_bits(second.state_dict()[name], whole.state_dict()[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_identically(data, optimizer):
    assert_resumes_identically(config(optimizer=optimizer, lr_schedule="one_cycle", epochs=4), data, 2)


@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
def test_every_schedule_resumes_identically(data, lr_schedule):
    assert_resumes_identically(config(lr_schedule=lr_schedule, optimizer="sgd", epochs=6), data, 3)


@pytest.mark.parametrize("epochs_before", [1, 3])
@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"fused": True}, {"memory_format": "channels_last"}])
def test_every_setting_resumes_identically_in_a_cnn(data, changes, epochs_before):
    assert_resumes_identically(config(model="cnn", epochs=4, **changes), data, epochs_before)


def test_data_are_standardised_by_the_mean_and_deviation_of_the_training_pixels(data):
    images = torch.cat(images_seen(Trial(config(), data)))
    assert len(images) == CLASSES * PER_CLASS
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_data_on_the_device_equal_those_of_the_data_set(data):
    source = dataset()
    assert np.array_equal(data.train_images.squeeze(1).numpy(), source.train_images)
    assert np.array_equal(data.val_images.squeeze(1).numpy(), source.val_images)
    assert np.array_equal(data.train_labels.numpy(), source.train_labels)
    assert np.array_equal(data.val_labels.numpy(), source.val_labels)
    assert (data.classes, data.image_shape) == (CLASSES, (1, SIDE, SIDE))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_images_in_colour_are_learned(model):
    """Of two classes, one is red and the other blue; their grey values are the same."""
    rng, labels = np.random.default_rng(0), np.arange(200) % 2
    images = rng.integers(0, 100, (200, 3, 10, 14), dtype=np.uint8)
    images[labels == 0, 0] += 100
    images[labels == 1, 2] += 100
    colours = Dataset("colours", ("red", "blue"), images, labels, images[:60], labels[:60], fingerprint="")
    data = DeviceData.from_dataset(colours)
    assert data.image_shape == (3, 10, 14)
    small = {"hidden_sizes": "16", "channels": "4-4", "dense_size": 8, "batch_size": 20}
    result = train(TrialConfig(model=model, learning_rate=5e-3, epochs=5, **small), data)
    assert result.best_val_accuracy == 1


def test_blank_images_are_not_divided_by_zero():
    blank = DeviceData.from_dataset(dataset(train_images=np.zeros((CLASSES * PER_CLASS, SIDE, SIDE), np.uint8)))
    assert blank.std == 1
    assert math.isfinite(Trial(config(), blank).run_epoch().train_loss)


def test_images_of_another_shape_are_refused(data):
    with pytest.raises(TypeCheckError, match="train_images"):
        replace(data, train_images=data.train_images.squeeze(1))


@pytest.mark.parametrize("model", LEVELS["model"])
def test_averaged_weights_need_no_full_last_batch(data, model):
    """The 33rd image alone would give batch norm no variance."""
    odd = replace(data, train_images=data.train_images[:33], train_labels=data.train_labels[:33])
    report = train(config(model=model, optimizer="asgd", epochs=3), odd).reports[-1]
    assert math.isfinite(report.val_loss)
