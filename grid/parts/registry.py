"""The tables of parts: what a name in a trial stands for. Built-in parts and those of a user's file are rows alike.

Code is kept as `module:attribute` where importing it takes torch, so that the names are known at once without it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, cast

from grid.config import FACTORS, MATTERS_WITH, OWN, OWN_RULES, SETTINGS, InputError, TrialConfig, withdraw

Levels = Mapping[str, Sequence[str]]
"""Factor -> some of its levels."""
Cell = Mapping[str, str]
"""Factor -> level."""
Shape = Literal["rising", "falling_then_rising", "any"]
Site = Literal["images", "batch", "net", "loss", "gradients", "averages", "prediction"]
"""Where a factor beside those of every grid acts in a training; see `grid.parts.adding`."""
BUILT_IN = "built in"


class Code:
    """What a part does: a function or a class, or where it is, such as `torch.nn:ReLU`, imported when first called."""

    def __init__(self, where: Callable[..., Any] | str):
        self._where = where

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it."""
        return self.resolve()(*arguments, **options)

    def resolve(self) -> Callable[..., Any]:
        """Return it."""
        if isinstance(self._where, str):
            module, _, attribute = self._where.partition(":")
            return cast("Callable[..., Any]", getattr(import_module(module), attribute))
        return self._where


@dataclass(frozen=True)
class ActivationSpec:
    """One row of `ACTIVATIONS`."""

    build: Code
    """Called without arguments for each layer; returns a module."""
    shape: Shape
    """How its outputs change as its input rises; see `nets.activations.Activation`."""


@dataclass(frozen=True)
class OptimizerSpec:
    """One row of `OPTIMIZERS`."""

    build: Code
    """Called with the parameters, `lr` and the options."""
    base_learning_rate: float
    """Learning rate at `lr_scale` 1."""
    fused: bool
    """Whether torch has a fused kernel for it, which updates all weights at once."""
    options: Callable[[Any], Mapping[str, Any]]
    """What a configuration sets of it, beside the learning rate."""


@dataclass(frozen=True)
class DataSource:
    """One row of `DATASETS`."""

    read: Code
    """Called with the name, the data folder and `train` or `test`; returns a `grid.data.dataset.Labelled`."""
    is_there: Code | None = None
    """Called with the name and the data folder; returns whether nothing has to be downloaded or drawn. None: never."""
    sizes: Any = None
    """`grid.data.catalogue.Sizes`; None if they are known only after reading."""
    equal_validation: bool = False
    """Whether validation has as many images of every class; otherwise a sixth of each."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A named grid: a question, the levels that answer it, and the default training settings."""

    question: str
    levels: Levels
    data: str = "emnist-balanced"
    """Name of the data set."""
    per_class: int | None = None
    """Training images per class; None for all."""
    epochs: int = 27
    """Full budget of a trial."""
    grace: int | None = None
    """Epochs before any trial is stopped; None for what `grid.plan.asha.StoppingRule` takes."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Those of all trials, where they differ from the defaults of `grid.config.TrialConfig`."""


MODELS: dict[str, Code] = {}
"""Name -> builder of a net from float images `[batch, channel, height, width]` to logits `[batch, classes]`."""
LR_SCHEDULES: dict[str, Code] = {}
"""Name -> factory of a schedule, given the configuration, its optimizer and the number of steps in the budget."""
ACTIVATIONS: dict[str, ActivationSpec] = {}
OPTIMIZERS: dict[str, OptimizerSpec] = {}
REGULARIZATIONS: dict[str, Code] = {}
"""Name -> function that adds a penalty's gradient to those of the weights, given the weights and the configuration."""
ADDED: dict[str, str] = {}
"""Factor or setting that is no field of a trial, and that this process knows how to use -> which of both it is."""
ACTIONS: dict[str, dict[Site, Code]] = {}
"""Factor beside those of every grid -> what it does at each place at which it acts."""
GRIDS: dict[str, Grid] = {}
DATASETS: dict[str, DataSource] = {}
EXCLUSIONS: dict[str, Callable[[Cell], bool]] = {}
"""Reason, printed and stored -> whether it excludes a cell from every grid."""
ORIGINS: dict[str, str] = {}
"""Kind and name of a part -> the file that it comes from, if it is not built in."""

LEVELS: dict[str, tuple[str, ...]] = dict.fromkeys(FACTORS, ()) | dict.fromkeys(
    ("batch_norm", "dropout"), ("off", "on")
)
"""Every factor with all its levels: those of every grid, then those of parts files, whose first level does nothing."""
TABLES: dict[str, dict[str, Any]] = {
    "model": MODELS,
    "lr_schedule": LR_SCHEDULES,
    "activation": ACTIVATIONS,
    "optimizer": OPTIMIZERS,
    "regularization": REGULARIZATIONS,
}
"""Factor of every grid that has a table of its levels -> that table."""

_loading = [BUILT_IN]
"""The file whose parts are being added."""


def add(kind: str, name: str, table: dict[str, Any], row: Any) -> None:
    """Add a row to a table.

    Args:
        kind: What it is, for messages; of a level, its factor.
        name: Of the part.
        table: Where it belongs.
        row: What it is.

    Raises:
        InputError: The name is taken or can't be one.
    """
    check_word(kind, name)
    if name in table:
        origin = ORIGINS.get(f"{kind} {name}", BUILT_IN)
        raise InputError(f"{kind} '{name}' exists already ({origin}); choose another name")
    table[name] = row
    note_origin(f"{kind} {name}")
    if table is TABLES.get(kind):
        LEVELS[kind] += (name,)


def note_origin(part: str) -> None:
    """Note that a part comes from the file that is being loaded, if it is not built in."""
    if loading() != BUILT_IN:
        ORIGINS[part] = loading()


def is_from_file(kind: str, name: str) -> bool:
    """Return whether a part comes from a parts file; others are built in."""
    return f"{kind} {name}" in ORIGINS


def check_word(kind: str, name: str) -> None:
    """Raise `InputError` unless a name can be given on the command line and stored as it is."""
    if not isinstance(name, str):
        raise InputError(f"a name of a {kind} is a text, such as '{name}' in quotes; got {name!r}")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", name):
        raise InputError(f"a name of a {kind} has up to 40 letters, digits and any of _.+-; got '{name[:60]}'")


def find(factor: str, level: str) -> Any:
    """Return the row of a level in the table of its factor.

    Raises:
        InputError: There is no such level.
    """
    check_level(factor, level)
    return TABLES[factor][level]


def check_known(config: TrialConfig) -> None:
    """Raise `InputError` unless this process knows all parts of a trial."""
    for factor in FACTORS:
        check_level(factor, config.text(factor))
    for each in config.own:
        if each.value != each.default and each.name not in ADDED:
            raise InputError(f"{each.name}={each.value} is of a parts file; give that file with --parts FILE.py")
        if each.name in ACTIONS:
            check_level(each.name, each.value)


def check_level(factor: str, level: str) -> None:
    """Raise `InputError` unless `level` is a level of `factor`."""
    if factor not in LEVELS:
        raise InputError(f"unknown factor '{factor}'; choose from {', '.join(sorted(LEVELS))}")
    if level not in LEVELS[factor]:
        add_it = ", or add it with --parts FILE.py" if loading() == BUILT_IN else ", or add it above this line"
        hint = add_it if factor in TABLES else ""
        raise InputError(f"unknown {factor} '{level}'; choose from {', '.join(sorted(LEVELS[factor]))}{hint}")


def remove(part: str) -> None:
    """Remove a part of a parts file from all tables.

    Args:
        part: Its kind and name, as in `ORIGINS`.
    """
    kind, _, name = part.partition(" ")
    del ORIGINS[part]
    if kind in ("factor", "setting"):
        LEVELS.pop(name, None)
        ADDED.pop(name, None)
        withdraw(name)
    tables = {**TABLES, "factor": ACTIONS, "grid": GRIDS, "data": DATASETS, "exclusion": EXCLUSIONS}
    tables.get(kind, {}).pop(name, None)
    if kind in TABLES:
        LEVELS[kind] = tuple(level for level in LEVELS[kind] if level != name)


@contextmanager
def adding_from(origin: str) -> Iterator[None]:
    """Note where parts come from that are added within; if adding them fails, add none."""
    before = _contents()
    _loading.append(origin)
    try:
        yield
    except BaseException:
        _restore(before)
        raise
    finally:
        _loading.pop()


@contextmanager
def all_restored() -> Iterator[None]:
    """Undo at the end whatever is added or removed within."""
    before = _contents()
    try:
        yield
    finally:
        _restore(before)


def loading() -> str:
    """Return the file whose parts are being added."""
    return _loading[-1]


Contents = list[tuple[dict[Any, Any], dict[Any, Any]]]
"""Tables, each with a copy."""


def _contents() -> Contents:
    own = (SETTINGS, OWN, OWN_RULES, MATTERS_WITH)
    tables = [*TABLES.values(), ADDED, ACTIONS, GRIDS, DATASETS, EXCLUSIONS, ORIGINS, LEVELS, *own]
    return [(table, {key: copy(row) for key, row in table.items()}) for table in tables]


def _restore(contents: Contents) -> None:
    for table, rows in contents:
        table.clear()
        table.update(rows)
