"""What a user asks of `grid.run` and `grid.confirm`, checked as far as possible without data, torch or Ray."""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid.config import InputError
from grid.data.catalogue import check_per_class, find_dataset
from grid.masking import mask, mask_arguments
from grid.parts.registry import Levels
from grid.plan.asha import DEFAULT_RULE, StoppingRule
from grid.plan.budget import NO_LIMIT, Budget
from grid.recorded import CONFIRM, REFIT
from grid.store_uri import check_store_uri, write_problem

LIMITS = {"epochs": 100_000, "seeds": 1_000, "concurrency": 100_000}
"""Largest values allowed; anything above is a typing error."""
DEFAULT_CONTROLS = 0.1
"""Share of the trials that are unstopped controls; never fewer than `grid.plan.controls.FEWEST` allows."""
DEFAULT_SHARE = 0.05
"""Of the epochs of an earlier experiment, that are trained once more."""

NO_RAY = "start one with `ray up` or `ray start --head`, or leave --address out"
"""What to do where no Ray answers."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where trials run and are recorded."""

    store: str
    """MLflow tracking URI, absolute."""
    experiment: str
    """Name of the MLflow experiment."""
    data_dir: Path
    """Holds, or is to hold, the files of all data sets."""
    storage: str
    """Folder or URI for checkpoints that all nodes reach."""
    spool: Path
    """Local folder for events that have not reached the store yet."""
    address: str | None
    """`HOST:PORT`, `auto` or `local`; None joins the cluster of this machine if there is one, else starts Ray."""
    concurrency: int | None
    """Trials at once; None for as many as the machine holds."""
    device: str = "auto"
    """What trains: `cpu`, `cuda`, or `auto` for GPUs if there are any."""
    accept_code: bool = False
    """Whether other code than that which trained what the experiment holds may train on."""
    parts: tuple[Path, ...] = ()
    """Files of the user that have added parts."""

    def __post_init__(self) -> None:
        check_range("concurrency", self.concurrency)
        if not self.experiment.strip() or len(self.experiment) > 200 or not self.experiment.isprintable():
            raise InputError("--experiment must be 1 to 200 printable characters, not all of them spaces")


def read_place(options: argparse.Namespace, *, must_exist: bool = False) -> dict[str, Any]:
    """Return the fields of `Place` without the experiment, from the options that `grid.arguments` adds for them.

    Args:
        options: What the user has given.
        must_exist: Whether the store has to be there.

    Raises:
        InputError: A value is wrong.
    """
    return {
        "store": check_store_uri(options.store, must_exist=must_exist),
        "data_dir": check_folder_name("--data-dir", options.data_dir),
        "storage": check_storage(options.storage),
        "spool": Path("spool").absolute(),
        "address": check_address(options.address),
        "concurrency": options.concurrency,
        "device": options.device,
        "accept_code": options.accept_code,
        "parts": tuple(options.parts),
    }


def check_range(name: str, value: int | None) -> None:
    """Check a number that may be left out.

    Raises:
        InputError: It is below 1 or above `LIMITS`.
    """
    if value is not None and not 1 <= value <= LIMITS[name]:
        raise InputError(f"--{name} must be 1 to {LIMITS[name]:,}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Request(Place):
    """A grid, its training settings, and where it runs and is recorded.

    Raises:
        InputError: A value is out of its range.
    """

    grid: str
    """Name in `GRIDS`."""
    levels: Levels
    """The levels to cross: the grid's own, narrowed by `--only`, and the settings that `--vary` makes factors."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Those of all trials, from `--set`, where they differ from the defaults of `TrialConfig`."""
    data: str
    """Name of the data set, as for `grid.data.catalogue.find_dataset`."""
    per_class: int | None
    """Training images per class; None for all."""
    epochs: int
    """Full budget of a trial."""
    seeds: int
    """Replicates per cell."""
    lr_scales: tuple[float, ...]
    """Nuisance levels."""
    controls: float
    """Share of trials that are unstopped controls, exempt from early stopping, in [0, 1]; see `grid.plan.controls`."""
    more_controls: int | None = None
    """Controls to draw among the stopped trials of a grid that has ended; None to draw none."""
    rule: StoppingRule = DEFAULT_RULE
    """Which of the other trials are stopped early."""
    keep_going: bool = False
    """Whether to go on though the first trials all fail alike."""
    precision: str
    """`auto`, `float32`, `bfloat16` or `tf32`."""
    budget: Budget = NO_LIMIT
    """What the grid may take in all, and the price of the machine or cluster, which the forecast needs as well."""
    first: Levels = field(default_factory=dict)
    """Levels of some factors: the cells that have them start before all others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = find_dataset(self.data, self.data_dir).sizes
        check_per_class(self.per_class, largest=None if sizes is None else sizes.largest_per_class)
        check_range("epochs", self.epochs)
        check_range("seeds", self.seeds)
        for name, value in (("grace", self.rule.grace), ("stop-factor", self.rule.factor)):
            if value is not None and not 1 <= value <= LIMITS["epochs"]:
                raise InputError(f"--{name} must be 1 to {LIMITS['epochs']:,}, got {value}")
        if unknown := set(self.rule.within) - set(self.levels):
            hint = f"choose from {', '.join(self.levels)}"
            raise InputError(f"--stop-within takes factors joined by commas, got '{min(unknown)}'; {hint}")
        if self.more_controls is not None and self.more_controls < 1:
            raise InputError(f"--more-controls must be at least 1, got {self.more_controls}")
        if not 0 <= self.controls <= 1:
            raise InputError(f"--controls must be a share between 0 and 1, got {self.controls:g}")
        if not all(0 < scale < float("inf") for scale in self.lr_scales):
            raise InputError(f"--lr-scales must be finite and above 0, got {','.join(map(str, self.lr_scales))}")
        if len(set(self.lr_scales)) < len(self.lr_scales):
            raise InputError(f"--lr-scales must differ, got {','.join(map(str, self.lr_scales))}")


@dataclass(frozen=True, kw_only=True)
class Confirmation(Place):
    """Which cells of the grid in `experiment` to confirm, and where.

    Raises:
        InputError: A value is out of its range.
    """

    top: int
    """Finalists of each model."""
    seeds: int
    """Replicates of each finalist; all finalists share their seeds."""
    register: str | None
    """Name under which the winner is put into MLflow's registry; None to register nothing."""
    refit: bool = False
    """Whether not the finalists are trained, but the best of them again, on most validation images as well."""

    @property
    def kind(self) -> str:
        """Of the runs that are recorded."""
        return REFIT if self.refit else CONFIRM

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("top", self.top), ("seeds", self.seeds)):
            if not 1 <= value <= LIMITS["seeds"]:
                raise InputError(f"--{name} must be 1 to {LIMITS['seeds']:,}, got {value}")
        if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
            raise InputError(f"--register must be a name without / and :, got '{self.register}'")


@dataclass(frozen=True, kw_only=True)
class Again(Place):
    """Which experiment to train a part of once more; `experiment` is where that is recorded.

    Raises:
        InputError: A value is out of its range.
    """

    against: str
    """Name of the earlier experiment, in the same store."""
    share: float
    """Of its epochs, in (0, 1]."""
    keep_going: bool = False
    """Whether to go on though the first trials all fail alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise InputError(f"--share must be above 0 and at most 1, got {self.share:g}")
        if self.experiment == self.against:
            raise InputError("--experiment and --against name the same; leave --experiment out")


def check_address(address: str | None) -> str | None:
    """Return the address of a Ray cluster, after a check that a Ray may answer there.

    Args:
        address: `HOST:PORT`; `auto` for the cluster of this machine; `local` for a private Ray; or None for the
            cluster of this machine if it belongs to one.

    Raises:
        InputError: It has another form, or no Ray answers.
    """
    if address in (None, "auto", "local"):
        return address
    host, _, port = address.rpartition(":")
    hint = NO_RAY
    if not host or not port.isdecimal():
        raise InputError(f"--address must be HOST:PORT, auto or local, got '{mask(address)}'; {hint}")
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            speaks_grpc = _speaks_http2(connection)
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray runs at '{address}' ({error}); {hint}") from error
    if not speaks_grpc:
        raise InputError(f"no Ray runs at '{address}' (something else answers there); {hint}")
    return address


def _speaks_http2(connection: socket.socket) -> bool:
    """Return whether a gRPC server, and so perhaps Ray, answers; Ray itself would wait for minutes.

    Reference: RFC 9113 section 3.4, https://www.rfc-editor.org/rfc/rfc9113 (a server's first frame is SETTINGS)
    """
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True
    settings_frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings_frame)
    answer = connection.recv(len(settings_frame))
    return len(answer) > 3 and answer[3] == settings_frame[3]


def check_folder_name(option: str, folder: Path) -> Path:
    """Return a folder as an absolute path, whether it exists or not.

    Raises:
        InputError: It can't be a folder.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{option} must be a folder, and '{folder}' is a file; pass another")
    except OSError as error:
        raise InputError(f"{option} can't be '{str(folder)[:60]}': {error.strerror}; pass another") from error
    return folder.absolute()


def check_storage(storage: str) -> str:
    """Return a storage folder as an absolute path, or a URI unchanged, after a check that the folder can be written.

    Raises:
        InputError: The folder can't be written.
    """
    if "://" in storage:
        return storage
    folder = check_folder_name("--storage", Path(storage))
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if problem := write_problem(present):
        raise InputError(f"can't make the storage folder {folder}: {problem}; pass another --storage")
    return str(folder)


def resume_command() -> str:
    """Return the command that continues this run: the same command, its secrets masked."""
    return shlex.join(["python", *mask_arguments(sys.orig_argv[1:])])
