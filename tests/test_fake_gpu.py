"""A forward pass of every net and technique with all tensors on a GPU, as far as a machine without one can tell.

The tensors are fake: they have a shape, a type and a device, but no numbers. Torch refuses an operation whose tensors
are on different devices, as a GPU would. The backward pass needs a real GPU, see `tests/test_gpu.py`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_speed import random_images
from grid.config import TrialConfig
from grid.parts import LEVELS
from grid.parts.registry import GRIDS
from grid.plan.space import cross
from grid.train.trial import DeviceData, Trial

IMAGES = 32
DATA = random_images(IMAGES, "cpu")
PLAIN = {"model": "resnet", "optimizer": "adamw", "batch_norm": "on"}
SETTINGS = {"epochs": "3", "learning_rate": "0.1", "hidden_sizes": "16", "channels": "4-8", "dense_size": "16"}


def on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def to_gpu(net: nn.Module) -> None:
    """Replace all tensors of a net by fake ones on a GPU."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_gpu(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_gpu(buffer)


def made(cell: Mapping[str, str]) -> Trial:
    return Trial(TrialConfig.from_params({**SETTINGS, **cell}), DATA)


def look(trial: Trial) -> None:
    """Do all of a step but its gradients, and predict."""
    with FakeTensorMode(), torch.no_grad():
        data = {each.name: getattr(DATA, each.name) for each in fields(DeviceData)}
        trial.data = replace(DATA, **{name: on_gpu(x) for name, x in data.items() if isinstance(x, Tensor)})
        trial.config = replace(trial.config, device="cuda")
        to_gpu(trial.net)
        images, labels = trial._scaled(trial.data.train_images), trial.data.train_labels
        images, targets = trial._actions.on_batch(images, labels, trial.data.classes)
        logits = trial._logits(images)
        loss = trial._actions.on_loss(F.cross_entropy(logits, targets), logits, labels)
        assert logits.device.type == loss.device.type == "cuda"
        trial.net.eval()
        assert trial.logits(trial.data.val_images).device.type == "cuda"


def test_no_cell_of_techniques_mixes_devices() -> None:
    cells, _ = cross(GRIDS["techniques"].levels)
    assert len(cells) == 128
    for cell in cells:
        look(made(cell))


@pytest.mark.parametrize(
    ("factor", "level"), [(factor, level) for factor, levels in sorted(LEVELS.items()) for level in levels]
)
def test_no_level_mixes_devices(factor: str, level: str) -> None:
    look(made({**PLAIN, factor: level}))


def test_a_tensor_that_is_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = made({**PLAIN, "augmentation": "shift"})
    monkeypatch.setattr(trial, "_logits", lambda images: trial.net(images + torch.zeros(len(images), 1, 1, 1)))
    with pytest.raises(RuntimeError, match="device"):
        look(trial)
