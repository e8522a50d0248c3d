"""How a run starts: workers import early, nothing is started in vain, and a fault is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

EARLY = """
import sys
import psutil
import ray
from grid import connection

connection.connect(None, 1)
ask = ray.remote(num_cpus=1)(lambda: [name in sys.modules for name in ("grid.tuner", "torch._dynamo")])
print(ray.get(ask.remote()))
servers = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
print(any("gcs_server" in server for server in servers), any("monitor.py" in server for server in servers))
connection.disconnect()
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_workers_import_early_and_a_private_ray_has_neither_autoscaler_nor_log_monitor(tmp_path: Path) -> None:
    done = python("-c", EARLY, cwd=tmp_path)
    assert done.stdout.splitlines() == ["[True, True]", "True False"], done.stderr


@pytest.mark.slow
def test_files_that_are_damaged_are_told_in_one_line_while_ray_starts_and_nothing_is_written(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (raw / f"emnist-balanced-train-{part}").write_bytes(b"no images")
    done = python("-m", "grid.run", "--grid", "mlp", "--data", "emnist-balanced", "--address", "local", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not an IDX file" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_a_module_that_is_preloaded_leaves_the_garbage_collector_on(tmp_path: Path) -> None:
    done = python("-c", "import gc, grid.preload; print(gc.isenabled())", cwd=tmp_path)
    assert done.stdout.strip() == "True"
