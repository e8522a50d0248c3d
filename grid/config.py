"""What a trial is: its levels, its settings, its keys, and how MLflow stores them.

Standard library only, so that everything can import it at no cost.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import inf, isfinite
from typing import Any

FACTORS = ("model", "lr_schedule", "activation", "optimizer", "batch_norm", "regularization", "dropout")
"""The factors of every grid; `grid.parts` has their levels."""

CHOICES: dict[str, tuple[str, ...]] = {
    "initialization": ("norm_aware", "he", "torch"),
    "device": ("cpu", "cuda"),
    "precision": ("float32", "bfloat16", "tf32"),
    "memory_format": ("contiguous", "channels_last"),
}
"""Every setting that takes one of a few names, with these names."""

GIVEN_OTHERWISE = {
    "seed": "--seeds gives the number of replicates",
    "shared_seed": "finalists share their seeds, the trials of a grid do not",
    "lr_scale": "--lr-scales takes the factors on the learning rate",
    "learning_rate": "--lr-scales multiplies the base rate of each optimizer",
    "epochs": "--epochs takes the budget, the same for all trials",
    "device": "the machines that train decide it",
    "precision": "--precision takes it",
    "memory_format": "the machines that train decide it",
    "fused": "the machines that train decide it",
    "data": "--data takes it",
    "data_fingerprint": "--data and --per-class decide it",
    "numerics_version": "the code decides it",
    "own": "it lists what parts files have added",
}
"""Every field of a trial that is neither a factor nor a setting, and what decides it."""

Condition = tuple[str, tuple[str, ...]]
"""A factor and some of its levels."""

MATTERS_WITH: dict[str, Condition] = {
    "dropout_rate": ("dropout", ("on",)),
    "l1_strength": ("regularization", ("l1", "elastic")),
    "l2_strength": ("regularization", ("l2", "elastic")),
    "hidden_sizes": ("model", ("mlp",)),
    "channels": ("model", ("cnn", "resnet")),
    "dense_size": ("model", ("cnn",)),
    "momentum": ("optimizer", ("sgd",)),
    **dict.fromkeys(("beta1", "beta2"), ("optimizer", ("adam", "adamw", "nadam"))),
    "rmsprop_decay": ("optimizer", ("rmsprop",)),
    "weight_decay": ("optimizer", ("adamw",)),
    "final_share": ("lr_schedule", ("step", "exponential")),
    "warmup_share": ("lr_schedule", ("one_cycle",)),
    **dict.fromkeys(("plateau_factor", "plateau_patience"), ("lr_schedule", ("plateau",))),
}
"""Setting -> the factor and its levels with which alone it matters; with others a trial has its default.

`declare` adds to it.
"""

STEP_PARTS = 3
"""The schedule `step` lowers the rate after each of so many equal parts of the budget; up to then it is `constant`."""

DECAYS = ("momentum", "beta1", "beta2", "rmsprop_decay")
"""Settings that are the decay of a mean over steps."""

NUMERICS_VERSION = 5
"""Raised by hand whenever a code change alters the numbers that a trial yields; part of every trial key."""

Params = dict[str, str]
"""A configuration as MLflow stores it: every value a string."""


class Level(str):
    """Type of the values of a factor that is no field of a trial."""


class InputError(ValueError):
    """Input that can't be used. Its text is one line: what is wrong, what is allowed, what to do."""


def _later(default: Any) -> Any:
    """Give a field that stores have not always had its default, at which it is no part of a trial's key."""
    return field(default=default, metadata={"later": True})


def format_value(value: str | float | bool) -> str:
    """Return a value of a configuration as MLflow stores it; `_parse` inverts it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return repr(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Own:
    """A factor or setting of a trial that is no field of `TrialConfig`, as a parts file adds them."""

    name: str
    value: str
    default: str
    """The value, or level, that trials have that do not know it."""
    matters_with: Condition | None = None
    """As in `MATTERS_WITH`; None if it always matters."""

    def __str__(self) -> str:
        """Such as `temperature=1.0 with regularization=l1,l2`; `parse` inverts it, but for the value."""
        factor, levels = self.matters_with or ("", ())
        return f"{self.name}={self.default}" + (f" with {factor}={','.join(levels)}" if factor else "")

    @classmethod
    def parse(cls, text: str, values: Mapping[str, str]) -> "Own":
        """Return what `str` described, with its value.

        Raises:
            InputError: The text has another form.
        """
        declared = re.fullmatch(r"(\w+)=([^\s;]+)(?: with (\w+)=([^\s;]+))?", text)
        if declared is None:
            raise InputError(f"own must be of the form NAME=DEFAULT with FACTOR=LEVEL,LEVEL; got '{text}'")
        name, default, factor, levels = declared.groups()
        condition = (factor, tuple(levels.split(","))) if factor else None
        return cls(name, values.get(name, default), default, condition)


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that changes the result of one training; two equal configurations yield the same numbers.

    Raises:
        InputError: A value is out of range; the text names all problems at once.
    """

    model: str = "mlp"
    """Factor; a name in `grid.parts.LEVELS["model"]`."""
    lr_schedule: str = "constant"
    """Factor; a name in `grid.parts.LEVELS["lr_schedule"]`."""
    activation: str = "relu"
    """Factor; a name in `grid.parts.LEVELS["activation"]`."""
    optimizer: str = "adam"
    """Factor; a name in `grid.parts.LEVELS["optimizer"]`."""
    batch_norm: bool = False
    """Factor; stored as `on` or `off`."""
    regularization: str = "none"
    """Factor; a name in `grid.parts.LEVELS["regularization"]`."""
    dropout: bool = False
    """Factor; stored as `on` or `off`."""

    seed: int = 0
    """Replicate: seeds the initial weights, the order of the images and the dropout masks. 0 or more."""
    shared_seed: bool = False
    """Whether all cells draw the same from a seed, as finalists do; otherwise every cell draws its own."""
    lr_scale: float = 1.0
    """Nuisance: factor on the optimizer's base learning rate. More than 0."""

    learning_rate: float
    """Peak learning rate: base rate of the optimizer x `lr_scale`. More than 0."""
    epochs: int
    """Full budget in passes over the training images; the length of the schedule. 1 or more."""
    batch_size: int = 128
    """Images per step. 2 or more (the variance of a single image is undefined)."""
    dropout_rate: float = 0.25
    """Share of units dropped if `dropout` is on, in (0, 1)."""
    l1_strength: float = 1e-5
    """Weight of the sum of |w| in the loss if `regularization` is l1 or elastic. 0 or more."""
    l2_strength: float = 1e-4
    """Weight of the sum of w^2 / 2 in the loss if `regularization` is l2 or elastic. 0 or more."""
    hidden_sizes: str = "512-256-128"
    """Widths of the MLP's hidden layers, joined by '-'."""
    channels: str = "32-64-128"
    """Output channels of the CNN's convolutions, or of the stages of the residual net, joined by '-'."""
    dense_size: int = 256
    """Width of the CNN's dense layer. 1 or more."""
    initialization: str = "norm_aware"
    """How the initial weights are drawn; a name in `CHOICES["initialization"]`."""
    momentum: float = _later(0.9)
    """Of `sgd`, in [0, 1)."""
    beta1: float = _later(0.9)
    """Decay of the mean of the gradients, in [0, 1), of `adam`, `adamw` and `nadam`."""
    beta2: float = _later(0.999)
    """Decay of the mean of the squared gradients, in [0, 1), of `adam`, `adamw` and `nadam`."""
    rmsprop_decay: float = _later(0.99)
    """Decay of the mean of the squared gradients of `rmsprop`, in [0, 1)."""
    weight_decay: float = _later(0.01)
    """Of `adamw`, apart from the loss. 0 or more."""
    final_share: float = _later(0.01)
    """Last learning rate of `step` and `exponential`, as a share of the peak rate, in (0, 1]."""
    warmup_share: float = _later(0.3)
    """Share of the budget over which `one_cycle` raises the learning rate, in (0, 1)."""
    plateau_factor: float = _later(0.3)
    """By which `plateau` lowers the learning rate, in (0, 1)."""
    plateau_patience: float = _later(0.1)
    """Share of the budget, at least one epoch, for which `plateau` waits for a lower validation loss. 0 to 1."""

    device: str = "cpu"
    """Kind of device to train on: `cpu` or `cuda`."""
    precision: str = "float32"
    """Of the forward and backward pass: `float32`, `bfloat16` by autocast (weights stay float32), or `tf32`: float32
    with 10 bits in products and convolutions, on NVIDIA's GPUs."""
    memory_format: str = "contiguous"
    """Layout of images and convolution weights: `contiguous` or `channels_last`."""
    fused: bool = False
    """Whether the optimizer updates all weights in one kernel, if torch has one for it."""

    data: str = ""
    """Name of the data set."""
    data_fingerprint: str = ""
    """Hash of the training and validation images and labels that the trial sees."""
    numerics_version: int = NUMERICS_VERSION
    """Version of the code's numbers."""
    own: tuple[Own, ...] = ()
    """Factors and settings beside these; sorted by name."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {rule}, got {getattr(self, name)!r}" for name, rule, holds in self._rules() if not holds
        ]
        for each in self.own:
            rule, holds = OWN_RULES.get(each.name, ("", None))
            if holds is not None and not holds(_parse(each.name, OWN[each.name], each.value)):
                problems.append(f"{each.name} must be {rule}, got {each.value}")
        if problems:
            raise InputError("; ".join(problems))

    def _rules(self) -> list[tuple[str, str, bool]]:
        return [
            ("seed", "0 or more", self.seed >= 0),
            ("lr_scale", "finite and above 0", self.lr_scale > 0 and isfinite(self.lr_scale)),
            ("learning_rate", "finite and above 0", self.learning_rate > 0 and isfinite(self.learning_rate)),
            ("epochs", "1 or more", self.epochs >= 1),
            ("batch_size", "2 or more", self.batch_size >= 2),
            ("dropout_rate", "between 0 and 1, both excluded", 0 < self.dropout_rate < 1),
            ("l1_strength", "finite and 0 or more", 0 <= self.l1_strength < inf),
            ("l2_strength", "finite and 0 or more", 0 <= self.l2_strength < inf),
            ("hidden_sizes", "whole numbers above 0 joined by '-'", _are_sizes(self.hidden_sizes)),
            ("channels", "whole numbers above 0 joined by '-'", _are_sizes(self.channels)),
            ("dense_size", "1 or more", self.dense_size >= 1),
            *((name, "0 or more and below 1", 0 <= getattr(self, name) < 1) for name in DECAYS),
            ("weight_decay", "finite and 0 or more", 0 <= self.weight_decay < inf),
            ("final_share", "above 0 and at most 1", 0 < self.final_share <= 1),
            ("warmup_share", "between 0 and 1, both excluded", 0 < self.warmup_share < 1),
            ("plateau_factor", "between 0 and 1, both excluded", 0 < self.plateau_factor < 1),
            ("plateau_patience", "0 to 1", 0 <= self.plateau_patience <= 1),
            *((name, " or ".join(choices), getattr(self, name) in choices) for name, choices in CHOICES.items()),
        ]

    @cached_property
    def cell(self) -> dict[str, str]:
        """The level of every factor, and every setting."""
        return {name: self.text(name) for name in (*FACTORS, *SETTINGS)}

    @cached_property
    def cell_key(self) -> str:
        """Short hash of the cell, of its settings only if changed; the same for all replicates and nuisance levels."""
        fields = {name: value for name, value in self.cell.items() if name not in OWN and SETTINGS.get(name) != value}
        return _hash(fields | self._changed_own)

    @cached_property
    def trial_key(self) -> str:
        """Short hash of all fields, later ones only if changed: one key, one training, one live MLflow run."""
        fields = {name: self.text(name) for name in _FIELDS if name != "own"}
        return _hash({name: value for name, value in fields.items() if DEFAULTS.get(name) != value} | self._changed_own)

    @property
    def _changed_own(self) -> Params:
        return {each.name: each.value for each in self.own if each.value != each.default}

    @property
    def name(self) -> str:
        """A name for people, such as `mlp cosine gelu adam batch_norm l2 seed=0`."""
        parts = [cell_name(self.cell), f"seed={self.seed}"]
        if self.lr_scale != 1:
            parts.append(f"lr x{self.lr_scale:g}")
        return " ".join(parts)

    def to_params(self) -> Params:
        """Return every field as a string, and what is in `own` as well; `from_params` inverts it."""
        fields = {name: self.text(name) for name in _FIELDS if name != "own"}
        own = {"own": "; ".join(map(str, self.own))} if self.own else {}
        return {**fields, **{each.name: each.value for each in self.own}, **own}

    def text(self, name: str) -> str:
        """Return a factor or setting as MLflow stores it; of one that the trial does not know, the default."""
        if name in _FIELDS:
            return format_value(getattr(self, name))
        return next((each.value for each in self.own if each.name == name), SETTINGS[name])

    def setting(self, name: str) -> Any:
        """Return a setting in its type.

        Raises:
            InputError: There is no such setting.
        """
        if name in _FIELDS:
            return getattr(self, name)
        check_setting(name)
        return _parse(name, OWN[name], self.text(name))

    @classmethod
    def from_params(cls, params: Mapping[str, str]) -> "TrialConfig":
        """Build a configuration from strings.

        Names are ignored unless they are those of fields, declared, or listed under `own`, which declares them.

        Raises:
            InputError: A value does not have the type of its field, or is out of range.
        """
        known = {
            field.name: _parse(field.name, field.type, params[field.name])
            for field in fields(cls)
            if field.name in params and field.name != "own"
        }
        missing = [name for name in ("learning_rate", "epochs") if name not in known]
        if missing:
            raise InputError(f"a trial needs {' and '.join(missing)}")
        listed = [Own.parse(text, params) for text in params.get("own", "").split("; ") if text]
        for each in listed:
            if each.name not in OWN:
                declare(each.name, each.default, matters_with=each.matters_with)
        names = {each.name for each in listed}
        given = [
            Own(name, _canonical(name, params[name]), SETTINGS[name], MATTERS_WITH.get(name))
            for name in OWN
            if name in params and name not in names
        ]
        return cls(**known, own=tuple(sorted([*listed, *given], key=lambda each: each.name)))


_FIELDS = dict.fromkeys(each.name for each in fields(TrialConfig))  # in order, and found at once

DEFAULTS: Params = {
    each.name: format_value(getattr(TrialConfig, each.name)) for each in fields(TrialConfig) if "later" in each.metadata
}
"""The default of every field that stores have not always had; a run without it has this value."""

SETTINGS: Params = {
    each.name: format_value(getattr(TrialConfig, each.name))
    for each in fields(TrialConfig)
    if each.name not in (*FACTORS, *GIVEN_OTHERWISE)
}
"""Every setting of a trial, which all trials of a grid share unless the grid varies it, with its default.

`declare` adds to it.
"""

OWN: dict[str, type] = {}
"""Those in `SETTINGS` that are no field of a trial, with the types of their values."""
OWN_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {}
"""What values of some of these must be, in words and as a function."""


def declare(
    name: str,
    default: str,
    kind: type = str,
    matters_with: Condition | None = None,
    rule: tuple[str, Callable[[Any], bool]] | None = None,
) -> None:
    """Make the name of a factor or setting known, beside those of `TrialConfig`.

    Args:
        name: Letters, digits and underscores.
        default: The value of trials that do not know it.
        kind: Type of its values: str, int, float or bool; `Level` of a factor.
        matters_with: As in `MATTERS_WITH`; None if it always matters.
        rule: What its values must be, in words and as a function.

    Raises:
        InputError: A trial has a field of that name.
    """
    if name in _FIELDS:
        raise InputError(f"every trial has a field '{name}'; choose another name")
    withdraw(name)
    SETTINGS[name] = default
    OWN[name] = kind
    if matters_with is not None:
        MATTERS_WITH[name] = matters_with
    if rule is not None:
        OWN_RULES[name] = rule


def withdraw(name: str) -> None:
    """Forget what `declare` made known."""
    for table in (OWN, SETTINGS, MATTERS_WITH, OWN_RULES):
        table.pop(name, None)


def cell_name(cell: Mapping[str, str]) -> str:
    """Return a cell's name for people, such as `cnn cosine gelu adam batch_norm momentum=0.5`.

    Neither `off` nor `none` is shown, nor a setting that is at its default, or does not matter there.
    """
    words = [factor if cell[factor] == "on" else cell[factor] for factor in FACTORS if factor in cell]
    idle = idle_settings(cell)
    changed = [
        f"{name}={cell[name]}"
        for name, default in SETTINGS.items()
        if name not in idle and cell.get(name, default) not in (default, "")
    ]
    return " ".join(word for word in (*words, *changed) if word not in ("off", "none"))


def varied(trials: Sequence[TrialConfig]) -> tuple[str, ...]:
    """Return the factors of a grid, in order: those of every grid, and the settings that differ between its trials."""
    changed = [name for name in SETTINGS if len({trial.text(name) for trial in trials}) > 1]
    return (*FACTORS, *changed)


def know_alike(trials: Sequence[TrialConfig]) -> list[TrialConfig]:
    """Return the trials of an experiment, each with all that any of them has in `own`, at its default if it lacks it.

    Of two defaults the first one counts. What other experiments have declared in this process is of no account.
    """
    declared: dict[str, Own] = {}
    for trial in trials:
        for each in trial.own:
            declared.setdefault(each.name, each)
    if not declared:
        return list(trials)
    return [
        replace(
            trial,
            own=tuple(
                replace(each, value=next((own.value for own in trial.own if own.name == name), each.default))
                for name, each in sorted(declared.items())
            ),
        )
        for trial in trials
    ]


def idle_settings(cell: Mapping[str, str]) -> list[str]:
    """Return the settings in a cell that do not matter with its other levels."""
    return [
        name
        for name, (factor, levels) in MATTERS_WITH.items()
        if name in cell and factor in cell and cell[factor] not in levels
    ]


def factors_among(names: Iterable[str]) -> tuple[str, ...]:
    """Return which of some names, such as the columns of a table, are those of factors, in the order of `varied`."""
    present = set(names)
    return tuple(name for name in (*FACTORS, *SETTINGS) if name in present)


def check_setting(name: str) -> None:
    """Raise `InputError` unless a name is that of a setting."""
    if name in GIVEN_OTHERWISE:
        raise InputError(f"{name} can't be set: {GIVEN_OTHERWISE[name]}")
    if name not in SETTINGS:
        choices = sorted(known for known in SETTINGS if OWN.get(known) is not Level)
        raise InputError(f"unknown setting '{name}'; choose from {', '.join(choices)}")


def changed_settings(settings: Params) -> Params:
    """Return the settings that differ from their defaults, as MLflow stores them.

    Raises:
        InputError: One of them is no setting of a trial, or a value is not in its range.
    """
    for name in settings:
        check_setting(name)
    config = TrialConfig.from_params({"learning_rate": "1", "epochs": "1", **settings})
    return {name: config.text(name) for name in settings if config.text(name) != SETTINGS[name]}


def parse_sizes(sizes: str) -> tuple[int, ...]:
    """Return `512-256` as (512, 256)."""
    return tuple(int(size) for size in sizes.split("-"))


def _are_sizes(sizes: str) -> bool:
    return all(re.fullmatch("[0-9]{1,9}", size) and int(size) > 0 for size in sizes.split("-"))


def _parse(name: str, kind: Any, text: str) -> Any:
    switch = {"on": True, "off": False}
    try:
        return switch[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "on or off"}[kind]
        raise InputError(f"{name} must be {wanted}, got '{text}'") from None


def _canonical(name: str, text: str) -> str:
    return format_value(_parse(name, OWN[name], text))


def _hash(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
