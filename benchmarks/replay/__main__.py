"""Is the verdict true? Replays the grid on real curves a thousand times, and compares every answer with the truth.

    python -m benchmarks.replay --draws 1000     # an hour on one core; --jobs 2 for two

A draw takes a random order of arrival and random controls, and stops the trials by the grid's own ASHA. The curves are
those of `curves.csv`: the full grid on real images, never stopped, so what stopping hides is known.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.replay.curves import EPOCHS, PATH, load_curves
from benchmarks.replay.draws import Table, replay
from benchmarks.replay.estimators import ESTIMATORS, KEYS, compare, truth
from grid.arguments import Parser
from grid.config import LEVELS
from grid.plan.asha import DEFAULT_RULE, NO_STOPPING, StoppingRule
from grid.plan.controls import draw_design

SHARES = (0.03, 0.05, 0.1, 0.2)
"""Of controls, for the default rule."""
RULES = {
    "model, rungs 1 3, 1 in 3": DEFAULT_RULE,
    "model, rungs 1 3, 1 in 2": StoppingRule(factor=2),
    "model, rungs 1 3, 1 in 4": StoppingRule(factor=4),
    "model, rung 3, 1 in 3": StoppingRule(grace=3),
    "model, rung 3, 1 in 2": StoppingRule(grace=3, factor=2),
    "model x schedule, rungs 1 3, 1 in 3": StoppingRule(within=("model", "lr_schedule")),
    "model x schedule, rungs 1 3, 1 in 2": StoppingRule(within=("model", "lr_schedule"), factor=2),
}
"""Rules that are compared, all with the default share of controls."""
DEFAULT_SHARE = 0.03
SLOW_STARTER = ("lr_schedule", "one_cycle")
BEST = 20
"""Cells whose survival is counted."""


@dataclass(frozen=True)
class Setting:
    """What is replayed."""

    label: str
    rule: StoppingRule
    share: float
