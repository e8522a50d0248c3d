import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from mlflow.exceptions import MlflowException

from analysis.store import read_experiment
from grid.config import InputError
from grid.record.store import Store


def test_there_is_one_parent_run_however_often_an_experiment_is_created(store: Store) -> None:
    again = Store(store.uri, "some grid")
    again.create()
    assert (again.experiment_id, again.parent_id) == (store.experiment_id, store.parent_id)


@pytest.mark.parametrize("call", ["create", "trials"])
def test_a_store_that_is_down_is_reported_in_one_line(call: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise OSError("the cable is cut")

    for name in ("get_experiment_by_name", "search_runs"):
        monkeypatch.setattr(store.client, name, refuse)
    with pytest.raises(InputError, match="^can't use the store sqlite.*: the cable is cut; pass another --store$"):
        getattr(store, call)()


def create(uri: str) -> None:
    Store(uri, "another grid").create()


def read(uri: str) -> None:
    read_experiment(uri, "some grid")


@pytest.mark.parametrize("use", [create, read])
@pytest.mark.parametrize("damage", ["DROP TABLE runs", "DROP TABLE experiments"])
def test_an_error_of_the_database_is_raised_and_not_printed_as_well(
    damage: str, use: Callable[[str], None], store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"))) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute(damage)
    with pytest.raises(
        InputError, match="^can't (use|read|open) the store sqlite.*(no such (table|column)|not one of MLflow)"
    ):
        use(store.uri)
    assert capfd.readouterr() == ("", "")


@contextmanager
def locked_by_another_process(uri: str) -> Iterator[None]:
    path = uri.removeprefix("sqlite:///")
    code = f"""
import sqlite3, sys
database = sqlite3.connect({path!r}, isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.slow  # MLflow waits for 20 s
@pytest.mark.parametrize("use", [create, read])
def test_a_locked_database_is_one_line(
    use: Callable[[str], None], store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    with locked_by_another_process(store.uri), pytest.raises(InputError, match="database is locked"):
        use(store.uri)
    assert capfd.readouterr() == ("", "")


def test_what_fails_while_an_experiment_is_deleted_is_not_given_up_where_it_is_restored_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = store.client.create_run(store.experiment_id).info.run_id
    errors = []
    store.client.delete_experiment(store.experiment_id)
    for write in (lambda: store.client.set_tag(run_id, "a", "b"), lambda: store.client.create_run(store.experiment_id)):
        with pytest.raises(MlflowException) as raised:
            write()
        errors.append(raised.value)
    look = store._is_deleted

    def restore_and_look() -> bool:
        if look():
            store.client.restore_experiment(store.experiment_id)
        return look()

    monkeypatch.setattr(store, "_is_deleted", restore_and_look)
    assert not store.is_gone(run_id, errors[0])
    assert not any(map(store.is_refusal, errors))
    store.client.delete_run(run_id)
    assert store.is_gone(run_id, errors[0])


def test_an_artifact_is_on_the_disk_before_it_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("grid.record.store.sync", lambda path: synced.append(path.name))
    store.attach(store.parent_id, {"test/one.csv": b"1"})
    assert synced == ["one.csv", "test"]


def test_a_look_for_another_trial_forgets_no_run_that_was_left_out(store: Store) -> None:
    tags = {"kind": "trial", "trial_key": "a"}
    run_id = store.client.create_run(store.experiment_id, tags=tags).info.run_id
    assert store.trials() == {}
    assert store.run_ids(trial_key="b") == {}
    assert list(store.left_out.values()) == [[run_id]]
