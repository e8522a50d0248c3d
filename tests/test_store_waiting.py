"""How a store is asked: proxies, time limits, and the word on the screen while it does not answer."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from analysis.store import read_experiment
from grid import store_client
from grid.config import InputError
from grid.record.store import Store
from grid.store_client import mlflow_settings, waiting_for
from grid.store_uri import check_store_uri, find_proxy

ROOT = Path(__file__).parents[1]
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def _own_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code sets
        monkeypatch.delenv(name)


class Handler(BaseHTTPRequestHandler):
    """Answers as an MLflow server does that has one experiment, `other`."""

    def do_GET(self) -> None:
        self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})

    def do_POST(self) -> None:
        self.answer(200, {"experiments": [{"experiment_id": "1", "name": "other"}]})

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass


class Refusal(Handler):
    """Answers as a proxy does that may not, or can't, go where it is sent."""

    def answer(self, status: int, content: object) -> None:
        super().answer(403, "not from here")


class OneRun(Handler):
    """Answers as an MLflow server does whose only run has ended."""

    def answer(self, status: int, content: object) -> None:
        info = {"run_id": "a", "run_uuid": "a", "run_name": "a", "experiment_id": "1", "status": "FINISHED"}
        super().answer(200, {"run": {"info": info, "data": {}}, "run_info": info})


class Other(Handler):
    """Answers as another program does: with `page`, and `status` and `headers` of its own."""

    page = b"<html>\n<form>please log in</form></html>"
    status = 200
    headers_sent: Mapping[str, str] = {}

    def answer(self, status: int, content: object) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        for name, value in {"Content-Length": str(len(self.page)), **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.page)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def ask_as_analysis(uri: str) -> None:
    read_experiment(uri, "mine")


def ask_as_driver(uri: str) -> None:
    Store(check_store_uri(uri), "mine").open(missing=False)


ASKING = pytest.mark.parametrize("ask", [ask_as_analysis, ask_as_driver])


@ASKING
@pytest.mark.parametrize(
    ("variable", "host"), [("HTTP_PROXY", "127.0.0.1"), ("http_proxy", "localhost"), ("ALL_PROXY", "127.0.0.1")]
)
def test_a_server_on_this_machine_is_never_asked_through_a_proxy(
    ask: Callable[[str], None], variable: str, host: str, dead_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("NO_PROXY", "example.com")
    with serving(Handler) as port, pytest.raises(InputError, match="^no experiment 'mine' in .*; it has other$"):
        ask(f"http://{host}:{port}")
    assert os.environ["no_proxy"] == f"example.com,{host}"


@ASKING
def test_a_proxy_that_does_not_answer_is_named_with_the_way_round_it(
    ask: Callable[[str], None], dead_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hidden@127.0.0.1:{dead_port}")
    with pytest.raises(InputError) as error:
        ask("http://store.example:5000")
    assert "its proxy (HTTP_PROXY) does not answer: " in str(error.value)
    assert "; HTTP_PROXY sends requests through a proxy, NO_PROXY=store.example sends them directly" in str(error.value)
    assert "hidden" not in str(error.value)


@ASKING
def test_a_proxy_that_refuses_is_named_with_the_way_round_it(
    ask: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Refusal) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(InputError, match="; http_proxy sends requests .* NO_PROXY=store.example sends"):
            ask("http://store.example:5000")


@ASKING
def test_a_store_that_only_a_proxy_reaches_is_reached(
    ask: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Handler) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(InputError, match="^no experiment 'mine' in http://store.example:5000; it has other$"):
            ask("http://store.example:5000")


@pytest.mark.parametrize("no_proxy", ["store.example", "example", "*", "10.0.0.0/8,.example"])
def test_a_host_that_the_user_excludes_has_no_proxy(no_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert find_proxy("http://store.example:5000") == ("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert find_proxy("http://store.example:5000") == ("", "")
    assert find_proxy("sqlite:////x.db") == ("", "")


def test_the_end_of_a_run_on_a_server_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(OneRun) as port:
        Store(f"http://127.0.0.1:{port}", "mine").client.set_terminated("a")
    assert capsys.readouterr() == ("", "")


@ASKING
def test_a_server_that_accepts_and_never_answers_is_left_in_time_with_a_word_on_the_screen(
    ask: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(store_client, "QUIET_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match="^can't (use|read) the store http.*timed out"):
            ask(uri)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" (")[0] for line in lines] == [
        f"waiting for the store {uri}",
        f"waited for the store {uri}",
    ]


@ASKING
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"page": b""}, "what answers there is no MLflow server; pass"),
        ({"page": b"{}"}, "what answers there is no MLflow server; pass"),
        ({}, "what answers there is no MLflow server: .*; pass"),
        ({"status": 404}, "what answers there is no MLflow server: .* 404 .*; pass"),
        ({"status": 401}, ": API .* 401 .*; set MLFLOW_TRACKING_USERNAME and .* or pass"),
        ({"status": 403}, ": API .* 403 .*; set MLFLOW_TRACKING_USERNAME and .* or pass"),
        ({"status": 302, "headers_sent": {"Location": "?"}}, "redirects.*; pass"),
        ({"status": 429, "headers_sent": {"Retry-After": "3600"}}, "too many 429 .*; pass"),
        ({"page": b"x", "headers_sent": {"Content-Encoding": "gzip"}}, "what answers there is no MLflow server; pass"),
    ],
)
def test_what_is_no_mlflow_or_refuses_is_left_at_once(
    ask: Callable[[str], None], answer: dict[str, object], said: str
) -> None:
    with (
        serving(type("Answer", (Other,), answer)) as port,
        pytest.raises(InputError, match=f"^can't (use|read) the store .*{said}.* another --store$"),
    ):
        ask(f"http://127.0.0.1:{port}")


class Dropping(Handler):
    """Ends its first connection without a word, as a server does that closes an idle one while it is asked."""

    dropped = False

    def answer(self, status: int, content: object) -> None:
        if type(self).dropped:
            super().answer(status, content)
        else:
            type(self).dropped = True
            self.close_connection = True


@ASKING
def test_a_connection_that_breaks_once_is_not_the_end(ask: Callable[[str], None]) -> None:
    handler = type("Once", (Dropping,), {})
    with serving(handler) as port, pytest.raises(InputError, match="^no experiment 'mine' in .*; it has other$"):
        ask(f"http://127.0.0.1:{port}")
    assert handler.dropped


class Busy(Handler):
    """Answers as a server does that is asked too much, and counts."""

    asked: Counter[str]

    def answer(self, status: int, content: object) -> None:
        self.asked[self.path.partition("?")[0].rpartition("/")[2]] += 1
        super().answer(503, {})


WRITE_READ_AND_WRITE = """
import sys
from contextlib import suppress
from importlib import import_module

uri, *modules = sys.argv[1:]
for module in modules:
    import_module(module)
from mlflow.exceptions import MlflowException
from analysis.store import read_experiment
from grid.config import InputError
from grid.record.store import Store

store = Store(uri, "mine")
for _ in range(2):
    with suppress(MlflowException):
        store.client.log_param("a run", "name", "value")
    with suppress(InputError):
        read_experiment(uri, "mine")
"""


@pytest.mark.parametrize(
    ("modules", "wish", "questions"),
    [(["grid.record.store", "analysis.store"], None, 3), (["analysis.store", "grid.record.store"], "1", 2)],
)
def test_only_questions_are_repeated_by_mlflow_whatever_is_imported_first_and_the_user_wants(
    modules: Sequence[str], wish: str | None, questions: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_HTTP_REQUEST_MAX_RETRIES"}
    environment |= {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}
    environment |= {} if wish is None else {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": wish}
    Busy.asked = Counter()
    with serving(Busy) as port:
        command = [sys.executable, "-c", WRITE_READ_AND_WRITE, f"http://127.0.0.1:{port}", *modules]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert Busy.asked == {"log-parameter": 2, "get-by-name": 2 * questions}


@pytest.mark.parametrize("name", ["MLFLOW_HTTP_REQUEST_TIMEOUT", "PGCONNECT_TIMEOUT"])
def test_what_the_user_has_set_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "77")
    assert mlflow_settings()[name] == "77"


def test_a_quick_answer_is_awaited_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting_for("http://x"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_secret_is_not_shown_while_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_client, "QUIET_SECONDS", 0.01)
    with waiting_for("postgresql://me:hidden@host/db"):
        time.sleep(0.5)
    assert "waited for the store postgresql://me:***@host/db" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A screen."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_counts_and_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_client, "QUIET_SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with waiting_for("http://127.0.0.1:5000"):
        time.sleep(1.5)
    *counted, last = screen.getvalue().split("\r")
    assert len(counted) >= 2
    assert set(counted) == {"waiting for the store http://"}  # no wider than the terminal
    assert last.startswith("\033[Kwaited for the store http://127.0.0.1:5000 (")
    assert last.endswith(" s)\n")


def test_a_closed_screen_does_not_stop_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_client, "QUIET_SECONDS", 0.01)
    screen = io.StringIO()
    screen.close()
    for stderr in (screen, None):
        monkeypatch.setattr(sys, "stderr", stderr)
        with waiting_for("http://x"):
            time.sleep(0.1)
