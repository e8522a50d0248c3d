"""How a run starts: workers import early, no unused server is started, and a problem is one line."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from grid.tune.connection import _listed
from tests.waiting import wait_until

EARLY = """
import sys
import psutil
import ray
from grid.tune import connection

connection.connect(None, 1)
ask = ray.remote(num_cpus=1)(lambda: [name in sys.modules for name in ("grid.tune.tuner", "torch._dynamo")])
print(ray.get(ask.remote()))
servers = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
print([any(name in server for server in servers) for name in ("gcs_server", "monitor", "dashboard/dashboard.py")])
connection.disconnect()
"""

SILENT = """
import time
from grid.tune import connection

connection.QUIET_SECONDS, connection.ANSWER_SECONDS = 0.5, 1
packing = connection.connect(None, 1)
print(list(connection.call_on_nodes(time.sleep, 60, packing=packing, failing="can't sleep").values()))
connection.ANSWER_SECONDS = 1200
print(list(connection.call_on_nodes(int, "7", packing=packing, failing="can't read").values()))
print(list(connection.call_on_nodes(int, "x", packing=packing, failing="can't read").values()))
connection.disconnect()
"""

DYING = """
import time
import psutil
from grid.tune import connection

connection.connect(None, 1)
next(child for child in psutil.Process().children(recursive=True) if child.name() == "raylet").kill()
time.sleep(60)
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.mark.slow
def test_workers_import_early_and_a_private_ray_starts_no_unused_servers(tmp_path: Path) -> None:
    done = python("-c", EARLY, cwd=tmp_path)
    assert done.stdout.splitlines() == ["[True, True]", "[True, False, False]"], done.stderr


@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named_early_and_given_up_late(tmp_path: Path) -> None:
    done = python("-c", SILENT, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "['does not answer within 1 s; wait until it is less busy, or take it out']",
        "[7]",
        "[\"can't read (ValueError: invalid literal for int() with base 10: 'x')\"]",
    ], done.stderr
    named, *_ = done.stderr.splitlines()
    assert re.fullmatch(r"note: waiting for 127\.0\.0\.1 \(.+\), silent for 0 s: busy, or down", named)


def test_of_many_silent_nodes_the_first_are_named() -> None:
    assert _listed(["a", "b", "c"]) == "a, b, c"
    assert _listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 others"


@pytest.mark.slow
def test_every_command_that_has_started_ray_ends_with_it_and_says_how_to_continue(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(DYING)
    done = python("-m", "command", "--password", "hidden", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("\nRay died during the run; continue with:  python -m command --password '***'\n")


@pytest.mark.slow
def test_damaged_files_are_reported_in_one_line_while_ray_starts_and_nothing_is_written(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (raw / f"emnist-balanced-train-{part}").write_bytes(b"no images")
    done = python("-m", "grid.run", "--grid", "mlp", "--data", "emnist-balanced", "--address", "local", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "text that begins with 'no images', where an IDX file begins with two zeros; delete it" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_ray_is_started_before_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys, grid.driver.launch; print([name in sys.modules for name in ('ray', 'torch', 'mlflow')])"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[True, False, False]"


def test_preloading_leaves_the_garbage_collector_on_and_does_not_touch_the_gpu(tmp_path: Path) -> None:
    code = "import gc, grid.tune.preload, torch; print(gc.isenabled(), torch.cuda.is_initialized())"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "True False"


def _has_children(pid: int) -> bool:
    return bool(psutil.Process(pid).children())


@pytest.mark.slow
def test_ctrl_c_during_preparation_ends_it_and_the_same_command_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grid.run", "--grid", "smoke", "--per-class", "10", "--address", "local"]
    # As in a terminal: a shell without job control starts background commands, such as this test, with SIGINT ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    for seconds in (0.0, 0.2, 1.0):  # the first are in the middle of imports, where a library may swallow it
        started = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        wait_until(partial(_has_children, started.pid))  # such as Ray's
        time.sleep(seconds)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=900)
        assert started.returncode == 130
        assert said == "grid.run: interrupted; run the same command to continue\n"
    only = ["--only=activation=relu", "--only=optimizer=adam", "--only=dropout=off", "--epochs", "1"]
    assert python(*command[1:], *only, cwd=tmp_path).returncode == 0
