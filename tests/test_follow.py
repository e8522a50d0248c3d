"""The page that is written while a grid runs, in a real store and a real browser."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from analysis import follow
from analysis.page.render import UNWRITTEN, render, stamp
from analysis.report import main
from analysis.store import GridState, read_experiment, read_state
from analysis.verdict import Verdict, analyse
from grid.arguments import replace_output
from grid.config import InputError, TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.chromium import BROWSER, Tab, browsing
from tests.waiting import wait_until, without_waiting

pytestmark = pytest.mark.usefixtures("own_cache")

EVERY = 0.05
PLANNED = 4
ACTIVATIONS = ("relu", "gelu", "elu", "leaky_relu")


class Run:
    """A grid of four trials that runs."""

    def __init__(self, store: Store, folder: Path):
        self.store = store
        self._folder = folder
        self._ended = 0
        self._record(0)

    def end_trials(self, number: int, status: str = "completed") -> None:
        """End some trials, the first ones that have not."""
        self._record(number, status)

    def _record(self, number: int, status: str = "completed") -> None:
        recorder = Recorder(self.store, Spool(self._folder / "spool.jsonl"))
        recorder.begin({"grid.json": json.dumps({"trials": PLANNED}).encode()}, self.store.trials())
        for activation in ACTIVATIONS[self._ended : self._ended + number]:
            accuracies = [0.3, 0.5, 0.6] if status == "completed" else []
            config = TrialConfig(activation=activation, learning_rate=0.1, epochs=3)
            recorder.started(config, control=False)
            for epoch, accuracy in enumerate(accuracies, start=1):
                recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=epoch == 1)
            best = max(accuracies, default=None)
            recorder.ended(config, status, epochs_run=len(accuracies), best_val_accuracy=best)
        assert recorder.close(finished=False, patience_seconds=100)
        self._ended += number
        self.set_status("RUNNING")

    def set_status(self, status: str) -> None:
        self.store.client.update_run(self.store.parent_id, status=status)

    def set_tag(self, name: str, text: str) -> None:
        self.store.client.set_tag(self.store.parent_id, name, text)

    @property
    def state(self) -> GridState:
        return read_state(self.store.uri, self.store.experiment)


@pytest.fixture
def run(store: Store, tmp_path: Path) -> Run:
    return Run(store, tmp_path)


@dataclass
class Followed:
    """What is followed in another thread."""

    path: Path
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def page(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.page)

    def wait_for_next(self) -> None:
        """Return once the file has been written again, from beginning to end."""
        for _ in range(2):
            before = self.path.stat().st_ino
            wait_until(lambda before=before: self.path.stat().st_ino != before)


@contextmanager
def following(run: Run, path: Path) -> Iterator[Followed]:
    """Follow a grid in another thread, and end it afterwards, which has to end the thread."""
    followed = Followed(path)

    def body() -> None:
        followed.verdicts.append(follow.follow(run.store.uri, run.store.experiment, path, every=EVERY))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield followed
    run.set_status("FINISHED")
    thread.join(100)
    assert not thread.is_alive()


def test_the_page_grows_with_the_grid_and_the_last_one_is_an_ordinary_page(run: Run, tmp_path: Path) -> None:
    run.end_trials(1)
    with following(run, tmp_path / "page.html") as followed:
        followed.wait_for("1 of 4 trials have ended. ")
        assert "location.reload" in followed.page
        run.end_trials(2)
        followed.wait_for("3 of 4 trials have ended. ")
        run.end_trials(1)
        wait_until(lambda: "trials have ended" not in followed.page)
        assert "location.reload" in followed.page
    assert len(followed.verdicts[0].experiment.trials) == PLANNED
    verdict = analyse(read_experiment(run.store.uri, run.store.experiment))
    assert followed.page == render(verdict)
    assert "reload" not in followed.page
    assert "Written" not in followed.page


def test_without_an_accuracy_it_waits_and_says_so_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count_calls(monkeypatch, "read_state")
    with following(run, tmp_path / "page.html") as followed:
        wait_until(lambda: looks["read_state"] > 4)
        run.end_trials(1, "failed")
        before = looks["read_state"]
        wait_until(lambda: looks["read_state"] > before + 3)
        assert not followed.path.exists()
        run.end_trials(1)
        followed.wait_for("2 of 4 trials have ended. ")
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("analysis.report: experiment 'some grid' in sqlite:")
    assert line.endswith("has no trial yet; run python -m grid.run first; asking again every 0 s")
    assert said.out == f"{tmp_path}/page.html  reloads itself in a browser until the grid has ended\n"


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> Counter[str]:
    """Count the calls of functions that `analysis.follow` imports."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., object]:
        function = getattr(follow, name)

        def call(*given: object, **named: object) -> object:
            calls[name] += 1
            return function(*given, **named)

        return call

    for name in names:
        monkeypatch.setattr(follow, name, counted(name))
    return calls


def test_while_no_trial_ends_only_the_time_is_written_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.end_trials(1)
    calls = count_calls(monkeypatch, "render", "read_experiment", "read_state")
    with following(run, tmp_path / "page.html") as followed:
        followed.wait_for("1 of 4")
        first, looks = followed.page, calls["read_state"]
        run.set_tag("driver_seen", "1790000000")
        wait_until(lambda: followed.page != first and calls["read_state"] > looks)
        assert (calls["render"], calls["read_experiment"]) == (1, 1)
        written = r"<time>[^<]+</time>"
        assert re.sub(written, "", followed.page) == re.sub(written, "", first)
        run.end_trials(1)
        followed.wait_for("2 of 4")


def test_a_store_that_does_not_answer_for_a_while_is_one_line_and_the_page_grows_old(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.end_trials(1)
    looks = count_calls(monkeypatch, "read_state")
    with following(run, tmp_path / "page.html") as followed:
        followed.wait_for("1 of 4")
        (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
        before = looks["read_state"]
        wait_until(lambda: looks["read_state"] > before + 1)
        page = followed.path.stat().st_ino
        wait_until(lambda: looks["read_state"] > before + 5)
        assert followed.path.stat().st_ino == page
        (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
        followed.wait_for_next()
        run.end_trials(1)
        followed.wait_for("2 of 4")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("analysis.report: can't open the store sqlite:")
    gone = ("there is no such file", "it is empty, no grid has been recorded in it")  # renamed between two looks
    assert line.endswith(tuple(f"{each}; pass another --store; asking again every 0 s" for each in gone))


def test_a_grid_has_ended_when_its_parent_run_has_and_no_driver_is_at_work(run: Run) -> None:
    run.end_trials(1)
    assert not run.state.has_ended
    run.set_status("KILLED")  # it can be continued
    assert not run.state.has_ended
    run.set_status("FINISHED")
    assert run.state.has_ended
    run.set_tag("driver", "host:1")  # which may test finalists
    assert not run.state.has_ended
    run.set_tag("driver", "")
    assert run.state.has_ended


def test_the_state_changes_when_a_trial_ends_and_not_with_a_heartbeat(run: Run) -> None:
    states = [run.state]
    for number in range(PLANNED):
        run.end_trials(1, "failed" if number == 2 else "completed")
        states.append(run.state)
    assert len(set(states)) == PLANNED + 1
    run.set_tag("driver_seen", "1790000000")
    assert run.state == states[-1]


def test_a_store_without_a_parent_run_is_followed_without_an_end(run: Run) -> None:
    run.end_trials(1)
    run.set_tag("kind", "something else")
    run.set_status("FINISHED")
    assert (run.state.status, run.state.has_ended) == ("", False)


def command(run: Run, *options: str) -> list[str]:
    return ["--experiment", run.store.experiment, "--store", run.store.uri, "--follow", *options]


def test_a_grid_that_has_ended_already_is_reported_as_ever(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.end_trials(1)
    run.set_status("FINISHED")
    assert main(command(run, "--out", str(tmp_path / "page.html"))) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("Use: mlp constant relu adam.\n")
    assert said.out.splitlines()[-1].startswith(f"{tmp_path}/page.html  0.")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 of 4 trials have ended." in page
    assert "location.reload" not in page


def test_an_experiment_that_is_missing_is_refused_at_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "other", "--store", run.store.uri, "--follow"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("analysis.report: no experiment 'other' in sqlite:")


def test_a_page_that_cannot_be_written_ends_the_command_in_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.end_trials(1)
    assert main(command(run, "--out", str(tmp_path / "no" / "page.html"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"analysis.report: can't write {tmp_path}/no/page.html: No such file or directory")


@pytest.mark.parametrize("text", ["1", "-30", "nan", "inf", "soon", ""])
def test_an_interval_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--experiment", "any", "--follow", f"--every={text}"])
    reason = f"argument --every: '{text}' is not a number of seconds from 2 to 86,400; see --help"
    assert capsys.readouterr().err == f"analysis.report: {reason}\n"


def test_ctrl_c_ends_it_with_one_line(run: Run, tmp_path: Path) -> None:
    run.end_trials(1)
    out = tmp_path / "page.html"
    arguments = [sys.executable, "-m", "analysis.report", *command(run, "--out", str(out), "--every", "2")]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{out}  reloads itself in a browser until the grid has ended\n"
        first = out.stat().st_ino
        wait_until(lambda: out.stat().st_ino != first)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)
    assert (process.returncode, said[0], without_waiting(said[1])) == (130, "", "analysis.report: interrupted\n")
    assert "location.reload" in out.read_text(encoding="utf-8")


def test_a_reader_finds_the_old_page_or_the_new_one(tmp_path: Path) -> None:
    path, texts = tmp_path / "page.html", ["a" * 10**6, "b" * 10**6]
    replace_output(path, texts[0])
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for text in texts:
                replace_output(path, text)

    thread = threading.Thread(target=write)
    thread.start()
    found = {path.read_text() for _ in range(200)}
    over.set()
    thread.join(100)
    assert found <= set(texts)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_behind_a_link_is_written_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "served" / "page.html")
    replace_output(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "served" / "page.html").read_text() == "new"


def test_an_output_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(InputError, match=r"can't write .*page\.html: .*; pass another file, or make room"):
        replace_output(tmp_path / "page.html", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_stamp_is_put_where_the_time_belongs_whatever_users_write(store_uri: str, tmp_path: Path) -> None:
    store = Store(store_uri, UNWRITTEN)
    store.create()
    run = Run(store, tmp_path)
    run.end_trials(1)
    page = render(analyse(read_experiment(store.uri, UNWRITTEN)), every=30)
    assert page.count(UNWRITTEN) == 1
    assert "Written <time>2026-01-31T23:59:59Z</time>" in stamp(page, 1769903999.7)


# In a browser

OPEN = "[...document.querySelectorAll('details')].filter((table) => table.open).map((table) => table.parentElement.id)"
HEIGHT = "document.querySelector('#leaderboard h2').getBoundingClientRect().top"
LOADED = "document.readyState === 'complete' && performance.timeOrigin"


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome here")
    with browsing(tmp_path) as tab:
        yield tab


@pytest.fixture(scope="module")
def verdict(finished_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    return analyse(read_experiment(finished_store.uri, "finished"))


def wait_for_reload(tab: Tab) -> None:
    before = tab.value("performance.timeOrigin")
    wait_until(lambda: tab.value(LOADED) not in (None, False, before))


@pytest.mark.slow
def test_in_a_browser_the_page_reloads_itself_and_keeps_the_place_of_the_reader(
    verdict: Verdict, tab: Tab, tmp_path: Path
) -> None:
    page, path = render(verdict, every=3), tmp_path / "page.html"
    replace_output(path, stamp(page, time.time()))
    tab.open(path, 390)
    wait_until(lambda: bool(tab.value(LOADED)))
    assert re.fullmatch(r"Written \d+ s ago\.", tab.value("document.querySelector('#age').innerText"))
    tab.value("document.querySelector('#manifest details').open = true")
    tab.value("location.hash = '#interactions'; scrollTo(0, document.querySelector('#leaderboard').offsetTop + 60)")
    height = tab.value(HEIGHT)
    assert -100 < height < 0
    more = page.replace('<div class="headline">', '<p id="news">news<br><br><br></p><div class="headline">', 1)
    replace_output(path, stamp(more, time.time()))
    wait_until(lambda: tab.value(f"{LOADED} && document.querySelector('#news') !== null") is True)
    for _ in range(2):
        assert tab.value(HEIGHT) == pytest.approx(height, abs=1)
        assert tab.value(OPEN) == ["manifest"]
        wait_for_reload(tab)
    replace_output(path, render(verdict))
    wait_until(lambda: tab.value(f"{LOADED} && !document.querySelector('#age')") is True)
    final = tab.value("performance.timeOrigin")
    time.sleep(5)
    assert tab.value("performance.timeOrigin") == final
    assert tab.errors() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("age", "said", "late"),
    [
        (-100, "Written 0 s ago.", False),  # another clock
        (60, r"Written (6\d|[7-9]\d|1\d\d) s ago.", False),
        (250, r"Written 4 min ago, no longer updated.", True),
        (7 * 3600, r"Written 7 h ago, no longer updated.", True),
    ],
)
def test_in_a_browser_the_page_says_how_old_it_is(
    age: float, said: str, late: bool, verdict: Verdict, tab: Tab, tmp_path: Path
) -> None:
    replace_output(tmp_path / "page.html", stamp(render(verdict, every=30), time.time() - age))
    tab.open(tmp_path / "page.html")
    wait_until(lambda: bool(tab.value(LOADED)))
    assert re.fullmatch(said, tab.value("document.querySelector('#age').innerText"))
    assert tab.value("document.querySelector('#age').matches('.late')") is late
    assert tab.errors() == []


@pytest.mark.slow
def test_in_a_browser_the_age_grows_before_the_eyes_of_the_reader(verdict: Verdict, tab: Tab, tmp_path: Path) -> None:
    replace_output(tmp_path / "page.html", stamp(render(verdict, every=600), time.time()))
    tab.open(tmp_path / "page.html")
    wait_until(lambda: bool(tab.value(LOADED)))
    before = tab.value("document.querySelector('#age').innerText")
    wait_until(lambda: tab.value("document.querySelector('#age').innerText") != before)


def is_kept(tab: Tab) -> bool:
    """Select the heading, and return whether the page is still there after more than two of its intervals."""
    loaded = tab.value("getSelection().selectAllChildren(document.querySelector('h1')), performance.timeOrigin")
    time.sleep(5)
    return bool(tab.value("performance.timeOrigin") == loaded)


@pytest.mark.slow
def test_in_a_browser_a_selection_is_not_taken_away(verdict: Verdict, tab: Tab, tmp_path: Path) -> None:
    replace_output(tmp_path / "page.html", stamp(render(verdict, every=2), time.time()))
    tab.open(tmp_path / "page.html")
    wait_until(lambda: bool(tab.value(LOADED)))
    wait_until(lambda: is_kept(tab))  # on a busy machine the page may be about to reload when it is selected
    tab.value("getSelection().removeAllRanges()")
    wait_for_reload(tab)
