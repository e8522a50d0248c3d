"""Draws the unstopped controls: the trials that are exempt from early stopping, so that the end of training is seen.

They are a D-optimal fraction of the full factorial, so that few of them say much about every level, and its levels are
renamed at random, so that every trial has the same chance to be one.

References:
    DuMouchel and Jones 1994, Technometrics 36(1), 37-47 (main effects first, pairs of levels as far as possible); Meyer
    and Nachtsheim 1995, https://doi.org/10.1080/00401706.1995.10485889 (coordinate exchange).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert

from grid.config import TrialConfig, varied

FEWEST = 60
"""Controls of a grid at least, or a third of its trials if that is less."""
MOST_COLUMNS = 400
"""Coefficients of the two-way model, above which pairs of levels are left out of account."""
PASSES = 5
"""Over the design, at most; later ones gain next to nothing."""
MOST_VISITS = 10_000
"""Levels looked at in all passes, each of one factor in one cell; the larger a design, the less there is to gain."""
NEGLIGIBLE = 0.01
"""Relative gain below which an exchange is not made."""
TIE = 1e-6
"""Relative difference of gains that rounding may cause: of equal gains the first counts, on every machine."""
Integers = NDArray[np.int_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Controls:
    """Which trials are controls."""

    keys: frozenset[str]
    chance: float
    """With which each trial that has not begun before was drawn to be one."""


def draw_controls(
    trials: Sequence[TrialConfig], share: float, seed: int, begun: Mapping[str, bool] | None = None
) -> Controls:
    """Draw the unstopped controls of a grid.

    Args:
        trials: Trials to draw from.
        share: Of the trials, in [0, 1]; above 0 at least `FEWEST` are drawn, or a third if there are fewer.
        seed: Seed of the draw.
        begun: Keys of the trials that began in an earlier run, and whether they are controls; they remain what they
            are, whatever is drawn now.
    """
    begun = begun or {}
    kept = {key for key, control in begun.items() if control}
    codes, counts = _codes(trials)
    cells = prod(counts)
    wanted = min(cells, number_of_controls(len(trials), share) * cells // len(trials))
    drawn = {tuple(row) for row in draw_cells(counts, wanted, np.random.default_rng([seed, wanted]))}
    fresh = {
        trial.trial_key
        for trial, code in zip(trials, codes, strict=True)
        if tuple(code) in drawn and trial.trial_key not in begun
    }
    return Controls(frozenset(fresh | kept & {trial.trial_key for trial in trials}), wanted / cells)


def draw_more(stopped: Collection[str], wanted: int, seed: int, round_number: int) -> list[str]:
    """Draw further controls among the trials that were stopped, each with the same chance.

    Args:
        stopped: Keys of the trials to draw from.
        wanted: How many; all if there are fewer.
        seed: Seed of the draw.
        round_number: From 1; every round is another draw.
    """
    lots = {key: sha256(f"{seed} more controls {round_number} {key}".encode()).hexdigest() for key in stopped}
    return sorted(stopped, key=lots.__getitem__)[:wanted]


def draw_cells(counts: Sequence[int], wanted: int, rng: np.random.Generator) -> Integers:
    """Draw cells of a full factorial, each with the same chance.

    Args:
        counts: Number of levels of each factor.
        wanted: How many cells; at most all.
        rng: Renames the levels.

    Returns:
        Codes of levels from 0, `[cell, factor]`.
    """
    names = [rng.permutation(count) for count in counts]
    design = _design(tuple(counts), wanted)
    return np.column_stack([name[codes] for name, codes in zip(names, design.T, strict=True)])


def number_of_controls(trials: int, share: float) -> int:
    """Return how many of the trials become controls."""
    if share == 0:
        return 0
    return min(trials, max(round(share * trials), min(FEWEST, trials // 3), 1))


def _codes(trials: Sequence[TrialConfig]) -> tuple[Integers, list[int]]:
    """Return the code of each trial's levels, `[trial, factor]`, and the number of levels of each factor.

    Seed and learning-rate scale count as factors.
    """
    names = varied(trials)
    rows = [[*(trial.cell[name] for name in names), trial.seed, trial.lr_scale] for trial in trials]
    columns = list(zip(*rows, strict=True))
    levels = [sorted(set(column), key=str) for column in columns]
    codes = [[names.index(value) for value in column] for names, column in zip(levels, columns, strict=True)]
    return np.array(codes, dtype=np.int_).T, [len(names) for names in levels]


@cache
def _design(counts: tuple[int, ...], wanted: int) -> Integers:
    """Return a D-optimal fraction of a full factorial, without duplicates, `[cell, factor]`."""
    everything = prod(counts)
    start = np.random.default_rng([0, wanted]).choice(everything, wanted, replace=False)
    design = np.column_stack(np.unravel_index(start, counts)).astype(np.int_)
    if 0 < wanted < everything:
        _Exchange(_Model(counts), design).improve()
    return design


class _Model:
    """The two-way model of a factorial, in orthogonal coding, and how much is known of its coefficients beforehand.

    Args:
        counts: Number of levels of each factor.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = counts
        self._codings = [np.sqrt(count) * helmert(count).T for count in counts]  # [level, coefficient], mean square 1
        owner = np.repeat(np.arange(len(counts)), [count - 1 for count in counts])
        first, second = np.triu_indices(len(owner), k=1)
        between = owner[first] != owner[second]
        # a coefficient of a pair is the product of two main effects
        self._first, self._second = first[between], second[between]
        if len(self._first) > MOST_COLUMNS:
            self._first = self._second = self._first[:0]
        self.prior = np.repeat([1e-3, 1.0], [1 + len(owner), len(self._first)])
        """Precision of each coefficient beforehand: none for main effects, as of one trial for pairs of levels."""

    def rows(self, codes: Integers) -> Floats:
        """Return the design of some cells, `[cell, coefficient]`."""
        coded = [coding[levels] for coding, levels in zip(self._codings, codes.T, strict=True)]
        effects = np.concatenate(coded, axis=1)
        pairs = effects[:, self._first] * effects[:, self._second]
        return np.concatenate([np.ones((len(codes), 1)), effects, pairs], axis=1)


class _Exchange:
    """Improves a design in place by changing one level of one of its cells at a time.

    Args:
        model: What is to be estimated.
        design: The cells, `[cell, factor]`; changed in place.
    """

    def __init__(self, model: _Model, design: Integers):
        self._model = model
        self._design = design
        self._taken = {tuple(row) for row in design.tolist()}
        rows = model.rows(design)
        self._inverse = np.linalg.inv(rows.T @ rows + np.diag(model.prior))

    def improve(self) -> None:
        """Try every level of every factor in every cell, until a whole pass changes nothing."""
        varied = [factor for factor, count in enumerate(self._model.counts) if count > 1]
        visits = [(place, factor) for place in range(len(self._design)) for factor in varied]
        for done in range(0, min(PASSES * len(visits), MOST_VISITS), len(visits)):
            if not sum(self._try_levels(*visit) for visit in visits[: MOST_VISITS - done]):
                break

    def _try_levels(self, place: int, factor: int) -> bool:
        old = self._design[place].copy()
        candidates = np.tile(old, (self._model.counts[factor], 1))
        candidates[:, factor] = np.arange(len(candidates))
        free = [level for level, row in enumerate(candidates.tolist()) if tuple(row) not in self._taken]
        rows = self._model.rows(np.vstack([old[None], candidates[free]]))
        # without the old cell the information is M - x x', and a cell y adds y' (M - x x')^-1 y to it:
        # y' M^-1 y + (y' v)^2 / slack, where v = M^-1 x and slack = 1 - x' v
        direction = self._inverse @ rows[0]
        slack = 1 - rows[0] @ direction
        gains = ((rows @ self._inverse) * rows).sum(axis=1) + (rows @ direction) ** 2 / slack
        best = int(np.argmax(gains >= gains.max() * (1 - TIE)))
        if gains[best] <= gains[0] * (1 + NEGLIGIBLE):
            return False
        self._replace(place, candidates[free[best - 1]], rows[best], direction, slack)
        return True

    def _replace(self, place: int, cell: Integers, row: Floats, direction: Floats, slack: float) -> None:
        self._taken.remove(tuple(self._design[place].tolist()))
        self._taken.add(tuple(cell.tolist()))
        self._design[place] = cell
        without = self._inverse + np.outer(direction, direction) / slack
        added = without @ row
        self._inverse = without - np.outer(added, added) / (1 + row @ added)
