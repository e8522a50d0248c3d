"""No step of a training waits for the device: nothing is read back from it before the epoch has ended.

A GPU has its own way to find such a wait, `torch.cuda.set_sync_debug_mode`. Here, without one, a dispatch mode fails on
every operation that hands a tensor's value to Python, or whose result has a shape that depends on values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_speed import random_images
from grid.config import TrialConfig
from grid.parts import LEVELS
from grid.parts.registry import GRIDS, find
from grid.plan.space import cross
from grid.train.techniques.optimizers import base_learning_rate
from grid.train.trial import Trial

READS = {
    "aten::_local_scalar_dense",  # .item(), float(), int(), bool(), if
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
IMAGES = 256
DATA = random_images(IMAGES, "cpu")


class WaitError(Exception):
    """A step has read from the device."""


class NoReads(TorchDispatchMode):
    """Raises at every operation of `READS`."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        masks = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or {func.name(), func.name().partition(".")[0]} & READS:
            raise WaitError(func.name())
        return func(*args, **(kwargs or {}))


def take_steps(trial: Trial) -> None:
    for images, labels in list(trial._batches()):
        with NoReads():
            trial._step(images, labels)


def made(cell: Mapping[str, str], **settings: str) -> Trial:
    rate = repr(base_learning_rate(cell))
    params = {"epochs": "3", "learning_rate": rate, "hidden_sizes": "16", "channels": "4-8", "dense_size": "16"}
    return Trial(TrialConfig.from_params({**params, "fused": "on", **cell, **settings}), DATA)


@pytest.mark.parametrize("read", [lambda t: t.sum().item(), lambda t: bool(t.sum() > 0), lambda t: t[t > 0]])
def test_a_read_is_found(read: Any) -> None:
    with pytest.raises(WaitError), NoReads():
        read(torch.ones(3))


def test_no_step_of_any_cell_of_techniques_reads() -> None:
    cells, _ = cross(GRIDS["techniques"].levels)
    assert len(cells) == 128
    for cell in cells:
        take_steps(made(cell))


PLAIN = {"model": "resnet", "optimizer": "adamw", "batch_norm": "on"}


@pytest.mark.parametrize(
    ("factor", "level"),
    [
        (factor, level)
        for factor, levels in sorted(LEVELS.items())
        for level in levels
        if factor not in ("optimizer", "lr_schedule")
    ],
)
def test_no_step_with_any_built_in_technique_reads(factor: str, level: str) -> None:
    take_steps(made({**PLAIN, factor: level}))


@pytest.mark.parametrize("schedule", LEVELS["lr_schedule"])
def test_no_step_of_any_schedule_reads(schedule: str) -> None:
    take_steps(made({**PLAIN, "lr_schedule": schedule}))


@pytest.mark.parametrize("name", LEVELS["optimizer"])
def test_no_step_of_any_optimizer_reads_as_it_is_built_for_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch lets `capturable` optimizers step on GPUs only; here CPUs count as some."""
    build = find("optimizer", name).build.resolve()
    module = __import__(build.__module__, fromlist=["x"])
    if hasattr(module, "_get_capturable_supported_devices"):
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])
    monkeypatch.setattr("grid.train.techniques.optimizers.GPU", "cpu")
    trial = made({**PLAIN, "optimizer": name})
    group = trial._optimizer.param_groups[0]
    assert group.get("capturable", False) is ("capturable" in group and not group.get("fused"))
    take_steps(trial)
