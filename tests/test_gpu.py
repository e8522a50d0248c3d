"""What only a GPU can show: the same numbers as the CPU's float32, no wait in a step, and what its errors look like.

`make test` runs these on a machine with a GPU, `make gpu-report` them alone: torch, numpy and pytest suffice for it.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from grid.config import TrialConfig
from grid.data.dataset import Dataset, DataShape
from grid.parts import LEVELS
from grid.parts.registry import GRIDS
from grid.plan.sharing import measure_sharing
from grid.plan.space import cross
from grid.train.canary import try_steps
from grid.train.device_errors import DeviceError
from grid.train.hardware import numeric_settings
from grid.train.techniques.optimizers import base_learning_rate
from grid.train.trial import DeviceData, Trial

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

IMAGES, VAL_IMAGES, CLASSES = 1024, 256, 10
CELLS = cross(GRIDS["techniques"].levels)[0]
SETTINGS = {"epochs": "4", "hidden_sizes": "64-32", "channels": "8-16-16", "dense_size": "32", "batch_size": "128"}
STEP_TOLERANCE = 1e-3
"""Relative difference of the weights after a step that rounding explains: Adam divides by gradients, tiny ones too."""
EPOCH_TOLERANCE = 0.05
"""Relative difference of the losses after an epoch; rounding grows from step to step."""
FAULT = """
import torch
from grid.train.device_errors import DeviceError
for attempt in range(2):
    try:
        torch.zeros(4, device="cuda")[torch.tensor([7], device="cuda")].sum().item()
    except Exception as error:
        found = DeviceError.of(error)
        print("device" if found and not found.out_of_memory else repr(error))
    else:
        print("none")
"""
TWO = """
from tests.test_gpu import made
trial = made({"model": "cnn"}, "cuda")
for _ in range(4):
    report = trial.run_epoch()
print(report.diverged)
"""


def on(device: str) -> DeviceData:
    """Return images that can be learned: each class has a mean of its own."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES + VAL_IMAGES) % CLASSES
    images = torch.randint(0, 128, (len(labels), 28, 28), generator=draws) + 12 * labels[:, None, None]
    pixels = images.to(torch.uint8).numpy()
    parts = pixels[:IMAGES], labels[:IMAGES].numpy(), pixels[IMAGES:], labels[IMAGES:].numpy()
    names = ("train_images", "train_labels", "val_images", "val_labels")
    data = Dataset(**dict(zip(names, parts, strict=True)), name="", classes=tuple("0123456789"), fingerprint="")
    return DeviceData.from_dataset(data, device)


def made(cell: dict[str, str], device: str, precision: str = "float32") -> Trial:
    numeric = numeric_settings(device, precision)
    plain = {"optimizer": "adam", **SETTINGS, **cell}
    rate = repr(base_learning_rate(plain))
    return Trial(TrialConfig.from_params({**plain, **numeric, "learning_rate": rate}), on(device))


def step(trial: Trial) -> float:
    images, labels = next(iter(trial._batches()))
    return float(trial._step(images, labels)[0])


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cell", CELLS, ids=["-".join(cell.values()) for cell in CELLS])
def test_a_step_and_an_epoch_yield_the_numbers_of_the_cpu(cell: dict[str, str]) -> None:
    here, there = made(cell, "cpu"), made(cell, DEVICE)
    if cell["dropout"] == "off":  # masks are drawn on the device, and differ
        assert step(there) == pytest.approx(step(here), rel=STEP_TOLERANCE)
        for mine, other in zip(here.net.parameters(), there.net.parameters(), strict=True):
            assert float((mine - other.cpu()).detach().norm()) <= STEP_TOLERANCE * max(1.0, float(mine.detach().norm()))
    here, there = made(cell, "cpu"), made(cell, DEVICE)
    first, second = here.run_epoch(), there.run_epoch()
    if cell["dropout"] == "off":
        assert second.train_loss == pytest.approx(first.train_loss, rel=EPOCH_TOLERANCE)
    assert math.isfinite(second.val_loss)


@pytest.mark.parametrize("name", LEVELS["optimizer"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_no_step_waits_for_the_gpu(name: str, precision: str) -> None:
    for cell in CELLS if name == "adam" else CELLS[:4]:
        trial = made({**cell, "optimizer": name}, DEVICE, precision)
        step(trial)  # the first allocates, and looks for the fastest kernels
        batches = list(trial._batches())
        with no_waits():
            for images, labels in batches[:2]:
                trial._step(images, labels)


@pytest.mark.parametrize(
    ("factor", "level"),
    [
        (factor, level)
        for factor in ("augmentation", "label_smoothing", "mixup", "weight_averaging")
        for level in LEVELS[factor][1:]
    ],
)
def test_no_step_with_a_technique_waits_for_the_gpu(factor: str, level: str) -> None:
    trial = made({"model": "resnet", factor: level}, DEVICE)
    step(trial)
    batches = list(trial._batches())
    with no_waits():
        trial._step(*batches[0])


@pytest.mark.parametrize("name", LEVELS["optimizer"])
def test_a_resumed_trial_goes_on_where_it_was(name: str) -> None:
    whole = made({"optimizer": name, "dropout": "on", "augmentation": "elastic"}, DEVICE)
    begun = made({"optimizer": name, "dropout": "on", "augmentation": "elastic"}, DEVICE)
    for trial in (whole, begun):
        trial.run_epoch()
    resumed = Trial(begun.config, begun.data)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.run_epoch().train_loss == pytest.approx(whole.run_epoch().train_loss, rel=EPOCH_TOLERANCE)


def test_dropout_zeroes_its_share_of_units() -> None:
    trial = made({"model": "mlp", "dropout": "on"}, DEVICE)
    (dropout, *_) = (module for module in trial.net.modules() if type(module).__name__ == "SeededDropout")
    ones = torch.ones(512, 1024, device=DEVICE)
    dropped = dropout.train()(ones)
    assert float((dropped == 0).float().mean()) == pytest.approx(trial.config.dropout_rate, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)


def test_float32_is_not_tf32() -> None:
    trial = made({"model": "cnn"}, DEVICE)
    trial.run_epoch()
    draws = torch.Generator().manual_seed(0)
    maps, weights = torch.randn(8, 64, 14, 14, generator=draws), torch.randn(64, 64, 3, 3, generator=draws)
    exact = torch.conv2d(maps.double(), weights.double())
    computed = torch.conv2d(maps.to(DEVICE), weights.to(DEVICE)).cpu().double()
    assert float((computed - exact).abs().max() / exact.abs().max()) < 1e-5  # 10 bits would be off by 1e-3


def test_two_processes_train_on_one_gpu() -> None:
    command = [sys.executable, "-c", TWO]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=600)[0].strip() for process in running] == ["False"] * 2


def test_out_of_memory_is_recognised_and_survived() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    found = DeviceError.of(caught.value)
    assert found is not None
    assert found.out_of_memory
    assert math.isfinite(made({"model": "mlp"}, DEVICE).run_epoch().val_loss)


def test_an_error_of_the_gpu_is_recognised_and_stays() -> None:
    said = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=600)
    assert said.stdout.split() == ["device", "device"]


def test_trials_that_share_this_gpu_are_measured() -> None:
    plain = made({"model": "cnn"}, DEVICE, "auto").config
    sharing = measure_sharing([plain], DataShape((1, 28, 28), CLASSES, IMAGES), 2)
    assert sorted(sharing.speeds) == [1, 2]
    assert 2**26 < sharing.trial_bytes < 2**33


def test_the_canary_finds_nothing_here() -> None:
    plain = made({"model": "mlp"}, DEVICE, "auto").config
    nets = [replace(plain, model=model) for model in ("mlp", "cnn", "resnet")]
    assert try_steps(nets, DataShape((1, 28, 28), CLASSES, IMAGES)) == ""
