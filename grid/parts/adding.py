"""The functions that add parts; `grid.parts.builtin` and `grid.parts.grids` add the built-in ones by them."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from grid.config import FACTORS, Condition, InputError, Level, changed_settings, declare, format_value
from grid.parts.registry import (
    ACTIONS,
    ACTIVATIONS,
    ADDED,
    BUILT_IN,
    DATASETS,
    EXCLUSIONS,
    GRIDS,
    LEVELS,
    LR_SCHEDULES,
    MODELS,
    OPTIMIZERS,
    ORIGINS,
    REGULARIZATIONS,
    ActivationSpec,
    Cell,
    Code,
    DataSource,
    Grid,
    Levels,
    OptimizerSpec,
    Shape,
    Site,
    add,
    check_level,
    check_word,
    loading,
    note_origin,
)

VALUE = re.compile(r"[^\s;,]+")
"""A value that can be given on the command line and stored as it is."""
RESERVED = frozenset(
    [
        "balanced",
        "before_unfinished",
        "behind",
        "behind_image_half",
        "behind_seed_half",
        "best_val_accuracy",
        "cell",
        "cell_key",
        "command",
        "control",
        "control_chance",
        "controls",
        "controls_end",
        "diverged",
        "epoch",
        "epoch_seconds",
        "epochs_run",
        "factor",
        "final_val_accuracy",
        "high",
        "image_half",
        "inference_ms_per_image",
        "kind",
        "label",
        "level",
        "low",
        "parameters",
        "rank",
        "resumed_by",
        "run_id",
        "seed_half",
        "seeds",
        "spread",
        "status",
        "stop_epoch",
        "stopped",
        "stopped_at_epoch",
        "test_accuracy",
        "test_accuracy_as_validated",
        "test_balanced_accuracy",
        "test_image_half",
        "test_images",
        "test_loss",
        "test_seed_half",
        "tied",
        "tier",
        "trial_key",
        "val_accuracy",
        "val_balanced_accuracy",
        "val_correct",
    ]
)
"""Names of columns of tables, which no factor and no setting may have."""
NO_SETTINGS: Mapping[str, str | float | bool] = {}
Function = TypeVar("Function", bound=Callable[..., Any])
Adder = Callable[[Function], Function]
"""A decorator that returns what it decorates."""


def activation(name: str, *, shape: Shape = "any") -> Adder[Any]:
    """Add a level of the factor `activation`; decorates what builds a module, such as its class.

    Args:
        name: Of the level.
        shape: `rising` if its output never falls as its input rises, `falling_then_rising` if it has one valley; such
            activations are computed after the pooling, on a quarter of the pixels. `any` is always right.
    """
    _check_named("activation", name)
    return lambda build: _added("activation", name, ACTIVATIONS, ActivationSpec(Code(build), shape), build)


def optimizer(
    name: str,
    *,
    learning_rate: float = 0.0,
    fused: bool = False,
    options: Callable[[Any], Mapping[str, Any]] = lambda config: {},
) -> Adder[Any]:
    """Add a level of the factor `optimizer`; decorates what builds a `torch.optim.Optimizer`, such as its class.

    It is called with the parameters of the net, `lr` and the options.

    Args:
        name: Of the level.
        learning_rate: Peak rate at `--lr-scales 1`; pick it as carefully as those of the other optimizers.
        fused: Whether it takes `fused=True`.
        options: Given the `TrialConfig`, returns what else it is called with.
    """
    _check_named("optimizer", name)
    if not 0 < learning_rate < float("inf"):
        raise InputError(f"optimizer '{name}' needs learning_rate=..., finite and above 0, got {learning_rate}")
    if not callable(options):
        raise InputError(f"optimizer '{name}': options takes a function of the configuration that returns a dictionary")
    return lambda build: _added(
        "optimizer", name, OPTIMIZERS, OptimizerSpec(Code(build), learning_rate, fused, options), build
    )


def lr_schedule(name: str) -> Adder[Any]:
    """Add a level of the factor `lr_schedule`.

    Decorates a function of the `TrialConfig`, its optimizer and the number of steps in the budget that returns an
    `LRScheduler`, which is stepped after each training step, or a `ReduceLROnPlateau`, after each epoch.
    """
    _check_named("lr_schedule", name)
    return lambda build: _added("lr_schedule", name, LR_SCHEDULES, Code(build), build)


def regularization(name: str) -> Adder[Any]:
    """Add a level of the factor `regularization`.

    Decorates a function of the weights of all linear and convolution layers and the `TrialConfig` that adds the
    gradient of a penalty to their gradients.
    """
    _check_named("regularization", name)
    return lambda penalise: _added("regularization", name, REGULARIZATIONS, Code(penalise), penalise)


def net(name: str) -> Adder[Any]:
    """Add a level of the factor `model`.

    Decorates a function of the `TrialConfig` and a `nets.blocks.NetSpec` that returns a module from float images
    `[batch, channel, height, width]` to logits `[batch, classes]`.
    """
    _check_named("net", name)
    return lambda build: _added("model", name, MODELS, Code(build), build)


def on_images(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts on the images of every training batch.

    Decorates `f(images, use)`, which returns images; they are floats `[batch, channel, height, width]`, of mean 0 and
    standard deviation 1 over the data set. `use` is a `grid.train.actions.Use`: the level and what else is needed.

    Args:
        name: Of the factor.
        levels: Its levels. With the first one nothing is done, and trials from before count as trials with it.
    """
    return _at("images", name, levels)


def on_batch(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts on the images and the targets of every training batch; see `on_images`.

    Decorates `f(images, targets, use)`, which returns images and targets; targets are the probabilities of the classes
    that the net should learn, floats `[batch, class]`: 1 for the label of an image unless another factor changed it.
    """
    return _at("batch", name, levels)


def on_net(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts on the net before training: decorates `f(net, use)`, which returns a net; see `on_images`.

    The net is on the CPU. `use.generator` is too, so that it can draw weights.
    """
    return _at("net", name, levels)


def on_loss(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts on the loss of every batch; see `on_images`.

    Decorates `f(loss, logits, labels, use)`, which returns the new loss, a scalar; `logits` are `[batch, classes]`.
    """
    return _at("loss", name, levels)


def on_gradients(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts on the gradients before every step; see `on_images`.

    Decorates `f(parameters, use)`, which changes the `grad` of the parameters of the net in place.
    """
    return _at("gradients", name, levels)


def on_averages(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that keeps averages of the weights, with which the net is validated, tested and registered.

    Decorates `f(averages, weights, step, use)`, called after every step, from 1; it changes the tensors of `averages`,
    which begin as the initial weights, in place. Batch norm statistics are estimated anew for the averages. Only one
    such factor may act in a trial. See `on_images`.
    """
    return _at("averages", name, levels)


def on_prediction(name: str, levels: Sequence[str]) -> Adder[Any]:
    """Add a factor that acts wherever the net predicts: in validation, in the test and as a registered model.

    Decorates `f(predict, images, use)`, which returns logits `[batch, class]`; `predict(images)` returns those of the
    net. It should not draw: a net predicts the same whenever it is asked. See `on_images`.
    """
    return _at("prediction", name, levels)


def setting(
    name: str,
    default: str | float | bool,
    *,
    matters_with: Condition | None = None,
    rule: tuple[str, Callable[[Any], bool]] | None = None,
) -> None:
    """Add a setting, to be held by `--set` or varied by `--vary`; code reads it with `config.setting(name)`.

    Args:
        name: Of the setting.
        default: Value of all trials that do not say otherwise, those from before included; its type is that of all.
        matters_with: The factor and its levels with which alone it matters, such as `("optimizer", ("lion",))`; cells
            that differ in it alone elsewhere are trained once.
        rule: What its values must be, in words and as a function, such as `("above 0", lambda value: value > 0)`.

    Raises:
        InputError: The name is taken or can't be one.
    """
    _check_new("setting", name)
    if type(default) not in (str, int, float, bool) or not VALUE.fullmatch(format_value(default)):
        raise InputError(f"the default of setting '{name}' must be a number, True, False or a word, got {default!r}")
    if rule is not None and not (isinstance(rule, tuple) and len(rule) == 2 and callable(rule[1])):
        hint = 'rule=("above 0", lambda value: value > 0)'
        raise InputError(f"setting '{name}': rule takes words and a function, such as {hint}")
    if rule is not None and not rule[1](default):
        raise InputError(f"the default of setting '{name}' must be {rule[0]}, got {default!r}")
    if matters_with is not None:
        _check_condition(name, matters_with)
    declare(name, format_value(default), type(default), matters_with, rule)
    add("setting", name, ADDED, "setting")


def data(name: str) -> Adder[Any]:
    """Add a data set, for `--data`.

    Decorates a function of the data folder, a `Path`, that returns train images, train labels, test images, test labels
    and, if you like, the names of the classes. Images are uint8 `[image, row, column]` or `[image, channel, row,
    column]`; labels are whole numbers from 0. Validation is cut from train.
    """
    _check_named("data", name)

    def adder(load: Function) -> Function:
        return _added("data", name, DATASETS, DataSource(Code(partial(_call, load))), load)

    return adder


def _call(*arguments: Any) -> Any:
    return Code("grid.data.arrays:call")(*arguments)


def grid(
    name: str,
    question: str,
    levels: Levels,
    *,
    data: str = Grid.data,
    per_class: int | None = Grid.per_class,
    epochs: int = Grid.epochs,
    grace: int | None = Grid.grace,
    settings: Mapping[str, str | float | bool] = NO_SETTINGS,
) -> None:
    """Add a named grid, for `--grid`.

    Args:
        name: Of the grid.
        question: That it answers, in one sentence.
        levels: Factor -> levels; a factor that is left out has its first level.
        data: Name of the data set.
        per_class: Training images per class; None for all.
        epochs: Full budget of a trial.
        grace: Epochs before any trial is stopped; None for the default. Techniques that learn slowly need some.
        settings: Those of all trials that differ from the defaults, such as `{"batch_size": 64}`; `--set` overrides.

    Raises:
        InputError: The name is taken, or a level or a setting is unknown.
    """
    for factor, chosen in levels.items():
        for level in chosen:
            check_level(factor, level)
    own = {factor: tuple(chosen) for factor, chosen in levels.items()}
    every = {factor: own.get(factor, LEVELS[factor][:1]) for factor in (*FACTORS, *own)}
    changed = changed_settings({setting: format_value(value) for setting, value in settings.items()})
    row = Grid(
        question=question,
        levels=every,
        data=data,
        per_class=per_class,
        epochs=epochs,
        grace=grace,
        settings=changed,
    )
    add("grid", name, GRIDS, row)


def exclude(reason: str) -> Adder[Callable[[Cell], bool]]:
    """Exclude cells from every grid; decorates a function of a cell, factor -> level.

    Args:
        reason: Printed with the number of cells that it excludes, and stored.
    """
    _check_named("exclude", reason)

    def adder(excludes: Callable[[Cell], bool]) -> Callable[[Cell], bool]:
        if reason in EXCLUSIONS:
            raise InputError(f"there is an exclusion '{reason}' already; give another reason")
        EXCLUSIONS[reason] = excludes
        note_origin(f"exclusion {reason}")
        return excludes

    return adder


def _added(kind: str, name: str, table: dict[str, Any], row: Any, function: Function) -> Function:
    add(kind, name, table, row)
    return function


def _at(place: Site, name: str, levels: Sequence[str]) -> Adder[Any]:
    def adder(act: Function) -> Function:
        is_known = LEVELS.get(name) == tuple(levels) and ORIGINS.get(f"factor {name}", BUILT_IN) == loading()
        if is_known and place not in ACTIONS[name]:
            ACTIONS[name][place] = Code(act)  # the same factor, at another place
            return act
        _check_new("factor", name)
        for level in levels:
            check_word("level", level)
        if len(set(levels)) < max(2, len(levels)):
            raise InputError(f"factor '{name}' needs two levels or more that differ, got {', '.join(levels)}")
        declare(name, levels[0], Level)
        add("factor", name, ADDED, "factor")
        ACTIONS[name] = {place: Code(act)}
        LEVELS[name] = tuple(levels)
        return act

    return adder


def _check_named(function: str, name: object) -> None:
    if not isinstance(name, str):
        raise InputError(f'@parts.{function} takes a text first, such as @parts.{function}("TEXT")')


def _check_condition(name: str, condition: Condition) -> None:
    if len(condition) != 2 or isinstance(condition[1], str):
        hint = 'matters_with=("optimizer", ("sgd", "adam"))'
        raise InputError(f"setting '{name}': matters_with takes a factor and a tuple of its levels, such as {hint}")
    for level in condition[1]:
        check_level(condition[0], level)


def _check_new(kind: str, name: str) -> None:
    if not name.isidentifier():
        raise InputError(f"a {kind} is named by letters, digits and underscores, got '{name[:60]}'")
    if name in RESERVED:
        raise InputError(f"'{name}' is a column of the tables of results; choose another name for the {kind}")
    if name in ADDED or name in LEVELS:
        raise InputError(f"factor or setting '{name}' exists already; choose another name")
