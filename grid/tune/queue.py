"""The trials of a grid in their order, for Ray Tune, which asks for one after another."""

from collections import deque
from collections.abc import Iterable
from typing import Any

from ray.tune.search import Searcher

from grid.config import TrialConfig
from grid.tune.listener import DriverOnly, Listener


class Queue(DriverOnly, Searcher):
    """Hands Tune one trial after another; a `grid_search` would copy the whole list for each trial in it.

    Args:
        trials: In the order in which they start.
        most: That may run at once.
        listener: Says whether none is to start any more.
    """

    def __init__(self, trials: Iterable[TrialConfig], most: int, listener: Listener):
        super().__init__(listener)
        Searcher.__init__(self)
        self._trials = iter(trials)
        self._put_back: deque[TrialConfig] = deque()
        self._running: set[str] = set()
        self.most = most
        """Trials that may run at once."""

    def put_back(self, config: TrialConfig) -> None:
        """Hand out a trial again, before all that have not started."""
        self._put_back.append(config)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial; None if there is none, unless one that runs is put back; else `FINISHED`."""
        if len(self._running) >= self.most:
            return None
        config = None if self._listener.suspending else self._next()
        if config is None:
            return None if self._running else str(Searcher.FINISHED)
        self._running.add(trial_id)
        return {"trial": config}

    def _next(self) -> TrialConfig | None:
        return self._put_back.popleft() if self._put_back else next(self._trials, None)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that a trial has ended; if its worker died, it is put back before Tune asks for another."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""
