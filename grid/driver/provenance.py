"""Which code trains: described for each command, and refused if other code trained what the experiment holds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grid.config import InputError
from grid.plan.request import Place
from grid.record.commands import (
    commands_of,
    describe_code,
    describe_numeric_code,
    describe_settings,
    numeric_code_of,
    read_command,
)
from grid.record.store import Store, StoredTrial
from grid.train.code_version import NumericCode
from grid.wording import count

PARTS_ORIGIN = "the parts file as it was (kept under parts/ of the parent run), put new parts into a new file"
"""Where parts are to be had that have changed since."""
MOST_NAMES = 3
"""Files that a message names."""


@dataclass(frozen=True)
class CodeCheck:
    """That this code may train on."""

    code: NumericCode
    """Of this process."""
    accepted: Mapping[str, Any] | None = None
    """What differs, as its user accepted it with `--accept-code`; None if nothing does."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a person should know, for `grid.driver.messages.print_facts`."""


def check_code(store: Store, trials: Collection[StoredTrial], *, accept: bool) -> CodeCheck:
    """Compare this code with that which trained what an experiment holds.

    Once two codes have trained, the user has accepted them as equal, so that it is enough to match any of them.

    Args:
        store: The experiment.
        trials: What it holds.
        accept: Whether other code is accepted.

    Raises:
        InputError: Other code trained it and is not accepted, or the store does not answer.
    """
    code, known = NumericCode.here(), []
    for command_id in commands_of(trials):
        record = read_command(store, command_id)
        before = numeric_code_of(record)
        if before is not None:
            known.append((command_id, record, before))
            if before.matches(code) and not code.parts:  # with parts, all commands have a say
                return CodeCheck(code)
    codes = [before for _, _, before in known]
    changed = code.changed_parts(codes)
    if not changed and any(before.matches(code) for before in codes):
        return CodeCheck(code)
    if not known:
        remark = f"not recorded for {count(len(trials), 'earlier trial')}, and taken to be the same"
        return CodeCheck(code, facts={"code": remark} if trials else {})
    command_id, record, before = known[0]
    difference = _describe(before, code, changed)
    origin = PARTS_ORIGIN if before.matches(code) else _origin(record)  # it matches but for the parts
    if not accept:
        raise InputError(
            f"experiment '{store.experiment}' was trained with {difference}; use {origin}, pick "
            "another --experiment, or pass --accept-code if you know that both yield the same numbers"
        )
    files = code.differing_files(before)
    accepted = {"instead_of": command_id, "files": files, "torch": before.torch, "parts": changed}
    return CodeCheck(code, accepted, {"code": f"accepted as equal to {difference}"})


def describe_command(name: str, request: Place, check: CodeCheck, devices: Collection[str]) -> dict[str, Any]:
    """Return the record of a command, in JSON's types; see docs/store.md.

    Args:
        name: Such as `grid.run`.
        request: What the user asked for.
        check: From `check_code`.
        devices: Names of what trains.
    """
    return {
        **describe_code(name),
        "devices": list(devices),
        "code": describe_numeric_code(check.code),
        "accepted": check.accepted,
        "settings": describe_settings(request),
    }


def _describe(before: NumericCode, now: NumericCode, parts: Sequence[str]) -> str:
    files = [*now.differing_files(before), *parts]
    more = f" and {len(files) - MOST_NAMES} more" if len(files) > MOST_NAMES else ""
    names = f"{', '.join(files[:MOST_NAMES])}{more}"
    parts = [f"other code ({names})"] if files else []
    same_torch = before.torch_minor == now.torch_minor
    return " and ".join([*parts, *([] if same_torch else [f"torch {before.torch_minor}, not {now.torch_minor}"])])


def _origin(record: Mapping[str, Any]) -> str:
    """Return where the code that trained is to be had."""
    commit = str(record.get("commit", "unknown"))
    if commit == "unknown":
        return "the code and torch that trained it"
    changed = " with the changes that were not committed" if record.get("dirty") else ""
    return f"commit {commit.removesuffix('-dirty')}{changed}"
