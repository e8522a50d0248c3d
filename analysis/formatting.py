"""Formats numbers, columns and notes for people: tables of numbers become tables of text."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from grid.parts import LEVELS

Format = Callable[[float], str]


def percent(value: float) -> str:
    """Return a fraction as `12.34%`; nothing for NaN."""
    return "" if isnan(value) else f"{value:z.2%}"


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, signed; nothing for NaN."""
    return "" if isnan(value) else f"{100 * value:+z.2f}"


def number(value: float) -> str:
    """Return a number with four significant digits, or all digits of a whole number; nothing for NaN."""
    if isnan(value):
        return ""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def chance(value: float) -> str:
    """Return a p value with four decimals; nothing for NaN."""
    return "" if isnan(value) else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def hundredths(value: float) -> str:
    """Return a number with two decimals, such as a correlation; nothing for NaN."""
    return "" if isnan(value) else f"{value:z.2f}"


FORMATS: Mapping[str, Format] = {
    **dict.fromkeys(("mean", "accuracy", "share", "rate", "saved", "lowest", "median", "highest"), percent),
    **dict.fromkeys(("winner", "best_stopped_control", "beat_winner_high", "omega_squared"), percent),
    **dict.fromkeys(("effect", "margin", "loss_at_most"), points),
    **dict.fromkeys(("p", "p_holm"), chance),
    **dict.fromkeys(("spearman", "by_chance"), hundredths),
    "hours": lambda hours: f"{hours:.3f}",
}
"""Column -> format of its numbers; other columns use `number`."""
INTERVAL = {"low": "95% from", "high": "to"}
HEADERS = {"p_holm": "p (Holm)", "predicted": "read as"} | INTERVAL
"""Column -> header; other columns use their names with spaces for underscores."""


def sentence(text: str) -> str:
    """Return a note as a sentence; a model's name at its start keeps its case."""
    first = text[:1] if text.partition(":")[0] in LEVELS["model"] else text[:1].upper()
    return f"{first}{text[1:].rstrip('.')}."


def format_table(table: pd.DataFrame, headers: Mapping[str, str] | None = None, /, **formats: Format) -> pd.DataFrame:
    """Return a table as text, ready to display.

    Args:
        table: Of numbers, truth values and text.
        headers: By column, where `HEADERS` does not fit.
        formats: By column, where `FORMATS` does not fit.
    """
    styles, names = {**FORMATS, **formats}, {**HEADERS, **(headers or {})}
    formatted = {}
    for name in table.columns:
        header = names.get(name, name.replace("_", " "))
        column = table[name]
        if pd.api.types.is_bool_dtype(column):
            formatted[header] = ["yes" if value else "no" for value in column]
        elif pd.api.types.is_numeric_dtype(column):
            formatted[header] = [styles.get(name, number)(float(value)) for value in column]
        else:
            formatted[header] = [str(value) for value in column]
    return pd.DataFrame(formatted)


def wrap(line: str) -> str:
    """Return a line as lines of at most 80 columns, all but the first indented."""
    return textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) if len(line) > 80 else line


def format_interval(low: float, high: float) -> str:
    """Return an interval of differences between accuracies, in points."""
    return f"{100 * low:+.2f} to {100 * high:+.2f}"


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table in JSON's types, None for NaN."""
    columns = table.astype(object)
    rows = columns.where(columns.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def to_markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """Return columns of text as a table for GitHub and its like; all but the last are flush right."""
    rules = [*["---:"] * (len(columns) - 1), ":---"]
    lines = [[*map(str.strip, columns)], rules, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def to_latex(columns: Mapping[str, Sequence[str]]) -> str:
    """Return columns of text as a LaTeX table with the rules of booktabs; all but the last are flush right."""
    lines = [
        [_escape(text) for text in line] for line in ([*map(str.strip, columns)], *zip(*columns.values(), strict=True))
    ]
    header, *rows = [f"{' & '.join(line)} {chr(92) * 2}" for line in lines]
    places = "r" * (len(columns) - 1) + "l"
    return "\n".join(
        [f"\\begin{{tabular}}{{{places}}}", "\\toprule", header, "\\midrule", *rows, "\\bottomrule", "\\end{tabular}"]
    )


def _escape(text: str) -> str:
    """Return text with the characters that LaTeX gives a meaning escaped."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda found: named.get(found[0], f"\\{found[0]}"), text)


TABLES: Mapping[str, Callable[[Mapping[str, Sequence[str]]], str]] = {"markdown": to_markdown, "latex": to_latex}
"""What `--format` of the commands offers beside text."""
