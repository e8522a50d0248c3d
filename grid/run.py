"""The command `python -m grid.run --grid smoke`. Checks its arguments at once, then imports the rest."""

import argparse
import gc
import os
import sys
import textwrap
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from grid.arguments import (
    Options,
    Parser,
    add_accept_code,
    add_data_dir,
    add_debug,
    add_json,
    add_parts,
    add_store,
    add_workers,
    for_programs,
    run_command,
)
from grid.config import SETTINGS, InputError, changed_settings
from grid.data.catalogue import NAMES, locate
from grid.parts import LEVELS
from grid.parts.files import load_files
from grid.parts.registry import GRIDS, Grid
from grid.plan.asha import FEWEST_STEPS, NO_STOPPING, StoppingRule
from grid.plan.budget import EXHAUSTED, Budget
from grid.plan.request import DEFAULT_CONTROLS, DEFAULT_SHARE, Again, Request, check_folder_name, read_place
from grid.plan.space import find_grid, read_first, restrict, vary
from grid.wording import first_line

ALL = "all"
"""Of the training images, whatever the grid says."""
GRID_OPTIONS = (
    *("grid", "only", "set", "vary", "first", "data", "per_class", "epochs", "seeds", "lr_scales", "precision"),
    *("controls", "more_controls", "stop_factor", "grace", "stop_within", "no_stopping", "dry_run"),
    *("max_hours", "max_cost", "max_epochs", "price_per_hour", "json", "report"),
)
"""What `--against` does not go with."""
INTERRUPTED = "interrupted; run the same command to continue"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: every trial has ended and none failed; 1: some failed, or not everything has reached the store; 2: wrong input;
    3: the budget is spent, and trials are left; 130: interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)

    def run() -> int:
        if options.against is not None:
            return _run_again(parser, options)
        request = read_request(options)
        import_module("grid.tune.limits").largest_object_store()  # too small a one would crash torch
        # The rest imports torch and Ray: seconds that --help and a wrong argument need not wait. Importing allocates a
        # million objects and frees none; looking for garbage among them would take a quarter of the time.
        gc.disable()
        with for_programs(options.json) as answer:
            if options.dry_run:
                answer(import_module("grid.driver.dry_run").run(request, _find_spread(request)))
                return 0
            exit_code = int(import_module("grid.driver.launch").run(request))
            if options.report and exit_code in (0, 1, EXHAUSTED):
                _write_report(request, options.report, debug=options.debug)
            if options.json:
                answer({"exit_code": exit_code, **_describe_ranking(request)})
        return exit_code

    try:
        return run_command(parser.name, run, interrupted=INTERRUPTED, debug=options.debug)
    finally:
        gc.enable()


def _run_again(parser: Parser, options: argparse.Namespace) -> int:
    """Train a part of an earlier experiment once more, and print what has changed."""
    request = read_again(parser, options)
    import_module("grid.tune.limits").largest_object_store()
    exit_code = int(import_module("grid.driver.again").run(request))
    if exit_code == 0:
        from analysis.compare import main as compare  # noqa: PLC0415  (statistics: a second)

        return compare([request.against, request.experiment, "--store", request.store])
    return exit_code


def read_again(parser: Parser, options: argparse.Namespace) -> Again:
    """Check the options of a command that trains a part of an earlier experiment once more.

    Raises:
        InputError: A value is wrong, or an option says what the earlier experiment says already.
    """
    for name in GRID_OPTIONS:
        if getattr(options, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"--against repeats an experiment as it is; leave {option} out")
    load_files(options.parts)
    return Again(
        against=options.against,
        share=DEFAULT_SHARE if options.share is None else options.share,
        experiment=f"{options.against}-again" if options.experiment is None else options.experiment,
        keep_going=options.keep_going,
        **read_place(options, must_exist=True),
    )


def _find_spread(request: Request) -> object:
    """Return how much ends vary in an earlier grid of the same data and models, as `grid.driver.dry_run` takes it."""
    from analysis.prior import find_prior  # noqa: PLC0415  (statistics: a second)

    prior = find_prior(
        request.store,
        data=request.data,
        per_class=request.per_class,
        epochs=request.epochs,
        models=set(request.levels["model"]),
    )
    if prior is None:
        return None
    source = (
        f"ends vary by {100 * prior.around_levels:.1f} points around their levels and by "
        f"{100 * prior.around_forecast:.1f} around their forecast in experiment '{prior.experiment}'"
    )
    return import_module("grid.plan.forecast").EndSpread(prior.around_levels, prior.around_forecast, source)


def _write_report(request: Request, path: Path, *, debug: bool) -> None:
    """Write the page of results and print its address; without it the run is as good, so a failure is one line."""
    from analysis.report import write_report  # noqa: PLC0415  (statistics and pictures: a second)

    try:
        if len(write_report(request.store, request.experiment, path, only_ranked=True).cells):
            print(f"{'report':<9}  {path.absolute().as_uri()}", flush=True)
    except Exception as error:  # noqa: BLE001  (whatever it is, the grid has ended and its exit code stands)
        if debug:
            traceback.print_exc()
        where = import_module("grid.driver.messages").experiment_options(request)
        hint = f"write it with:  python -m analysis.report {where}"
        print(f"grid.run: no report: {first_line(error)}; {hint}", file=sys.stderr)


def _describe_ranking(request: Request) -> dict[str, object]:
    """Return what has come out, as `analysis.rank --json` does; without cells if no trial has ended."""
    from analysis.rank import describe_experiment  # noqa: PLC0415  (statistics: a second)

    return describe_experiment(request.store, request.experiment)


def read_request(options: argparse.Namespace) -> Request:
    """Check the options, and fill what is missing from the named grid.

    Raises:
        InputError: A value is wrong.
    """
    if options.share is not None:
        raise InputError("--share is of the epochs of --against; pass --against NAME as well, or leave --share out")
    load_files(options.parts)
    grid = find_grid(options.grid)
    data_dir = check_folder_name("--data-dir", options.data_dir)
    data, data_dir = locate(options.data or grid.data, data_dir)
    if options.dry_run and options.more_controls is not None:
        raise InputError("--dry-run starts nothing and --more-controls draws trials to start; leave one of them out")
    given, varied = _read_settings(options.set), vary(_split(text, "--vary", SETTINGS) for text in options.vary)
    if both := given.keys() & varied:
        raise InputError(f"--set and --vary both give {min(both)}; leave one of them out")
    usual = {name: value for name, value in grid.settings.items() if name not in varied}
    settings = changed_settings({**usual, **given})
    levels = {**restrict(grid.levels, [_split(text, "--only", LEVELS) for text in options.only]), **varied}
    first = read_first(levels, [_split(text, "--first", levels) for text in options.first])
    return Request(
        grid=options.grid,
        levels=levels,
        settings=settings,
        data=data,
        per_class={None: grid.per_class, ALL: None}.get(options.per_class, options.per_class),
        epochs=grid.epochs if options.epochs is None else options.epochs,
        seeds=options.seeds,
        lr_scales=_split_numbers(options.lr_scales),
        controls=options.controls,
        more_controls=options.more_controls,
        rule=_read_rule(options, grid),
        experiment=_default_name(options, data, given, varied) if options.experiment is None else options.experiment,
        precision=options.precision,
        budget=Budget(options.max_hours, options.max_cost, options.price_per_hour, options.max_epochs),
        first=first,
        keep_going=options.keep_going,
        **read_place(options) | {"data_dir": data_dir},
    )


def _read_rule(options: argparse.Namespace, grid: Grid) -> StoppingRule:
    if options.no_stopping:
        return NO_STOPPING
    within = tuple(name for name in options.stop_within.split(",") if name)
    grace = grid.grace if options.grace is None else options.grace
    return StoppingRule(factor=options.stop_factor, grace=grace, within=within)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m grid.run",
        description="Train every combination of techniques with ASHA early stopping and log every\n"
        "trial to MLflow. Run the same command again to continue.",
        epilog="grids:\n"
        + "\n".join(_describe(name, grid.question) for name, grid in GRIDS.items())
        + "\n\nsettings, with their defaults:\n"
        + textwrap.fill(" ".join(map("=".join, SETTINGS.items())), 79, initial_indent="  ", subsequent_indent="  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is trained")
    _add_levels(what)
    _add_training(what)
    _add_stopping(what)
    again = parser.add_argument_group("or, instead of a grid, a part of an earlier experiment again")
    again.add_argument("--against", metavar="NAME", help="the experiment: has anything changed since?")
    again.add_argument("--share", type=float, metavar="X", help=f"of its epochs ({DEFAULT_SHARE})")
    _add_budget(parser.add_argument_group("what it may take in all, over any number of commands"))
    _add_place(parser.add_argument_group("where it runs and is recorded"))
    add_debug(parser)
    add_json(parser)
    return parser


def _add_levels(what: Options) -> None:
    what.add_argument("--grid", default="full", metavar="NAME", help=f"{', '.join(GRIDS)} (full)")
    what.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FACTOR=LEVEL[,LEVEL]",
        help="restrict a factor to some of its levels; may be repeated",
    )
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="hold a setting of all trials, such as batch_size=256; may be repeated",
    )
    what.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="make a setting a factor of this grid, such as batch_size=64,256; may be repeated",
    )
    what.add_argument(
        "--first",
        action="append",
        default=[],
        metavar="FACTOR=LEVEL[,LEVEL]",
        help="start the cells with these levels first, otherwise in random order; may be repeated",
    )
    add_parts(what)


def _add_training(what: Options) -> None:
    what.add_argument(
        "--data",
        metavar="NAME",
        help=f"{', '.join(NAMES)}, a file.npz, or a folder of images (the grid's own)",
    )
    add_data_dir(what)
    what.add_argument(
        "--per-class", type=_per_class, metavar="N", help="training images per class, or all (the grid's own, or all)"
    )
    what.add_argument("--epochs", type=int, metavar="N", help="full budget of a trial (the grid's own)")
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="replicates per cell (1)")
    what.add_argument("--lr-scales", default="1", metavar="X[,X]", help="factors on the base learning rates (1)")
    what.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16", "tf32"),
        help="auto picks what the device is fast at; float32 is never tf32",
    )


def _add_stopping(what: Options) -> None:
    what.add_argument(
        "--controls",
        type=float,
        default=DEFAULT_CONTROLS,
        metavar="SHARE",
        help="unstopped controls: trials drawn at random and exempt from early stopping; a share above 0 draws at "
        f"least 60, or a third of the trials if that is less ({DEFAULT_CONTROLS:g})",
    )
    what.add_argument(
        "--more-controls",
        type=int,
        metavar="N",
        help="once all trials have ended: draw N of the stopped ones at random and train them to the end",
    )
    what.add_argument("--stop-factor", type=int, default=3, metavar="N", help="one trial in N continues at a rung (3)")
    what.add_argument(
        "--grace",
        type=int,
        metavar="N",
        help=f"epochs before any trial is stopped (as many as take {FEWEST_STEPS} steps, at most a third)",
    )
    what.add_argument(
        "--stop-within",
        default="model",
        metavar="FACTOR[,FACTOR]",
        help="compare trials only if they share the levels of these factors; '' for none (model)",
    )
    what.add_argument("--no-stopping", action="store_true", help="train every trial to the end")


def _add_budget(limits: Options) -> None:
    limits.add_argument("--max-hours", type=float, metavar="X", help="hours in which trials are trained")
    limits.add_argument("--max-cost", type=float, metavar="X", help="those hours, times --price-per-hour")
    limits.add_argument("--max-epochs", type=int, metavar="N", help="epochs of all trials")
    limits.add_argument("--price-per-hour", type=float, metavar="X", help="price of the machine or cluster")


def _add_place(where: Options) -> None:
    add_store(where)
    where.add_argument("--experiment", metavar="NAME", help="MLflow experiment (named after grid, data and budget)")
    add_workers(where)
    add_accept_code(where)
    where.add_argument("--keep-going", action="store_true", help="go on even if the first trials all fail alike")
    where.add_argument(
        "--report", type=Path, default=Path("report.html"), metavar="FILE", help="page of results (report.html)"
    )
    where.add_argument("--no-report", action="store_const", const=None, dest="report", help="write no page of results")
    where.add_argument("--dry-run", action="store_true", help="print cells, trials and expected cost; start nothing")


def _default_name(options: argparse.Namespace, data: str, given: Mapping[str, str], varied: Iterable[str]) -> str:
    """Name an experiment after what its trials share, so that a first look does not end up in the full run."""
    parts = [options.grid, data]
    parts += [] if options.per_class is None else [f"{options.per_class}-per-class"]
    parts += [] if options.epochs is None else [f"{options.epochs}-epochs"]
    usual = {**SETTINGS, **find_grid(options.grid).settings}
    own = [(name, value) for name, value in given.items() if value != usual[name]]
    parts += [f"{name}-{value}" for name, value in sorted(own)]
    parts += sorted(varied)
    parts += ["no-stopping"] if options.no_stopping else []
    return "-".join(parts)


def _per_class(text: str) -> int | str:
    if text != ALL and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"takes a whole number or {ALL}, got '{text}'")
    return ALL if text == ALL else int(text)


def _describe(grid: str, question: str) -> str:
    return textwrap.fill(question, 79, initial_indent=f"  {grid:<12}", subsequent_indent=" " * 14)


def _read_settings(texts: Sequence[str]) -> dict[str, str]:
    """Return the settings that are given, as MLflow stores them."""
    settings: dict[str, str] = {}
    for text in texts:
        name, values = _split(text, "--set", SETTINGS)
        value = ",".join(values)
        if name in LEVELS:
            raise InputError(f"{name} is a factor: give --only {name}={value}")
        if settings.get(name, value) != value:
            raise InputError(f"--set gives {name} twice, {settings[name]} and {value}; give it once")
        settings[name] = value
    changed = changed_settings(settings)
    return {name: changed.get(name, SETTINGS[name]) for name in settings}


def _split(text: str, option: str, names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Return a name and its values, given as NAME=VALUE,VALUE."""
    name, equals, values = text.partition("=")
    if not equals:
        raise InputError(f"{option} takes NAME=VALUE[,VALUE], got '{text}'; names: {', '.join(names)}")
    return name, tuple(values.split(","))


def _split_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--lr-scales takes numbers joined by commas, got '{text}'") from None


def _leave(exit_code: int) -> NoReturn:
    """End the process at once: tearing down torch and Ray takes Python another two seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # closed or missing
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    _leave(main())
