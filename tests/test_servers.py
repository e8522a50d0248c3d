"""Grids whose records are in PostgreSQL, and whose checkpoints and files are behind an S3 API; all servers are real."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.exceptions import ClientError

from analysis.store import read_experiment
from benchmarks.chaos.__main__ import main as chaos
from benchmarks.servers import postgres as postgres_server
from benchmarks.servers.local import free_port, kill_tree
from benchmarks.servers.mlflow_server import start_mlflow
from benchmarks.servers.object_store import BUCKET, RIGHTS, ObjectStore, object_store
from benchmarks.servers.postgres import Postgres, postgres
from grid.config import InputError
from grid.record.store import Store
from grid.store_uri import check_store_uri
from grid.train.checkpoints import Checkpoints, StorageError
from tests.test_follow import Run

LACKING = postgres_server.missing()
pytestmark = pytest.mark.slow
needs_postgres = pytest.mark.skipif(bool(LACKING), reason=LACKING)

ROOT = Path(__file__).parents[1]
GRID = ["--grid", "smoke", "--only=model=mlp", "--only=activation=relu", "--per-class", "20", "--epochs", "3"]
TRIALS = 8


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("bucket")) as bucket:
        yield bucket


@pytest.fixture
def in_bucket(bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    return Checkpoints(bucket.uri("storage"), "some grid")


def test_the_documented_rights_allow_what_checkpoints_need_and_no_more(
    in_bucket: Checkpoints, bucket: ObjectStore
) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    documented = json.loads(page.partition("```json\n")[2].partition("```")[0].replace("BUCKET", BUCKET))
    assert documented["Statement"] == RIGHTS
    in_bucket.check()
    for key in ("kept", "deleted"):
        in_bucket.save(key, {"epoch": 3})
    in_bucket.delete("deleted")
    assert bucket.objects("storage/") == ["storage/some grid/checkpoints/kept.pt"]
    assert in_bucket.load("kept", "cpu") == {"epoch": 3}
    assert in_bucket.load("never saved", "cpu") is None
    in_bucket.delete_newer({"kept": 2})
    assert bucket.objects("storage/") == []
    in_bucket.save("kept", {"epoch": 3})
    in_bucket.clear()
    assert bucket.objects("storage/") == []
    with pytest.raises(ClientError, match="Access Denied"):
        boto3.client("s3").create_bucket(Bucket="another")


def test_requests_that_s3_refuses_for_a_while_are_repeated(in_bucket: Checkpoints, bucket: ObjectStore) -> None:
    bucket.throttled.touch()
    begun = time.monotonic()
    threading.Timer(2, bucket.throttled.unlink).start()
    in_bucket.save("patient", {"epoch": 3})
    assert time.monotonic() - begun > 1
    assert in_bucket.load("patient", "cpu") == {"epoch": 3}


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("AWS_SECRET_ACCESS_KEY", "ACCESS_DENIED"), ("AWS_ACCESS_KEY_ID", "ACCESS_DENIED")],
)
def test_a_wrong_key_is_one_line_without_it(
    variable: str, reason: str, bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**bucket.environment, variable: "wrong-secret"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        StorageError, match=f"^can't write to the storage 's3://{BUCKET}/storage': AWS Error "
    ) as raised:
        Checkpoints(bucket.uri("storage"), "some grid").check()
    assert "\n" not in str(raised.value)
    assert "wrong-secret" not in str(raised.value)
    assert reason in str(raised.value)


@dataclass
class Servers:
    """A PostgreSQL, a bucket, and MLflow's server on both."""

    uri: str
    database: Postgres
    bucket: ObjectStore
    folder: Path

    def run(self, *command: str) -> str:
        """Run a command as a user does, and return what it prints."""
        secrets = {**self.bucket.environment, "MLFLOW_TRACKING_URI": self.uri, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env={**os.environ, **secrets},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        log = self.folder / "server.log"
        assert done.returncode == 0, f"{done.stdout}\n{log.read_text()[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def servers(bucket: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder, port = tmp_path_factory.mktemp("servers"), free_port()
    with postgres() as database:
        server = start_mlflow(folder, port, database.uri, bucket.uri("artifacts"), bucket.environment)
        try:
            yield Servers(f"http://127.0.0.1:{port}", database, bucket, folder)
        finally:
            kill_tree(server)


@needs_postgres
def test_a_grid_is_run_confirmed_and_reported(servers: Servers, glyphs_dir: Path) -> None:
    shared = ["--experiment", "remote", "--data-dir", str(glyphs_dir), "--storage", servers.bucket.uri("storage")]
    assert f"{TRIALS}/{TRIALS} done" in servers.run("grid.run", *GRID, *shared)
    assert servers.bucket.objects("storage/remote") == []
    servers.run("grid.confirm", *shared, "--top", "1", "--seeds", "1", "--register", "reader")
    assert len(servers.bucket.objects("artifacts/")) > TRIALS
    assert servers.bucket.objects("storage/remote") == []
    servers.run("analysis.report", "--experiment", "remote", "--out", "page.html")
    assert "remote" in (servers.folder / "page.html").read_text()
    with pytest.raises(
        InputError, match=r"with the MLflow server that wrote it; pass the server's address as --store$"
    ):
        read_experiment(servers.database.uri, "remote")


@needs_postgres
def test_a_database_is_a_store_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with postgres() as database:
        uri = check_store_uri(database.uri)
        password = tmp_path / "pgpass"
        password.write_text(f"*:*:*:*:{urlsplit(uri).password}")
        password.chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(password))
        store = Store(uri.replace(f":{urlsplit(uri).password}", ""), "direct")
        store.create()
        run = Run(store, tmp_path)
        run.end_trials(3)
        assert len(read_experiment(uri, "direct").trials) == 3
        assert set(store.run_ids()) == set(store.trials())
        database.stop()
        with pytest.raises(InputError, match=r"^can't open the store postgresql\+psycopg://grid:\*\*\*@127\.0\.0\.1"):
            check_store_uri(database.uri)
        database.start()
        assert len(read_experiment(uri, "direct").trials) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in Linux's /proc")
def test_nothing_is_lost_when_drivers_and_servers_fail(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["driver killed", "second driver, slow", "server killed"]
    kinds += ["storage away"] if LACKING else ["database restarted", "S3 throttled"]
    failures = [word for kind in kinds for word in ("--failure", kind)]
    where = [] if LACKING else ["--servers"]
    assert chaos([*where, "--kills", str(len(kinds)), "--seeds", "1", *failures]) == 0
    assert "0 lost, 0 doubled, 0 orphans, 0 different, 0 wrong decisions" in capsys.readouterr().out
