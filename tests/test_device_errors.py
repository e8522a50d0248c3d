"""Errors of a device, injected where torch would raise them, on a real Ray of four workers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grid.config import TrialConfig
from grid.data.dataset import Dataset
from grid.data.load import load
from grid.plan.asha import Asha
from grid.plan.packing import Packing
from grid.train.checkpoints import Checkpoints
from grid.train.device_errors import DeviceError
from grid.train.trial import Trial
from grid.tune.connection import connect, disconnect
from grid.tune.queue import Queue
from grid.tune.tuner import run_trials
from tests.broken_devices import ILLEGAL, MOST, Crowded, OneHuge, Starved, Sticky, Wrong
from tests.test_tuner import Notes

CONFIG = TrialConfig(learning_rate=0.05, optimizer="sgd", epochs=2, hidden_sizes="8")


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.AcceleratorError(f"{ILLEGAL}\nCUDA kernel errors might be ..."), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, ...`"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275"), False),
        (RuntimeError("HIP error: invalid device function"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
    ],
)
def test_errors_of_devices_are_recognised_even_as_causes(error: Exception, out_of_memory: bool) -> None:
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("wrapped") from cause
    except ValueError as wrapped:
        for each in (error, wrapped):
            found = DeviceError.of(each)
            assert found is not None
            assert found.out_of_memory is out_of_memory
            assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (128x784 and 28x512)"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        ValueError("the user's part says: CUDA error"),
        KeyError("out of memory"),
        AssertionError("out of memory"),
    ],
)
def test_errors_of_a_training_are_its_own(error: Exception) -> None:
    assert DeviceError.of(error) is None


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tell the workers, which get the environment of Ray's servers, where they leave their marks."""
    folder = tmp_path_factory.mktemp("marks")
    (folder / "crowd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BREAKS", str(folder / "broken"))
        patch.setenv("CROWD", str(folder / "crowd"))
        yield folder


@pytest.fixture(scope="module")
def packing(marks: Path) -> Iterator[Packing]:
    yield connect(None, 4)
    disconnect()


@pytest.fixture(scope="module")
def dataset(glyphs_dir: Path) -> Dataset:
    return load("glyphs", glyphs_dir, per_class=10)


def train(make_trial: type[Trial], number: int, dataset: Dataset, packing: Packing, folder: Path) -> Notes:
    notes, trials = Notes(), [replace(CONFIG, seed=seed) for seed in range(number)]
    checkpoints = Checkpoints(str(folder), "test")
    settings = {"controls": (), "packing": packing, "checkpoints": checkpoints}
    run_trials(trials, dataset, notes, asha=Asha(()), make_trial=make_trial, **settings)  # type: ignore[arg-type]
    return notes


@pytest.mark.slow
def test_after_a_sticky_error_one_process_is_replaced_and_no_trial_fails(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    notes = train(Sticky, 24, dataset, packing, tmp_path)
    assert [status for status, _ in notes.ends.values()] == ["completed"] * 24
    (notice,) = notes.notices
    assert notice.startswith("the device of ")
    assert notice.endswith(f" failed, and its process was replaced: {ILLEGAL}")
    assert len(notes.starts) == 25  # one trial began twice


@pytest.mark.slow
def test_out_of_memory_lets_one_fewer_trial_run_at_once(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    notes = train(Crowded, 16, dataset, packing, tmp_path)
    assert [status for status, _ in notes.ends.values()] == ["completed"] * 16
    assert notes.notices
    assert all(" ran out of memory: " in notice for notice in notes.notices)
    assert f" {MOST} trials at once from now on (CUDA out of memory." in notes.notices[0]


@pytest.mark.slow
def test_a_trial_that_is_too_large_by_itself_fails_and_gives_the_room_back(
    dataset: Dataset, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []
    suggest = Queue.suggest
    monkeypatch.setattr(Queue, "suggest", lambda queue, key: rooms.append(queue.most) or suggest(queue, key))
    notes = train(OneHuge, 24, dataset, packing, tmp_path)
    failed = [key for key, (status, _) in notes.ends.items() if status == "failed"]
    assert (len(notes.ends), len(failed)) == (24, 1)
    assert "with no other trial beside it" in notes.ends[failed[0]][1]
    assert min(rooms) < rooms[-1] == packing.concurrency


@pytest.mark.slow
def test_a_trial_that_has_the_machine_to_itself_and_too_little_memory_fails(
    dataset: Dataset, packing: Packing, tmp_path: Path
) -> None:
    notes = train(Starved, 1, dataset, packing, tmp_path)
    ((status, error),) = notes.ends.values()
    assert status == "failed"
    assert error.endswith("with no other trial beside it: CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.slow
def test_the_run_ends_when_the_first_trials_all_fail_alike(dataset: Dataset, packing: Packing, tmp_path: Path) -> None:
    notes = train(Wrong, 24, dataset, packing, tmp_path)
    assert {status for status, _ in notes.ends.values()} == {"failed"}
    assert len(notes.ends) < 24
    first = "the first 8 trials all failed alike (ValueError: a wrong shape); fix that, or pass --keep-going"
    assert notes.problems[0] == first
