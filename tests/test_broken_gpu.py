"""A GPU that fails at everything must not eat the grid; two GPUs are made up for a real Ray."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray

from grid.data.load import load
from grid.plan.packing import Packing
from grid.tune import room
from grid.tune.connection import connect, disconnect
from tests.broken_devices import ILLEGAL, Broken
from tests.test_device_errors import train


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Packing]:
    monkeypatch.setattr(ray, "init", partial(ray.init, num_gpus=2))
    yield replace(connect(None, 2), gpus_per_trial=1.0)
    disconnect()


@pytest.mark.slow
def test_no_trial_fails_because_one_gpu_of_two_is_broken(packing: Packing, glyphs_dir: Path, tmp_path: Path) -> None:
    notes = train(Broken, 12, load("glyphs", glyphs_dir, per_class=10), packing, tmp_path)
    assert [status for status, _ in notes.ends.values()] == ["completed"] * 12
    assert len(notes.notices) == room.MOST_FAILURES
    assert notes.notices[-1].endswith(f"{ILLEGAL}; it keeps failing: 1 trial at once from now on, elsewhere")
