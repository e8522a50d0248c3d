import socket
from pathlib import Path

import pytest

from grid.config import InputError
from grid.store_uri import artifact_location, check_store_uri, slug


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
    ],
)
def test_a_password_is_never_shown(uri: str) -> None:
    with pytest.raises(InputError, match="can't open the store") as error:
        check_store_uri(uri)
    assert "sec" not in str(error.value)
    assert "ret" not in str(error.value).replace("store", "")
