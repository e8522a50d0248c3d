import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.report import main
from analysis.store import read_experiment
from analysis.verdict import analyse, headline
from grid.config import TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store

pytestmark = pytest.mark.usefixtures("own_cache")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here")
GOOD = [0.3, 0.5, 0.6]
QUESTIONS = ["Use", "Matters at the end (9 epochs)", "After epoch 1", "Early stopping", "Holds for"]
FRAME = """<!doctype html><iframe src="{page}" width="{width}" height="900" style="border: 0"></iframe><pre></pre>
<script>addEventListener("message", (event) => {{ document.querySelector("pre").textContent = event.data; }});</script>
"""
PROBE = """<script>addEventListener("load", () => {
  const sizes = [...document.querySelectorAll("figure > svg, figure > img")].map((picture) => {
    const box = picture.getBoundingClientRect();
    return [box.width, box.height, picture.naturalWidth ?? 1];
  });
  parent.postMessage(JSON.stringify({sizes, page: document.documentElement.scrollWidth, window: innerWidth}), "*");
});</script>
"""


@pytest.fixture(scope="module")
def finished_page(finished_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        command = ["--experiment", "finished", "--store", finished_store.uri, "--out", str(folder / "page.html")]
        assert main(command) == 0
    return folder / "page.html"


def report(store: Store, folder: Path) -> str:
    """Return the page of an experiment."""
    out = folder / "page.html"
    assert main(["--experiment", store.experiment, "--store", store.uri, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<(style|script|svg).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def fill(store: Store, folder: Path, *trials: tuple[str, str, list[float]], control: bool = False) -> None:
    """Record trials, given as activation, status and accuracies."""
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({"grid.json": b'{"data": {"val_images": 900}, "commit": "0123456"}'}, {})
    for seed, (activation, status, accuracies) in enumerate(trials):
        config = TrialConfig(activation=activation, seed=seed // 2, learning_rate=0.1, epochs=3)
        recorder.started(config, control=control)
        for epoch, accuracy in enumerate(accuracies, start=1):
            recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=epoch == 1)
        best = max(accuracies, default=None)
        recorder.ended(config, status, epochs_run=len(accuracies), best_val_accuracy=best)
    assert recorder.close(finished=True)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run(
        [*command, profile, *options, page.as_uri()], capture_output=True, text=True, timeout=900, check=True
    )


def console_messages(browsed: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in browsed.stderr.splitlines() if "CONSOLE" in line]


def test_the_headline_is_also_printed(
    finished_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(finished_store, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("  ")][:5] == QUESTIONS
    assert any(line.startswith("  optimizer: adam over asgd, ") for line in lines)
    assert lines[-1].startswith(f"{tmp_path}/page.html  0.")


def test_all_of_the_headline_is_on_the_page(finished_page: Path, finished_store: Store) -> None:
    page = finished_page.read_text(encoding="utf-8")
    text = words(page)
    for fact in headline(analyse(read_experiment(finished_store.uri, "finished"))):
        assert all(part in text for part in (fact.question, fact.answer, fact.remark, *fact.details))
    first_screen = page[: page.index("<nav>")]
    assert first_screen.count("<svg") == 1
    assert "The largest difference of each factor" in first_screen


def test_the_page_starts_with_what_was_trained(finished_page: Path) -> None:
    subtitle = "24 cells; 48 trials of at most 9 epochs; glyphs: 1,200 training and 600 validation images"
    assert f"finished {subtitle}; commit 0123456789ab" in words(finished_page.read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file(finished_page: Path) -> None:
    page = finished_page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]*"', page)
    assert not re.findall(r"url\((?!#)|@import", page)
    assert set(re.findall(r'([\w:]+)="https?://', page)) == {"xmlns", "xmlns:xlink"}


def test_ids_are_unique_and_every_link_resolves(finished_page: Path) -> None:
    page = finished_page.read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_numbers_are_aligned_right_and_words_left(finished_page: Path) -> None:
    page = finished_page.read_text(encoding="utf-8")
    assert '<td class="text">cnn constant gelu adam batch_norm</td><td>76.' in page


def test_a_single_trial_has_a_page(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, ("relu", "completed", GOOD))
    text = words(report(store, tmp_path))
    assert "1 cell; 1 trial of at most 3 epochs; 900 validation images; commit 0123456" in text
    assert "60.00% of the validation images (one seed; ±3.2 for other images). It is the only cell." in text
    assert "one level only" not in text


def test_a_single_cell_with_several_seeds_has_a_page(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, *[("relu", "completed", [accuracy] * 3) for accuracy in (0.5, 0.5, 0.6, 0.6)])
    text = words(report(store, tmp_path))
    assert "55.00% of the validation images (2 seeds; " in text
    assert "Effects at the end" not in text


def test_a_grid_whose_trials_all_diverged_has_a_page(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, ("relu", "diverged", []), ("gelu", "diverged", []))
    text = words(report(store, tmp_path))
    assert text.count("No trial has an accuracy: all diverged or failed") == 3
    assert "2 of 2 trials diverged (their loss was not finite)." in text
    assert "nan" not in text


def test_a_grid_without_controls_says_what_is_unknown(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, ("relu", "completed", GOOD), ("gelu", "stopped", [0.2]))
    text = words(report(store, tmp_path))
    assert "What it cost is unknown: no unstopped control that ASHA would have stopped has completed." in text
    assert text.count("Effects at the end are unknown: it was seen of 0 unstopped controls") == 2
    assert (
        "No unstopped controls: the cost of stopping is unknown; run grid.run with --controls 0.05 next time." in text
    )


def test_before_the_finalists_the_page_says_how_to_get_them(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, ("relu", "completed", GOOD), ("gelu", "completed", GOOD))
    hint = (
        "Finalists None yet. This command trains the best cells again on new seeds: python -m grid.confirm --experiment"
    )
    assert f"{hint} 'some grid'" in words(report(store, tmp_path))


def test_a_store_of_another_program_has_a_page_without_a_manifest(store: Store, tmp_path: Path) -> None:
    fill(store, tmp_path, ("relu", "completed", GOOD), ("gelu", "completed", GOOD))
    store.client.set_tag(store.parent_id, "kind", "something else")
    text = words(report(store, tmp_path))
    assert "The store has no manifest (grid.json) of this experiment" in text
    assert "Samples" not in text
    assert "1 run left out: no tag kind=grid, trial, confirm or refit." in text


def test_a_name_is_not_markup(store_uri: str, tmp_path: Path) -> None:
    store = Store(store_uri, "<script>alert(1)</script>")
    store.create()
    fill(store, tmp_path, ("relu", "completed", GOOD))
    page = report(store, tmp_path)
    assert page.count("<script") == 1
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt;</h1>" in page


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_empty_experiment_is_reported_in_one_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    line = wrong(capsys, "--experiment", "some grid", "--store", store.uri)
    assert line.startswith("analysis.report: experiment 'some grid' in sqlite:")
    assert line.endswith("has no trial yet; run python -m grid.run first")


def test_an_unknown_experiment_is_reported_in_one_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    line = wrong(capsys, "--experiment", "other", "--store", store.uri)
    assert line.startswith("analysis.report: no experiment 'other' in sqlite:")


def test_a_page_that_cannot_be_written_is_reported_in_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, tmp_path, ("relu", "completed", GOOD))
    line = wrong(capsys, "--experiment", "some grid", "--store", store.uri, "--out", str(tmp_path / "no" / "page.html"))
    assert line.startswith(f"analysis.report: can't write {tmp_path}/no/page.html: No such file or directory")


@pytest.fixture
def framed(finished_page: Path, tmp_path: Path) -> Callable[[int], dict[str, object]]:
    """Measure the page in an iframe: a headless browser refuses windows as narrow as a phone."""

    def measure(width: int) -> dict[str, object]:
        probed = tmp_path / "probed.html"
        probed.write_text(finished_page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(page=probed.as_uri(), width=width), encoding="utf-8")
        browsed = browse(frame, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom")
        assert console_messages(browsed) == []
        found = re.search(r"<pre>(.+?)</pre>", browsed.stdout)
        assert found, browsed.stderr
        return json.loads(found[1])

    return measure


@needs_browser
@pytest.mark.parametrize("width", [390, 1000])
def test_in_a_browser_all_figures_are_drawn_and_nothing_is_wider_than_the_window(
    framed: Callable[[int], dict[str, object]], finished_page: Path, width: int
) -> None:
    found = framed(width)
    assert len(found["sizes"]) == finished_page.read_text(encoding="utf-8").count("<figure>") == 11
    assert all(0 < figure[0] <= width and figure[1] > 20 and figure[2] > 0 for figure in found["sizes"])
    assert found["page"] <= found["window"] <= width


@needs_browser
def test_a_message_of_the_browsers_console_is_seen(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<script>missing()</script>")
    assert "missing is not defined" in console_messages(browse(tmp_path / "broken.html", "--dump-dom"))[0]


@needs_browser
def test_the_page_prints(finished_page: Path, tmp_path: Path) -> None:
    printed = tmp_path / "page.pdf"
    assert console_messages(browse(finished_page, f"--print-to-pdf={printed}")) == []
    pages = re.findall(rb"/Type\s*/Page\b", printed.read_bytes())
    assert 4 <= len(pages) <= 12
