"""Keeps the page of a grid up to date while it runs: `python -m analysis.report --follow`.

It is drawn again when a trial has ended; otherwise only the time in it is written again.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from analysis.page.render import render, stamp
from analysis.store import GridState, NothingEndedError, read_experiment, read_state
from analysis.verdict import Verdict, analyse
from grid.arguments import replace_output
from grid.config import InputError
from grid.masking import mask_message
from grid.wording import format_seconds


@dataclass(frozen=True)
class Drawn:
    """A page, and what it shows."""

    state: GridState
    verdict: Verdict
    page: str


def follow(uri: str | None, experiment: str, path: Path, *, every: float) -> Verdict:
    """Write the page of an experiment until its grid has ended, and return what the last page says.

    A grid that was interrupted, or whose driver was killed, has not ended: it can be continued. Once the experiment was
    found, a store that does not answer is asked again and again.

    Args:
        uri: MLflow tracking URI; None for `grid.store_uri.default_store_uri`.
        experiment: Its name.
        path: File to write. In a browser it reloads itself; the last one does not.
        every: Seconds between two pages.

    Raises:
        InputError: At the start the store does not answer or has no such experiment, or the file can't be written.
    """
    read_state(uri, experiment)
    drawn: Drawn | None = None
    said: type[InputError] | None = None
    while True:
        first = drawn is None
        try:
            drawn = _draw(uri, experiment, every, drawn)
        except InputError as problem:
            if type(problem) is not said:
                _say(problem, every)
            said = type(problem)
        else:
            said = None
            replace_output(path, stamp(drawn.page, time.time()))
            if drawn.state.has_ended:
                return drawn.verdict
            if first:
                print(f"{path}  reloads itself in a browser until the grid has ended", flush=True)
        time.sleep(every)


def _draw(uri: str | None, experiment: str, every: float, last: Drawn | None) -> Drawn:
    """Return the last page if the store has not changed since, else a new one.

    Raises:
        NothingEndedError: The grid runs and no trial has an accuracy.
        InputError: The store does not answer.
    """
    state = read_state(uri, experiment)  # before the trials: those of a grid that has ended are complete
    if last is not None and last.state == state:
        return last
    verdict = analyse(read_experiment(uri, experiment))
    if not len(verdict.cells) and not state.has_ended:
        raise NothingEndedError(f"no trial of experiment '{experiment}' has an accuracy yet; wait for one")
    return Drawn(state, verdict, render(verdict, every=None if state.has_ended else every))


def _say(problem: InputError, every: float) -> None:
    text = mask_message(str(problem))
    print(f"analysis.report: {text}; asking again every {format_seconds(every)}", file=sys.stderr, flush=True)
