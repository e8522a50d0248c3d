import socket
import sqlite3
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from analysis.store import read_experiment
from grid.config import InputError
from grid.record.store import Store
from grid.store_client import artifact_contents, client_uri
from grid.store_uri import artifact_location, check_store_uri, is_default, slug, sqlite_path


def test_the_default_is_a_file_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_store_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_relative_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_store_uri("sqlite:///here.db") == f"sqlite:///{tmp_path}/here.db"


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_store_uri(f"sqlite:///{tmp_path}/new.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("sqlite://", "it names no file"),
        ("sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        ("sqlite:///{folder}", "it is not a file"),
        ("sqlite:///{folder}/text.db", "the file is not a sqlite database"),
        ("sqlite:////proc/new.db", "can't write to the folder /proc "),
        ("./mlruns", "give sqlite:///FILE, http://HOST:PORT or a database URI"),
        ("foo://bar", "give sqlite:///FILE"),
        ("http://127.0.0.1:99999", "Port out of range"),
    ],
)
def test_a_store_that_cannot_be_opened_is_refused_with_the_reason(uri: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database at all")
    with pytest.raises(InputError, match=rf"^can't open the store .*{problem}"):
        check_store_uri(uri.format(folder=tmp_path))


def test_a_server_that_does_not_answer_is_refused() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(InputError, match="refused; start the server or pass another --store"):
            check_store_uri(uri)


def test_a_server_that_answers_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert check_store_uri(uri) == uri


def test_a_reader_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        check_store_uri(f"sqlite:///{tmp_path}/new.db", must_exist=True)


def test_artifacts_of_a_file_lie_beside_it_and_those_of_a_server_are_its_own_matter() -> None:
    assert (artifact_location("sqlite:////a/b.db", "my grid") or "").startswith("file:///a/mlartifacts/my_grid-")
    assert artifact_location("http://127.0.0.1:5000", "my grid") is None


def test_one_experiment_name_in_two_stores_is_two_slugs() -> None:
    assert slug("sqlite:////a.db", "x") != slug("sqlite:////b.db", "x")
    assert "/" not in slug("sqlite:////a.db", "x/../y")


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:sec:ret@127.0.0.1:1",
        "postgresql://me:sec@ret@127.0.0.1:1/db",
        "postgresql://me:sec/ret@127.0.0.1:1/db",
        "postgresql://me:secret@127.0.0.1:none/db",
        "postgresql://db:none/grid?password=secret",
        "http://127.0.0.1:1/?token=secret",
    ],
)
def test_a_password_is_never_shown(uri: str) -> None:
    with pytest.raises(InputError, match="can't open the store") as error:
        check_store_uri(uri)
    assert "sec" not in str(error.value)
    assert "ret" not in str(error.value).replace("store", "")


# Names that a URI escapes

ODD_NAMES = ("what?", "a=b?c", "a#b", "100%", "x%20y", "%3F", "two words", "gr\u00fc\u00dfe", "a&b;c", "file:x")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_store_lies_where_the_user_is_whatever_the_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    uri = check_store_uri(None)
    Store(uri, "a").create()
    assert {file.name for file in tmp_path.iterdir()} == {name}
    assert {file.name for file in folder.iterdir()} == {"mlflow.db"}
    assert (sqlite_path(uri), is_default(uri), check_store_uri(uri)) == (folder / "mlflow.db", True, uri)
    with pytest.raises(InputError, match="^experiment 'a' in .* has no trial yet"):
        read_experiment(uri, "a")


@pytest.mark.parametrize("name", ODD_NAMES[2:])
def test_an_absolute_store_may_be_given_as_the_shell_spells_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert sqlite_path(check_store_uri(f"sqlite:///{tmp_path}/{name}/x.db")) == tmp_path / name / "x.db"


def test_an_escaped_store_is_taken_as_mlflow_takes_it(tmp_path: Path) -> None:
    (tmp_path / "two words?").mkdir()
    assert sqlite_path(check_store_uri(f"sqlite:///{tmp_path}/two%20words%3F/x.db")) == tmp_path / "two words?/x.db"


def test_an_ordinary_store_has_the_same_uri_everywhere(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert check_store_uri(uri) == client_uri(uri) == uri


@pytest.mark.parametrize("uri", ["sqlite:///x.db?mode=ro", "sqlite:///file:x.db?mode=ro&uri=true"])
def test_options_of_sqlite_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"options such as \?mode=ro are not taken"):
        check_store_uri(uri)


# Files that are no store


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE places (url TEXT)")
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(InputError, match="it is a sqlite database, but not one of MLflow; pass another --store$"):
            check_store_uri(f"sqlite:///{path}", read_only=read_only)
    assert path.read_bytes() == before


def test_a_damaged_store_is_refused(store_uri: str, tmp_path: Path) -> None:
    content = (tmp_path / "mlflow.db").read_bytes()
    (tmp_path / "mlflow.db").write_bytes(content[:100] + b"\xff" * 4000 + content[4100:])
    with pytest.raises(InputError, match="the database is damaged"):
        check_store_uri(store_uri)


# The default


def test_what_users_of_mlflow_have_set_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/ours.db")
    assert check_store_uri(None) == f"sqlite:///{tmp_path}/ours.db"
    given = check_store_uri("sqlite:///mlflow.db")
    assert given == f"sqlite:///{tmp_path}/mlflow.db"
    assert not is_default(given)


COMMANDS = (
    "grid.run",
    "grid.confirm",
    "grid.record.__main__",
    "analysis.rank",
    "analysis.audit",
    "analysis.effects",
    "analysis.report",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_that_default_and_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    main = import_module(command).main
    replay = ["--replay"] if "record" in command else []
    assert main(["--experiment", "a", *replay]) == 2
    message = "can't open the store 'databricks'; give sqlite:///FILE, http://HOST:PORT or a database URI"
    assert f"{message} (from MLFLOW_TRACKING_URI)\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "$MLFLOW_TRACKING_URI" in capsys.readouterr().out


def test_a_database_server_that_does_not_answer_is_refused() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="refused; start the server or pass another --store"):
            check_store_uri(f"postgresql://me@127.0.0.1:{closed.getsockname()[1]}/db")


class Asked:
    """A client that keeps the names of what it is asked."""

    def __init__(self, client: Any):
        self._client = client
        self.questions: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.questions.append(name)
        return getattr(self._client, name)


@pytest.mark.parametrize("uri", ["sqlite:////store.db", "http://127.0.0.1:5000"])
def test_files_of_a_run_are_read_here_or_listed_once_for_each_folder(uri: str, store: Store) -> None:
    files = {f"commands/{number}.json": b"%d" % number for number in range(3)}
    store.attach(store.parent_id, {**files, "grid.json": b"{}", "samples.png": b"not asked for"})
    client = Asked(store.client)
    wanted = [*files, "grid.json", "commands/3.json", "more_controls.json"]
    found = artifact_contents(client, uri, store.client.get_run(store.parent_id), wanted)
    assert found == {**files, "grid.json": b"{}"}
    remotely = ["list_artifacts"] * 2 + ["download_artifacts"] * 4
    assert client.questions == ([] if uri.startswith("sqlite") else remotely)
