"""One record for each command that trained: `commands/<id>.json` of the parent run, written once and never replaced."""

import getpass
import json
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from os import urandom
from pathlib import Path
from typing import Any

from grid.config import NUMERICS_VERSION
from grid.masking import mask, mask_arguments
from grid.parts.files import loaded
from grid.record.store import Store, StoredTrial
from grid.recorded import COMMAND_ID, command_path, parts_path
from grid.train.code_version import NumericCode, package_versions

RECORD = "record"
"""Key of `grid.json`: the record of the command that wrote it."""
CODE_KEYS = ("commit", "dirty", "versions", "host", "platform", "command")
"""What `describe_code` returns."""


def describe_code(command: str = "grid.run") -> dict[str, Any]:
    """Return the commit of this code, the versions it runs with, the host and the command, without secrets."""
    commit = _commit()
    return {
        "commit": commit,
        "dirty": None if commit == "unknown" else commit.endswith("-dirty"),
        "versions": {"python": platform.python_version(), **package_versions()},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": ["python", "-m", command, *mask_arguments(sys.argv[1:])],
    }


def describe_source(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags that fill the columns of MLflow's page: what made a run, by which code, and who.

    Args:
        record: From `describe_code`.
    """
    commit, command = record["commit"], record["command"]
    tags = {"mlflow.source.name": " ".join(command[:3]), "mlflow.source.type": "LOCAL"}
    if commit != "unknown":
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    with suppress(OSError, KeyError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def describe_numeric_code(code: NumericCode) -> dict[str, Any]:
    """Return code that decides numbers, in JSON's types."""
    return {
        "digest": code.digest,
        "numerics_version": NUMERICS_VERSION,
        "files": dict(code.files),
        "parts": dict(code.parts),
    }


def describe_settings(request: Any) -> Any:
    """Return the fields of a request in JSON's types, without secrets."""
    if is_dataclass(request) and not isinstance(request, type):
        return describe_settings(asdict(request))
    if isinstance(request, Mapping):
        return {str(name): describe_settings(value) for name, value in request.items()}
    if isinstance(request, list | tuple | set | frozenset):
        return [describe_settings(value) for value in request]
    return request if isinstance(request, bool | int | float | None) else mask(str(request))


def record_command(store: Store, record: Mapping[str, Any], replaced: Mapping[str, Any] | None = None) -> str:
    """Add a record to an experiment, with the parts files that this process has run, and return its id.

    Args:
        store: The experiment.
        record: Of this command.
        replaced: `grid.json`, if this command will replace it: what a version without records described there becomes
            a record as well.

    Raises:
        InputError: The store does not take them.
    """
    now, command_id = time.gmtime(), _new_id()
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", now), **record}
    records = {command_id: record}
    if replaced and RECORD not in replaced:
        described = {name: replaced.get(name) for name in CODE_KEYS}
        plan = {name: value for name, value in replaced.items() if name not in CODE_KEYS}
        records[f"{command_id}.earlier"] = {"time": None, **described, "plan": plan}
    with store.answering():
        files = {command_path(name): json.dumps(content, indent=2).encode() for name, content in records.items()}
        files |= {parts_path(file.digest, file.name): file.text.encode() for file in loaded()}
        store.attach(store.parent_id, files)
    return command_id


def read_command(store: Store, command_id: str) -> dict[str, Any]:
    """Return the record of a command; empty if it is missing or damaged.

    Raises:
        InputError: The store does not answer.
    """
    try:
        record = json.loads(store.artifact(command_path(command_id)) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def numeric_code_of(record: Mapping[str, Any]) -> NumericCode | None:
    """Return the code that a record names; None if it names none."""
    try:
        files, torch = record["code"]["files"], record["versions"]["torch"]
        parts = record["code"].get("parts", {})  # older records have none
        return NumericCode(_digests(files), str(torch), _digests(parts))
    except (KeyError, TypeError, AttributeError):
        return None


def _digests(names: Mapping[Any, Any]) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in names.items()}


def commands_of(trials: Iterable[StoredTrial]) -> list[str]:
    """Return the ids of all commands that trained any of the trials, latest first."""
    named = (name for trial in trials for name in (trial.tags.get("command"), trial.tags.get("resumed_by")))
    found = {command_id for names in named if names for command_id in names.split(",")}
    return sorted(filter(COMMAND_ID.fullmatch, found), reverse=True)


def _new_id() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{urandom(4).hex()}"


def _commit() -> str:
    """Return the commit of this code; `unknown` if git does not know this file, whichever repository is around it."""
    here = Path(__file__)
    try:
        _git(here, "ls-files", "--error-unmatch", here.name)
        return _git(here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(file: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.strip()
