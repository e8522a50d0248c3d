"""Code that differs from what trained an experiment is refused, by name; trials name the commands that trained them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grid import confirm
from grid.config import InputError, TrialConfig
from grid.driver.provenance import check_code, describe_command
from grid.metrics import EpochReport
from grid.parts.files import PartsFile, load, loaded, unload
from grid.record.commands import commands_of, describe_numeric_code, read_command, record_command
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.run import _parser, read_request
from grid.train.code_version import NumericCode

ROOT = Path(__file__).parents[1]
HERE = NumericCode.here()
CONFIGS = [TrialConfig(learning_rate=0.1, epochs=3, seed=seed) for seed in range(3)]


def other_code(*files: str, torch: str = HERE.torch) -> NumericCode:
    return NumericCode({**HERE.files, **dict.fromkeys(files, "0" * 12)}, torch)


def as_record(code: NumericCode, **more: Any) -> dict[str, Any]:
    commit = {"commit": "0123456789ab", "dirty": False}
    return {**commit, "versions": {"torch": code.torch}, "code": describe_numeric_code(code), **more}


@contextmanager
def recording(store: Store, folder: Path, record: Mapping[str, Any] | None) -> Iterator[tuple[Recorder, str]]:
    """Record as one command does."""
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.recover()
    command = record_command(store, record) if record is not None else ""
    recorder.begin({}, store.trials(), command=command)
    yield recorder, command
    assert recorder.close(finished=False)


def start(store: Store, folder: Path, record: Mapping[str, Any] | None, config: TrialConfig = CONFIGS[0]) -> str:
    """Start a trial by a command, and return the command's id."""
    with recording(store, folder, record) as (recorder, command):
        recorder.started(config, control=False)
    return command


def check(store: Store, *, accept: bool = False) -> Any:
    return check_code(store, store.trials().values(), accept=accept)


PARTS = "from grid import parts\nfrom torch import nn\nparts.activation('own')(nn.Hardswish)\n"


def use(text: str, name: str = "own.py") -> None:
    load([PartsFile(name, text)])


def test_a_parts_file_that_changed_is_refused_whatever_trained_in_between(store: Store, tmp_path: Path) -> None:
    use(PARTS)
    start(store, tmp_path, as_record(NumericCode.here()), replace(CONFIGS[0], activation="own"))
    check(store)
    use(f"# a comment\n{PARTS}")
    check(store)
    unload("own.py")
    start(store, tmp_path, as_record(NumericCode.here()), CONFIGS[1])  # without the file
    check(store)
    use(PARTS.replace("nn.Hardswish", "nn.Mish"))
    with pytest.raises(
        InputError,
        match=r"was trained with other code \(activation own\); use the parts file as it was .*--accept-code",
    ):
        check(store)
    accepted = check(store, accept=True)
    assert accepted.accepted["parts"] == ["activation own"]
    start(store, tmp_path, as_record(accepted.code), CONFIGS[2])
    check(store)  # both have trained


def test_new_parts_may_be_added_to_an_experiment(store: Store, tmp_path: Path) -> None:
    start(store, tmp_path, as_record(HERE))
    use(PARTS)
    check(store)


def test_the_text_of_a_parts_file_is_kept_with_the_parent_run(store: Store, tmp_path: Path) -> None:
    use(PARTS)
    start(store, tmp_path, as_record(NumericCode.here()))
    (file,) = loaded()
    assert store.artifact(f"parts/{file.digest}/own.py") == PARTS.encode()


def test_the_code_that_trained_it_may_train_on(store: Store, tmp_path: Path) -> None:
    start(store, tmp_path, as_record(HERE))
    assert check(store).accepted is None
    assert check(store).facts == {}


@pytest.mark.parametrize(
    ("before", "named"),
    [
        (other_code("grid/train/techniques/optimizers.py"), "other code (grid/train/techniques/optimizers.py)"),
        (other_code("nets/cnn.py", "grid/data/load.py"), "other code (grid/data/load.py, nets/cnn.py)"),
        (
            other_code(*(f"nets/{name}.py" for name in "edcba")),
            "other code (nets/a.py, nets/b.py, nets/c.py and 2 more)",
        ),
        (other_code(torch="1.13.1+cu117"), f"torch 1.13, not {HERE.torch_minor}"),
        (other_code("nets/mlp.py", torch="1.13.1"), f"other code (nets/mlp.py) and torch 1.13, not {HERE.torch_minor}"),
    ],
)
def test_other_code_is_refused_by_name_with_what_to_do(
    before: NumericCode, named: str, store: Store, tmp_path: Path
) -> None:
    start(store, tmp_path, as_record(before))
    with pytest.raises(InputError) as refused:
        check(store)
    assert str(refused.value) == (
        f"experiment 'some grid' was trained with {named}; use commit 0123456789ab, pick another --experiment, or pass "
        "--accept-code if you know that both yield the same numbers"
    )


@pytest.mark.parametrize(
    ("record", "origin"),
    [
        ({"commit": "012-dirty", "dirty": True}, "commit 012 with the changes that were not committed, pick another"),
        ({"commit": "unknown", "dirty": None}, "the code and torch that trained it, pick another"),
    ],
)
def test_the_code_to_go_back_to_is_described(record: dict[str, Any], origin: str, store: Store, tmp_path: Path) -> None:
    start(store, tmp_path, as_record(other_code("nets/mlp.py"), **record))
    with pytest.raises(InputError, match=f"; use {origin}"):
        check(store)


def test_accepted_code_is_recorded_and_both_codes_may_train_on(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path, as_record(other_code("nets/mlp.py")))
    accepting = check(store, accept=True)
    assert accepting.accepted == {"instead_of": first, "files": ["nets/mlp.py"], "torch": HERE.torch, "parts": []}
    assert accepting.facts == {"code": "accepted as equal to other code (nets/mlp.py)"}
    request = read_request(_parser().parse_args(["--grid", "smoke", "--accept-code"]))
    record = describe_command("grid.run", request, accepting, ["a GPU"])
    second = start(store, tmp_path, record, CONFIGS[1])
    assert read_command(store, second)["accepted"] == accepting.accepted
    assert read_command(store, second)["settings"]["accept_code"] is True
    assert check(store).accepted is None
    assert start(store, tmp_path, as_record(other_code("nets/mlp.py")), CONFIGS[2])


def test_a_command_that_trained_nothing_decides_nothing(store: Store, tmp_path: Path) -> None:
    start(store, tmp_path, as_record(HERE))
    record_command(store, as_record(other_code("nets/mlp.py")))
    assert check(store).accepted is None


def test_an_older_store_is_accepted_with_a_remark(store: Store, tmp_path: Path) -> None:
    assert check(store).facts == {}
    start(store, tmp_path, None)
    remark = "not recorded for 1 earlier trial, and taken to be the same"
    assert check(store).facts == {"code": remark}
    lost = start(store, tmp_path, as_record(other_code("nets/mlp.py")), CONFIGS[1])
    store.attach(store.parent_id, {f"commands/{lost}.json": b"damaged"})
    assert check(store).facts == {"code": remark.replace("1 earlier trial", "2 earlier trials")}


def test_a_trial_names_who_started_it_and_who_trained_it_further(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path, as_record(HERE))
    start(store, tmp_path, as_record(HERE))  # resumes it, and yields nothing
    later = []
    for epoch in (1, 2):
        with recording(store, tmp_path, as_record(HERE)) as (recorder, command):
            recorder.started(CONFIGS[0], control=False)
            recorder.epoch_ended(CONFIGS[0], EpochReport(epoch=epoch, val_accuracy=0.5), is_rung=False)
            recorder.started(CONFIGS[epoch], control=False)
        later.append(command)
    with recording(store, tmp_path, as_record(HERE)) as (recorder, command):
        recorder.ended(CONFIGS[0], "completed", epochs_run=3, best_val_accuracy=0.5)
    trials = store.trials()
    assert trials[CONFIGS[0].trial_key].tags["command"] == first
    assert trials[CONFIGS[0].trial_key].tags["resumed_by"] == ",".join([*later, command])
    for config, started_by in zip(CONFIGS[1:], later, strict=True):
        tags = trials[config.trial_key].tags
        assert (tags["command"], "resumed_by" in tags) == (started_by, False)
    assert set(commands_of(trials.values())) == {first, *later, command}


def test_what_a_crashed_driver_left_in_its_spool_names_the_crashed_command(store: Store, tmp_path: Path) -> None:
    crashed = record_command(store, as_record(HERE))
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder._command = crashed  # it has begun, and is killed before anything is delivered
    recorder.started(CONFIGS[0], control=False)
    recorder._spool.close()
    start(store, tmp_path, as_record(HERE), CONFIGS[1])
    assert store.trials()[CONFIGS[0].trial_key].tags["command"] == crashed


def test_a_very_often_resumed_trial_keeps_a_tag_that_mlflow_takes(store: Store, tmp_path: Path) -> None:
    start(store, tmp_path, as_record(HERE))
    (run_id,) = store.run_ids().values()
    ids = [f"20260131T235959Z-{number:08x}" for number in range(200)]
    store.client.set_tag(run_id, "resumed_by", ",".join(ids[:190]))
    with recording(store, tmp_path, as_record(HERE)) as (recorder, command):
        recorder.epoch_ended(CONFIGS[0], EpochReport(epoch=1, val_accuracy=0.5), is_rung=False)
    (trial,) = store.trials().values()
    assert trial.tags["resumed_by"].split(",") == [*ids[41:190], command]


def test_confirm_has_the_option_and_passes_it_on(store_uri: str) -> None:
    options = ["--experiment", "some grid", "--store", store_uri]
    assert not confirm.read_confirmation(confirm._parser().parse_args(options)).accept_code
    assert confirm.read_confirmation(confirm._parser().parse_args([*options, "--accept-code"])).accept_code


@pytest.mark.slow
def test_momentum_that_was_changed_in_the_table_is_not_mixed_in_silently(glyphs_dir: Path, tmp_path: Path) -> None:
    for name in ("grid", "nets", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shared = ["--experiment", "tiny", "--address", "local", "--data-dir", str(glyphs_dir)]
    only = [f"--only={levels}" for levels in ("model=mlp", "optimizer=sgd", "activation=relu", "dropout=off")]
    grid = ["grid.run", "--grid", "smoke", *only, "--per-class", "10", "--epochs", "1", "--no-report", *shared]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert run(*grid).returncode == 0
    table = tmp_path / "grid" / "parts" / "builtin.py"
    table.write_text(table.read_text().replace('"momentum": config.momentum', '"momentum": 0.0'))
    for command in ([*grid, "--seeds", "2"], ["grid.confirm", "--top", "1", "--seeds", "1", *shared]):
        refused = run(*command)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "was trained with other code (grid/parts/builtin.py); use " in refused.stderr
    accepted = run(*grid, "--seeds", "2", "--accept-code")
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert "accepted as equal to other code (grid/parts/builtin.py)" in accepted.stdout
    store = Store(f"sqlite:///{tmp_path}/mlflow.db", "tiny")
    store.open(missing=False)
    assert len(commands_of(store.trials().values())) == 2
    assert len(list((tmp_path / "mlartifacts").rglob("commands/*.json"))) == 2
