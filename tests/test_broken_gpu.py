"""A GPU that fails at everything must not eat the grid; two GPUs are made up for a real Ray."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from grid.config import TrialConfig
from grid.data.dataset import DataShape
from grid.data.load import load
from grid.driver.try_nodes import try_nodes
from grid.plan.packing import Node, Packing
from grid.tune import room
from grid.tune.connection import connect, disconnect
from tests.broken_devices import ILLEGAL, Broken
from tests.test_device_errors import train
from tests.waiting import without_waiting


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packing]:
    monkeypatch.setenv("FAILURES", str(tmp_path_factory.mktemp("failures")))
    init = ray.init
    monkeypatch.setattr(ray, "init", lambda **options: init(**options | {"num_gpus": 2}))
    yield replace(connect(None, 2), gpus_per_trial=1.0)
    disconnect()


@pytest.mark.slow
def test_how_trials_share_a_gpu_is_measured_by_processes_of_a_worker(
    packing: Packing, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Node(2, 2, 2**33)
    on_gpus = replace(packing, nodes=(node,))
    trial = TrialConfig(learning_rate=0.1, epochs=3, hidden_sizes="8")  # on CPUs, as there is no GPU
    found = try_nodes([trial], DataShape((1, 28, 28), 47, 512), on_gpus)
    assert without_waiting(capsys.readouterr().err) == ""
    assert found.sharing is not None
    assert found.sharing.speeds[1] > 0
    assert found.reason.startswith("1 per GPU, ")


@pytest.mark.slow
def test_no_trial_fails_because_one_gpu_of_two_is_broken(packing: Packing, glyphs_dir: Path, tmp_path: Path) -> None:
    notes = train(Broken, 12, load("glyphs", glyphs_dir, per_class=10), packing, tmp_path)
    assert [status for status, _ in notes.ends.values()] == ["completed"] * 12
    assert len(notes.notices) == room.MOST_FAILURES
    assert notes.notices[-1].endswith(f"{ILLEGAL}; it keeps failing: 1 trial at once from now on")
