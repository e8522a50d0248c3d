"""No secret of a URI, an argument or a message is shown, whatever its characters."""

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL, make_url

from grid.arguments import Parser, run_command
from grid.config import InputError
from grid.masking import mask, mask_arguments, mask_message
from grid.run import main
from grid.train.checkpoints import Checkpoints
from grid.wording import first_line

SECRETS = st.text(min_size=1, max_size=12).map(lambda middle: f"SEC{middle}RET")
PARAMETERS = (
    *("password", "PWD", "sslpassword", "passwd", "auth_token", "access_token", "aws_secret_access_key"),
    *("AWSAccessKeyId", "api-key", "AccountKey", "X-Amz-Signature", "sig", "db_pass", "odbc_connect"),
)


def is_hidden(shown: str) -> bool:
    return "SEC" not in shown and "RET" not in shown


@given(
    password=SECRETS, user=st.sampled_from(["me", "o'me", ""]), driver=st.sampled_from(["postgresql", "mysql+pymysql"])
)
def test_what_sqlalchemy_takes_for_a_password_is_hidden(password: str, user: str, driver: str) -> None:
    url = URL.create(driver, user, password, "db.example.org", 5432, "grid").render_as_string(hide_password=False)
    assert make_url(url).password == password
    assert is_hidden(mask(url))
    assert is_hidden(mask(f"--store={url}"))
    assert mask(url).endswith("@db.example.org:5432/grid")


@given(secret=SECRETS, name=st.sampled_from(PARAMETERS), later=st.sampled_from([{}, {"sslmode": "require"}]))
def test_what_sqlalchemy_takes_for_a_secret_parameter_is_hidden(secret: str, name: str, later: dict[str, str]) -> None:
    url = URL.create("postgresql", host="db", database="grid", query={"user": "me", name: secret, **later})
    assert secret in url.query.values()
    shown = mask(url.render_as_string(hide_password=False))
    assert is_hidden(shown)
    assert shown.startswith("postgresql://db/grid?")


@given(secret=SECRETS)
def test_a_secret_that_nobody_quoted_is_hidden(secret: str) -> None:
    assert is_hidden(mask(f"postgresql://me:{secret}@db:none/grid"))
    assert is_hidden(mask(f"mysql://db/grid?password={secret}&x=1"))
    assert is_hidden(mask(f"mssql+pyodbc:///?odbc_connect=Driver={{ODBC Driver 18}};UID=me;PWD={{{secret}}};x=1"))
    assert is_hidden(mask(f"--store=mssql+pyodbc://me:{secret}@db?driver=A+B"))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://ghp_SECRET@host/path", "https://***@host/path"),
        ("https://SECRET:x-oauth-basic@host", "https://***@host"),
        ("http://me:SEC/RET@127.0.0.1:5000", "http://***@127.0.0.1:5000"),
        ("s3://KEYSECRET:a/b+c@bucket/folder", "s3://***@bucket/folder"),
        ("s3://bucket/x?region=eu&secret_key=SECRET", "s3://bucket/x?region=eu&secret_key=***"),
        ("sqlite+pysqlcipher://:SECRET@/grid.db", "sqlite+pysqlcipher://:***@/grid.db"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3DSECRET", "mssql+pyodbc:///?odbc_connect=***"),
        ("postgresql://db/grid?options=-c%20password%3DSECRET", "postgresql://db/grid?options=-c password=***"),
        ("mysql://db/grid?p%61ssword=SECRET", "mysql://db/grid?p%61ssword=***"),
        ("MLFLOW_TRACKING_PASSWORD=SECRET", "MLFLOW_TRACKING_PASSWORD=***"),
    ],
)
def test_tokens_and_keys_are_hidden_and_the_rest_is_shown(uri: str, shown: str) -> None:
    assert mask(uri) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@office/mlflow.db",
        "file:///home/me@office/mlartifacts",
        "postgresql://me@db:5432/grid?sslmode=require",
        "http://127.0.0.1:5000",
        "--only=model=mlp,cnn",
        "s3://bucket/folder",
    ],
)
def test_what_holds_no_secret_is_shown_as_it_is(text: str) -> None:
    assert mask(text) == text


def test_the_value_after_a_secret_option_is_hidden() -> None:
    arguments = ["--password", "SECRET", "--token=SECRET", "--seeds", "2", "--store", "mysql://me:SEC RET@db/grid"]
    masked = ["--password", "***", "--token=***", "--seeds", "2", "--store", "mysql://me:***@db/grid"]
    assert mask_arguments(arguments) == masked


def test_a_message_keeps_its_reason() -> None:
    message = "can't open 'http://me:SECRET@h/x': refused; Authorization: Bearer SECRETSECRET; pass another --store"
    shown = "can't open 'http://***@h/x': refused; Authorization: Bearer ***; pass another --store"
    assert mask_message(message) == shown
    assert first_line(OSError("no answer from http://me:SECRET@h/?token=SECRET\nmore")) == (
        "no answer from http://***@h/?token=***"
    )


def test_errors_of_commands_and_of_wrong_arguments_hide_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise InputError("no such thing as postgresql://me:SECRET@db/grid?password=SECRET")

    assert run_command("grid.run", fail) == 2
    with pytest.raises(SystemExit):
        Parser(prog="python -m grid.run").parse_args(["postgresql://me:SECRET@db/grid"])
    err = capsys.readouterr().err
    assert err.count("postgresql://me:***@db/grid") == 2
    assert is_hidden(err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stoer", "postgresql://me:SEC RET@db/grid"],
        ["--password", "SECRET"],
        ["--store", "foo://db/grid?password=SECRET"],
        ["--storage", "foo://KEY:SECRET@bucket"],
        ["--address", "ray://me:SECRET@head:6379x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_is_refused_shows_no_secret(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    try:
        exit_code = main()
    except SystemExit as ended:  # argparse's own problems
        exit_code = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert (exit_code, out, err.count("\n")) == (2, "", 1)
    assert is_hidden(err)


def test_a_word_as_long_as_a_page_is_masked_in_time() -> None:
    page = "<html>" + "x" * 50_000 + "&password="
    began = time.process_time()
    assert mask_message(f"{page}hidden {page}") == f"{page}*** {page}"
    assert time.process_time() - began < 5


def test_the_keys_of_a_storage_are_hidden() -> None:
    with pytest.raises(InputError, match="unknown storage 'foo://\\*\\*\\*@bucket'") as refused:
        Checkpoints("foo://KEY:SECRET@bucket", "grid")
    assert is_hidden(str(refused.value))
    assert str(Checkpoints("s3://KEY:SECRET@bucket/folder?region=eu-west-1", "grid")) == (
        "s3://***@bucket/folder?region=eu-west-1"
    )
