"""How counts, durations, errors and marks are worded for people. Standard library only."""

import math
import textwrap
from collections.abc import Sequence

from grid.masking import mask_message


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: `1 seed`, `1,920 cells`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_seconds(seconds: float) -> str:
    """Return a duration such as `42 s`, `7 min` or `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its secrets, or its type if it has none."""
    return mask_message((str(error).strip().splitlines() or [type(error).__name__])[0])


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text without its secrets: the reason, if it came from another process."""
    return mask_message((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())


def explain_spared(ends: Sequence[tuple[int, float]]) -> list[str]:
    """Return lines of at most 80 columns that explain the mark `*` in a ranking; none if no cell has it.

    Args:
        ends: Rank of each marked cell, and the accuracy at which its unstopped controls ended; NaN if they diverged.
    """
    if not ends:
        return []
    ended = ", ".join(f"rank {rank} {'diverged' if math.isnan(end) else format(end, '.2%')}" for rank, end in ends)
    rule = "*: with an unstopped control, which counts as stopped at the rung at which ASHA would have stopped it"
    return textwrap.wrap(f"{rule}; it trained on and ended so: {ended}", width=80)
