"""Which commands trained an experiment, and by which code."""

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.page.sections import Table
from analysis.store import Experiment, read_commands
from grid.masking import mask_arguments
from grid.recorded import COMMAND_ID
from grid.wording import count


def command_table(experiment: Experiment) -> Table | None:
    """Return a row for each command that trained, earliest first; None if the store names none.

    Raises:
        InputError: The store does not answer.
    """
    runs = pd.concat([experiment.trials, experiment.finalists], ignore_index=True)
    started = runs["command"].where(runs["command"].str.fullmatch(COMMAND_ID), "")
    resumed = runs["resumed_by"].str.split(",").explode()
    known = sorted({*started, *resumed[resumed.str.fullmatch(COMMAND_ID)]} - {""})
    if not known:
        return None
    records = read_commands(experiment, known)
    rows = [_row(records[name], int((started == name).sum()), int((resumed == name).sum())) for name in known]
    unknown = int((started == "").sum())
    remark = f"{count(unknown, 'trial')} started by a command that is not recorded" if unknown else ""
    table = pd.DataFrame(rows)
    return Table("Commands that trained", table.loc[:, (table != "").any()], remark)


def _row(record: Mapping[str, Any], started: int, resumed: int) -> dict[str, str]:
    code, versions, accepted = (_part(record, name) for name in ("code", "versions", "accepted"))
    devices, command = _texts(record.get("devices")), _texts(record.get("command"))
    return {
        "time": str(record.get("time") or "not recorded"),
        "started": f"{started:,}",
        "resumed": f"{resumed:,}" if resumed else "",
        "commit": str(record.get("commit", "")),
        "code": str(code.get("digest", "")),
        "torch": str(versions.get("torch", "")),
        "accepted as equal": ", ".join(_texts(accepted.get("files"))) or ("torch" if accepted else ""),
        "host": str(record.get("host", "")),
        "device": ", ".join(devices),
        "command": shlex.join(mask_arguments(command)),
    }


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _texts(found: object) -> list[str]:
    return list(map(str, found)) if isinstance(found, list) else []
