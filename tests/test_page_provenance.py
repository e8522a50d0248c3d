"""The table of the commands that trained an experiment, as the page shows it."""

from dataclasses import replace

import pandas as pd
import pytest

from analysis.page.provenance import command_table
from analysis.page.render import render
from analysis.store import Experiment, read_experiment
from analysis.trial_table import COLUMNS
from analysis.verdict import analyse
from grid.record.commands import record_command
from grid.record.store import Store


def experiment(store: Store, *trials: tuple[str, str]) -> Experiment:
    """Return an experiment whose trials name these commands: who started each, and who trained it further."""
    rows = pd.DataFrame(trials, columns=["command", "resumed_by"], dtype="str")
    finalists = pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    return Experiment(store.uri, store.experiment, store.parent_id, rows, finalists, {}, ())


def test_each_command_has_a_row_with_its_code_and_what_it_trained(store: Store) -> None:
    record = {
        "commit": "0123456789ab",
        "versions": {"torch": "2.11.0"},
        "code": {"digest": "ba9876543210"},
        "devices": ["a GPU", "another"],
        "host": "head",
        "command": ["python", "-m", "grid.run", "--store=mysql://me:SECRET@db/grid", "--only", "model=mlp cnn"],
    }
    first = record_command(store, record)
    second = record_command(store, {"accepted": {"files": ["nets/mlp.py"]}})
    table = command_table(experiment(store, (first, second), (first, f"{second},{first}"), (second, ""), ("", "")))
    assert table is not None
    rows = table.rows.set_index("commit")
    assert rows.loc["0123456789ab"].drop("time").to_dict() == {
        "started": "2",
        "resumed": "1",
        "code": "ba9876543210",
        "torch": "2.11.0",
        "accepted as equal": "",
        "host": "head",
        "device": "a GPU, another",
        "command": "python -m grid.run '--store=mysql://me:***@db/grid' --only 'model=mlp cnn'",
    }
    other = rows.loc[""]
    assert (other["started"], other["resumed"], other["accepted as equal"]) == ("1", "2", "nets/mlp.py")
    assert table.remark == "1 trial started by a command that is not recorded"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"code": 1, "versions": [], "devices": "x", "command": null}'])
def test_a_damaged_or_missing_record_is_a_row_without_details(content: bytes, store: Store) -> None:
    name = "20260131T235959Z-0a1b2c3d"
    if content:
        store.attach(store.parent_id, {f"commands/{name}.json": content})
    table = command_table(experiment(store, (name, "")))
    assert table is not None
    assert table.rows.to_dict("records") == [{"time": "not recorded", "started": "1"}]


def test_a_store_that_names_no_command_or_nonsense_has_no_table(store: Store) -> None:
    assert command_table(experiment(store, ("", ""))) is None
    assert command_table(experiment(store, ("../../etc/passwd", "nonsense,?"))) is None


def test_the_page_shows_the_commands_and_hides_what_an_older_version_did_not(finished_store: Store) -> None:
    manifest = {"command": ["--store=mysql://db/grid?password=SECRET"]}
    page = render(analyse(replace(read_experiment(finished_store.uri, "finished"), manifest=manifest)))
    assert "<h3>Commands that trained</h3>" in page
    assert "python -m grid.run" in page
    assert "mysql://db/grid?password=***" in page
    assert "SECRET" not in page
