"""What the commands print for programs and papers: held against the schema in docs/, and against the text."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jsonschema import Draft202012Validator

from analysis import audit, compare, effects, rank
from analysis.formatting import to_latex, to_markdown, to_records
from benchmarks.planted.grids import Plan, plant
from grid.check import main as check_main
from grid.record.store import Store
from grid.run import main as run_main
from tests.schema import SCHEMA, check_answer
from tests.test_compare import again, experiment

COMMANDS = {"rank": rank.main, "effects": effects.main, "audit": audit.main}
COLUMNS = {"val acc": ["81.80%", "7.00%"], "cell": ["a_b | c", "x"]}


def test_the_schema_is_one() -> None:
    for definition in SCHEMA["$defs"].values():
        Draft202012Validator.check_schema(definition)
    assert SCHEMA["$defs"].keys() == {*COMMANDS, "compare", "run", "dry_run", "check"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_real_store_is_answered_by_the_schema_and_nothing_else_is_printed(
    name: str, finished_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--experiment", "finished", "--store", finished_store.uri]
    assert COMMANDS[name]([*where, "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out, parse_constant=pytest.fail)  # NaN is no JSON
    check_answer(name, answer)
    assert answer["experiment"] == "finished"
    assert COMMANDS[name](where) == 0
    text = " ".join(capsys.readouterr().out.split())
    for note in answer["notes"]:
        assert " ".join(note.split()) in text


def test_the_numbers_are_those_of_the_text(finished_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--experiment", "finished", "--store", finished_store.uri]
    assert rank.main([*where, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert rank.main([*where, "--top", str(len(cells))]) == 0
    text = capsys.readouterr().out
    for cell in cells:
        assert re.search(rf"^ *{cell['rank']}\b.*\b{cell['val_accuracy']:.2%}", text, re.MULTILINE), cell


def test_a_comparison_is_answered_by_the_schema() -> None:
    rng = np.random.default_rng(0)
    trials = plant(Plan(controls=100), rng).trials.assign(lr_scale=1.0)
    before, after = experiment(trials, "old", {"commit": "a"}), experiment(again(trials, rng), "new", {})
    check_answer("compare", json.loads(json.dumps(compare.describe(*compare.compare(before, after), before, after))))


def test_parts_of_a_file_are_answered_by_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text("from grid import parts\n\n@parts.activation('broken')\ndef f(x):\n    return x[:1]\n")
    assert check_main([str(file), "--json"]) == 1
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    check_answer("check", answer)
    assert answer["parts"] == ["activation broken"]
    assert answer["faults"] > 0
    assert answer["findings"][0]["text"] in printed.err


def test_a_forecast_is_answered_by_the_schema_and_its_text_is_on_stderr(
    glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["--data-dir", str(glyphs_dir), "--address", "local"]
    assert run_main(["--grid", "smoke", "--per-class", "10", *place, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    check_answer("dry_run", answer)
    assert (answer["cells"], answer["trials"], answer["budget"], answer["rungs"]) == (32, 32, 9, [3])
    assert f"{answer['epochs']:,.0f} expected of 288" in printed.err


def test_nothing_known_is_null() -> None:
    table = pd.DataFrame({"x": [1.5, np.nan], "n": [1, 2], "t": ["a", None]})
    assert to_records(table) == [{"x": 1.5, "n": 1, "t": "a"}, {"x": None, "n": 2, "t": None}]
    json.dumps(to_records(table), allow_nan=False)


def test_markdown_is_a_table_whose_cells_keep_their_bars() -> None:
    assert to_markdown(COLUMNS).splitlines() == [
        "| val acc | cell |",
        "| ---: | :--- |",
        r"| 81.80% | a_b \| c |",
        "| 7.00% | x |",
    ]


def test_latex_is_a_table_whose_characters_are_escaped() -> None:
    assert to_latex({"%": ["1_2", "a&b"], "cell": ["{x}^2 ~ $y$ #1", "\\z"]}).splitlines() == [
        r"\begin{tabular}{rl}",
        r"\toprule",
        r"\% & cell \\",
        r"\midrule",
        r"1\_2 & \{x\}\textasciicircum{}2 \textasciitilde{} \$y\$ \#1 \\",
        r"a\&b & \textbackslash{}z \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(("command", "header"), [(rank.main, "cell"), (effects.main, "levels")])
@pytest.mark.parametrize(("kind", "start"), [("markdown", "| "), ("latex", "\\begin{tabular}")])
def test_the_commands_print_the_table_alone(
    command: Any, header: str, kind: str, start: str, finished_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["--experiment", "finished", "--store", finished_store.uri, "--format", kind]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(start)
    assert header in printed
    assert "trials" not in printed
