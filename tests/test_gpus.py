import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grid.surroundings import cpu_name
from grid.tune.gpus import device_names, find_gpus

GIB = 2**30


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of devices, of which torch counts two GPUs."""
    sizes = [80 * GIB, 24 * GIB]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=sizes[index]))
    (tmp_path / "nvme0n1").touch()  # a disk
    return tmp_path


@pytest.mark.parametrize("file", ["nvidia0", "nvidiactl", "nvhost-gpu", "nvmap", "kfd", "dxg"])
def test_torch_counts_the_gpus_where_a_driver_is_installed_and_the_smallest_memory_is_returned(
    file: str, devices: Path
) -> None:
    (devices / file).touch()
    assert find_gpus(devices) == (2, 24 * GIB)


def test_without_a_driver_torch_is_not_asked(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert find_gpus(devices) == (0, 0)


def test_on_other_systems_torch_is_always_asked(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert find_gpus(devices) == (2, 24 * GIB)


def test_a_driver_without_a_gpu_counts_as_none(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (devices / "nvidiactl").touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_gpus(devices) == (0, 0)


def test_the_count_on_this_machine_is_that_of_torch() -> None:
    assert find_gpus()[0] == torch.cuda.device_count()


def test_gpus_are_named_each_kind_once_and_without_any_the_cpu_is(
    devices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    processors = tmp_path / "cpuinfo"
    processors.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: A CPU @ 2 GHz\n\nmodel name\t: A CPU @ 2 GHz\n")
    assert cpu_name(processors) == "A CPU @ 2 GHz"
    assert cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())
    monkeypatch.setattr("grid.tune.gpus.find_gpus", lambda: (0, 0))
    assert device_names() == (cpu_name(),)
    monkeypatch.setattr("grid.tune.gpus.find_gpus", lambda: (2, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    assert device_names() == ("H100",)
