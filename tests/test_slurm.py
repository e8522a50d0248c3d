"""`cluster-slurm.sh` on a real Slurm: a grid that is sent back into the queue, cancelled, and submitted once more."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.audit import audit
from tests.slurm import Slurm, missing, slurm
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
LACKING = missing() or ("" if (Path(sys.prefix) / "bin" / "activate").exists() else "needs a virtual environment")
PATIENCE_SECONDS = 900.0
TRIALS = 32
wait = partial(wait_until, seconds=PATIENCE_SECONDS, every=0.5)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(4 * PATIENCE_SECONDS),
    pytest.mark.skipif(bool(LACKING), reason=LACKING),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    project, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("home")
    (project / ".venv").symlink_to(sys.prefix)
    with slurm(project, home) as cluster:
        yield cluster


def test_a_grid_whose_time_is_up_and_that_is_cancelled_is_completed_and_leaves_nothing(
    cluster: Slurm, glyphs_dir: Path
) -> None:
    grid = ["--grid", "smoke", "--only=model=mlp", "--seeds=2", "--per-class=60", "--controls=0", "--no-report"]
    script = [
        "--nodes=2",
        "--cpus-per-task=2",
        str(ROOT / "cluster-slurm.sh"),
        *grid,
        "--experiment=queued",
        f"--data-dir={glyphs_dir}",
    ]
    job = cluster.submit(*script)
    wait_until_it_trains(cluster, job, times=1)
    assert "2 nodes, 4 CPUs" in cluster.log(job)
    with suspended_driver(job):  # else the grid may be over first
        check_closed(cluster, job)
        cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm itself does when the time is nearly up
    wait(lambda: cluster.of(job, "Restarts") == "1", explain=lambda: cluster.log(job))
    assert "interrupted" in cluster.log(job)
    wait_until_it_trains(cluster, job, times=2)
    cluster.call("scancel", job)
    cluster.wait_until_it_is_idle()
    assert cluster.of(job, "JobState") == "CANCELLED"
    assert f"{TRIALS}/{TRIALS} done" not in cluster.log(job)
    again = cluster.submit("--wait", *script)
    assert cluster.of(again, "JobState") == "COMPLETED"
    assert f"{TRIALS}/{TRIALS} done" in cluster.log(again)
    found = audit(f"sqlite:///{cluster.project}/mlflow.db", cluster.project, "queued", ["queued"])
    assert (found.trials, found.clean) == (TRIALS, True), found
    assert list(cluster.project.glob("storage/*/checkpoints/*")) == []
    for number in (job, again):
        wait(lambda number=number: not left_of(number), explain=lambda number=number: str(left_of(number)))


def wait_until_it_trains(cluster: Slurm, job: str, *, times: int) -> None:
    """Wait until a job has said so often that there is something to train, and trains."""

    def trains() -> bool:
        assert cluster.of(job, "JobState") in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), cluster.log(job)
        return cluster.log(job).count("left to run") == times and _ray_of(job)

    wait(trains, explain=lambda: cluster.log(job))


def _ray_of(job: str) -> bool:
    """Return whether trials run in the Ray of a job."""
    return any("TrialWorker" in process.info["name"] for process in processes_of(job))


@contextmanager
def suspended_driver(job: str) -> Iterator[None]:
    """Let the driver of a job do nothing, and so its trials begin no further epoch."""
    (driver,) = (process for process in processes_of(job) if "grid.run" in process.info["cmdline"])
    driver.suspend()
    try:
        yield
    finally:
        driver.resume()


def processes_of(job: str) -> list[psutil.Process]:
    """Return the processes of a job that still run, with their names and commands."""
    everything = psutil.process_iter(["name", "cmdline", "environ"])
    return [process for process in everything if (process.info["environ"] or {}).get("SLURM_JOB_ID") == job]


def check_closed(cluster: Slurm, job: str) -> None:
    """Assert that Ray answers nobody without the token, and that its dashboard listens on loopback."""
    port = 20_000 + int(job) % 1000 * 12
    command = [str(Path(sys.prefix) / "bin" / "ray"), "status", "--address", f"127.0.0.1:{port}"]
    stranger = {**os.environ, "HOME": "/nonexistent", "RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "nvalid" in refused.stdout + refused.stderr
    listening = {found.laddr for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening if address.port == port + 2} == {"127.0.0.1"}
    for private in (Path(cluster.environment["HOME"]) / ".ray" / "auth_token", Path(f"/tmp/ray-{job}")):
        assert private.stat().st_mode & 0o077 == 0


def left_of(job: str) -> list[str]:
    """Return the folders and processes of a job that are still there."""
    files = [str(path) for path in Path("/tmp").glob(f"ray-{job}*")]  # where the script puts them
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return files + [command for command in commands if f"/tmp/ray-{job}/" in command]
