"""One step of each net before anything is recorded; errors of devices are injected where torch would raise them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grid.config import InputError, TrialConfig
from grid.data.dataset import DataShape
from grid.driver.try_nodes import try_nodes
from grid.plan.packing import Packing
from grid.run import main
from grid.train.canary import try_steps
from grid.train.trial import Trial

PLAIN = TrialConfig(learning_rate=0.1, epochs=3, hidden_sizes="8", channels="4-8", dense_size=8)
NETS = [replace(PLAIN, model=model) for model in ("mlp", "cnn", "resnet")]
SHAPE = DataShape((1, 28, 28), 47, 940)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
SMOKE = ["--grid", "smoke", "--per-class", "10", "--address", "local"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Have every training step raise."""

    def fail(error: Exception) -> None:
        def step(*_: object) -> None:
            raise error

        monkeypatch.setattr(Trial, "_step", step)

    return fail


def test_sound_nets_on_a_sound_device_are_no_problem() -> None:
    assert try_steps(NETS, SHAPE) == ""


def test_a_batch_is_no_larger_than_the_images_and_a_schedule_no_shorter_than_on_more() -> None:
    whole = replace(PLAIN, batch_size=100_000)
    short = replace(PLAIN, lr_schedule="one_cycle", epochs=2, warmup_share=0.2)
    assert try_steps([whole, short], SHAPE) == ""


def test_one_cell_that_fails_does_not_refuse_its_net() -> None:
    vanishing = replace(PLAIN, model="cnn", channels="4-4-4-4-4-4")
    assert try_steps([vanishing, replace(PLAIN, model="cnn")], SHAPE) == ""
    assert "can't train model 'cnn'" in try_steps([vanishing], SHAPE)


def test_a_net_that_can_not_take_the_images_is_named() -> None:
    problem = try_steps(NETS, replace(SHAPE, image=(1, 2, 2)))
    assert problem.startswith(
        "can't train model 'cnn' for a single step (InputError: channels=4-8 halve images of 2 x 2"
    )
    assert problem.endswith("; see python -m grid.check")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError(TOO_OLD), "has an NVIDIA driver that torch "),
        (RuntimeError(TOO_OLD), "; update it, or pass --device cpu"),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
            "has a GPU for which torch",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "has too little memory for one trial of model 'mlp' (CUDA",
        ),
        (RuntimeError("CUDA error: unspecified launch failure"), "has a device that fails (CUDA error: unspecified"),
    ],
)
def test_what_a_device_lacks_is_one_line_with_what_to_do(
    error: Exception, says: str, failing: Callable[[Exception], None]
) -> None:
    failing(error)
    problem = try_steps(NETS, SHAPE)
    assert says in problem
    assert "\n" not in problem
    with pytest.raises(InputError) as caught:
        try_nodes(NETS, SHAPE, Packing(1, 1.0, 0.0), connected=False)
    assert str(caught.value) == f"this machine {problem}"


@pytest.mark.parametrize("dry_run", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_command_ends_with_one_line_and_records_nothing(
    dry_run: bool,
    failing: Callable[[Exception], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    failing(RuntimeError(TOO_OLD))
    assert main([*SMOKE, *(["--dry-run"] if dry_run else [])]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("grid.run: this machine has an NVIDIA driver that torch ")
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not (tmp_path / "mlflow.db").exists()
