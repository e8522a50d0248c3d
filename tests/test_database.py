"""A sqlite store is made whole, whoever starts at once or dies meanwhile, and never altered by the way."""

import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import mlflow.store
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow.store.tracking.dbmodels.initial_models import Base
from mlflow.tracking import MlflowClient

from analysis.store import read_experiment
from grid.config import InputError, TrialConfig
from grid.record import database
from grid.record.moved import find_move
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.waiting import without_waiting

MIGRATIONS = str(Path(mlflow.store.__path__[0], "db_migrations"))
CREATE = "import sys; from grid.record.store import Store; Store(f'sqlite:///{sys.argv[1]}', sys.argv[2]).create()"


def set_version(path: Path, version: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [version])


def dump(path: Path) -> list[list[str]]:
    """Return the words of the statements that make a database; MLflow puts the choices of a column in any order."""
    with closing(sqlite3.connect(path)) as connection:
        lines = [line for line in connection.iterdump() if not line.startswith('INSERT INTO "experiments"')]
    return sorted(sorted(re.findall(r"\w+", line)) for line in lines)


def migrate(path: Path, revision: str) -> None:
    """Create the tables of the version of MLflow that had a revision as its newest."""
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def make_older(store: Path, older: Path, steps: int) -> None:
    """Write what a store holds into the tables of an older MLflow, so many migrations ago."""
    revisions = [script.revision for script in ScriptDirectory(MIGRATIONS).walk_revisions()]
    migrate(older, revisions[steps])
    with closing(sqlite3.connect(older)) as connection, connection:
        connection.execute("ATTACH ? AS newer", [str(store)])
        for table in ("experiments", "experiment_tags", "runs", "tags", "params", "metrics", "latest_metrics"):
            wanted, found = (
                {row[1] for row in connection.execute(f"PRAGMA {schema}.table_info({table})")}
                for schema in ("main", "newer")
            )
            columns = ", ".join(sorted(wanted & found))
            connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM newer.{table}")


def test_drivers_that_start_at_once_in_a_fresh_folder_share_one_store(tmp_path: Path) -> None:
    experiments = ("a", "a", "b")
    path = tmp_path / "mlflow.db"
    drivers = [
        subprocess.Popen([sys.executable, "-c", CREATE, str(path), name], stderr=subprocess.PIPE, text=True)
        for name in experiments
    ]
    for driver in drivers:
        assert (without_waiting(driver.communicate()[1]), driver.returncode) == ("", 0)
    client = MlflowClient(f"sqlite:///{path}")
    assert {found.name for found in client.search_experiments()} == {"Default", *experiments}


def test_a_store_is_made_as_mlflow_makes_it(tmp_path: Path) -> None:
    MlflowClient(f"sqlite:///{tmp_path}/mlflows.db")
    database.open_client(f"sqlite:///{tmp_path}/ours.db")
    assert dump(tmp_path / "ours.db") == dump(tmp_path / "mlflows.db")


def test_a_driver_that_is_killed_while_it_makes_a_store_does_not_stop_the_next(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    crash = """
import itertools, os, sys
from grid.record import database
from grid.record.moved import find_move
def die():
    os.kill(os.getpid(), 9)
    yield
schema = database._schema
database._schema = lambda path: itertools.chain(schema(path)[:100], die())
"""
    killed = subprocess.run([sys.executable, "-c", crash + CREATE, str(path), "a"], check=False)
    assert (killed.returncode, path.exists()) == (-9, True)
    with pytest.raises(InputError, match="it is empty"):
        read_experiment(f"sqlite:///{path}", "a")
    Store(f"sqlite:///{path}", "a").create()
    assert MlflowClient(f"sqlite:///{path}").get_experiment_by_name("a") is not None


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    Store(f"sqlite:///{tmp_path}/mlflow.db", "a").create()


def test_a_server_that_is_making_the_store_is_waited_for(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SETTLED_SECONDS", 60)
    path = tmp_path / "mlflow.db"
    head = ScriptDirectory(MIGRATIONS).get_current_head()
    set_version(path, "being made")
    end = threading.Timer(1.0, set_version, (path, head))
    end.start()
    Store(store_uri, "a").create()
    assert end.finished.is_set()


def test_a_store_that_mlflow_left_half_made_is_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SETTLED_SECONDS", 0)
    revisions = [script.revision for script in ScriptDirectory(MIGRATIONS).walk_revisions()]
    migrate(tmp_path / "mlflow.db", revisions[-20])
    time.sleep(0.01)
    with pytest.raises(InputError, match=": somebody was interrupted .* holds no experiment; delete the file$"):
        Store(f"sqlite:///{tmp_path}/mlflow.db", "a")


@pytest.mark.parametrize("steps", [1, 15])
def test_the_store_of_an_older_mlflow_is_read_from_a_copy_and_written_only_after_an_upgrade(
    store: Store, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SETTLED_SECONDS", 0)
    config = TrialConfig(learning_rate=1e-3, epochs=9, seed=3)
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({}, {})
    recorder.started(config, control=False)
    recorder.ended(config, "failed", epochs_run=0, best_val_accuracy=None, error="lost")
    recorder.close(finished=True)
    older = tmp_path / "older.db"
    make_older(tmp_path / "mlflow.db", older, steps)
    before = older.read_bytes()
    assert list(read_experiment(f"sqlite:///{older}", "some grid").trials["status"]) == ["failed"]
    with pytest.raises(InputError, match=rf"keep a copy of the file, then run:  mlflow db upgrade sqlite:///{older}$"):
        Store(f"sqlite:///{older}", "some grid")
    assert older.read_bytes() == before


def interrupt_a_write(path: Path) -> None:
    """Leave what a program leaves that is killed while it writes: half a transaction, and how to undo it."""
    crash = (
        "import os, sqlite3, sys; database = sqlite3.connect(sys.argv[1]); database.execute('PRAGMA cache_size = 1');"
        "[database.execute('INSERT INTO experiment_tags VALUES (?, ?, 0)', (str(n), 'x' * 4000)) for n in range(50)];"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", crash, str(path)], check=False)
    assert Path(f"{path}-journal").stat().st_size > 0


def test_a_store_whose_driver_was_killed_while_it_wrote_goes_on(tmp_path: Path, store_uri: str) -> None:
    interrupt_a_write(tmp_path / "mlflow.db")
    Store(store_uri, "mine").create()
    assert Store(store_uri, "mine").client.get_experiment("0").tags == {}


def test_a_moved_store_whose_driver_was_killed_while_it_wrote_is_taken_over(store: Store, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    there = (tmp_path / "mlflow.db").rename(tmp_path / "there" / "mlflow.db")
    interrupt_a_write(there)
    move = find_move(f"sqlite:///{there}", store.experiment)
    assert move is not None
    assert move.former_uri == store.uri
