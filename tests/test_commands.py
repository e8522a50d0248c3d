"""The records of commands: one each, complete, without secrets, never replaced."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from grid.config import TrialConfig
from grid.record.commands import (
    commands_of,
    describe_code,
    describe_numeric_code,
    describe_settings,
    numeric_code_of,
    read_command,
    record_command,
)
from grid.record.store import Store
from grid.recorded import MANIFEST, command_path
from grid.run import _parser, read_request
from grid.train.code_version import PACKAGES, NumericCode

ROOT = Path(__file__).parents[1]


def records(store: Store) -> list[str]:
    return [file.path for file in store.client.list_artifacts(store.parent_id, "commands")]


def test_the_code_is_described_by_commit_versions_host_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--grid", "smoke", "--store", "mysql://me:SECRET@db/grid", "--token", "X"]
    )
    described = describe_code("grid.confirm")
    masked = ["--store", "mysql://me:***@db/grid", "--token", "***"]
    assert described["command"] == ["python", "-m", "grid.confirm", "--grid", "smoke", *masked]
    assert set(described["versions"]) == {"python", *PACKAGES}
    assert bool(described["dirty"]) == described["commit"].endswith("-dirty")
    assert json.loads(json.dumps(described)) == described


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    described = describe_code()
    assert (described["commit"], described["dirty"]) == ("unknown", None)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_repository_around_an_installed_copy_is_not_its_own(tmp_path: Path) -> None:
    for name in ("grid", "nets"):
        shutil.copytree(ROOT / name, tmp_path / "site-packages" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "paper.tex").write_text("of somebody else")
    identity = ["-c", "user.name=me", "-c", "user.email=me@home"]
    for command in (["init", "--quiet"], ["add", "paper.tex"], [*identity, "commit", "--quiet", "-m", "Begin"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    script = "from grid.record.commands import describe_code; print(describe_code()['commit'])"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site-packages")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "unknown\n"


def test_settings_are_recorded_whole_and_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as database:
        uri = f"postgresql://me:SECRET@127.0.0.1:{database.getsockname()[1]}/grid?password=SECRET"
        secret = ["--store", uri, "--storage", "s3://KEY:SECRET@bucket"]
        options = ["--grid", "smoke", "--only", "model=mlp", "--epochs", "9", *secret]
        request = read_request(_parser().parse_args(options))
    settings = describe_settings(request)
    assert "SECRET" not in json.dumps(settings)
    assert settings["levels"]["model"] == ["mlp"]
    assert settings["rule"] == {"factor": 3, "grace": None, "within": ["model"]}
    assert (settings["epochs"], settings["lr_scales"], settings["budget"]["hours"]) == (9, [1.0], None)
    assert settings["data_dir"] == str(tmp_path / "data")


def test_a_record_is_added_and_never_replaced(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = record_command(store, {"commit": "a"})
    second = record_command(store, {"commit": "b"})
    assert first != second
    assert records(store) == sorted([command_path(first), command_path(second)])
    assert [read_command(store, name)["commit"] for name in (first, second)] == ["a", "b"]
    assert not (tmp_path / "commands").exists()


def test_what_an_earlier_version_described_is_kept_when_its_description_is_replaced(store: Store) -> None:
    manifest = {"grid": "full", "seeds": 1, "commit": "0123", "versions": {"torch": "2.11.0"}}
    store.attach(store.parent_id, {"grid.json": json.dumps(manifest).encode()})
    assert len(records(store)) == 0
    confirming = record_command(store, {"commit": "a"})  # grid.confirm does not replace it
    running = record_command(store, {"commit": "b", "plan": {"grid": "smoke"}}, store.manifest())
    store.attach(store.parent_id, {"grid.json": b'{"grid": "smoke", "record": "of running"}'})
    again = record_command(store, {"commit": "b", "plan": {"grid": "smoke"}}, store.manifest())
    assert set(records(store)) == set(map(command_path, [confirming, running, again, f"{running}.earlier"]))
    earlier = read_command(store, f"{running}.earlier")
    assert (earlier["commit"], earlier["versions"], earlier["plan"]) == (
        "0123",
        {"torch": "2.11.0"},
        {"grid": "full", "seeds": 1},
    )


def test_the_code_of_a_record_is_read_back(store: Store) -> None:
    code = NumericCode.here()
    name = record_command(store, {"versions": {"torch": code.torch}, "code": describe_numeric_code(code)})
    assert numeric_code_of(read_command(store, name)) == code


@pytest.mark.parametrize(
    "content",
    [b"", b'{"code"', b"[]", b"[" * 10**5, b'{"code": 3}', b'{"code": {"files": []}, "versions": {"torch": "1"}}'],
)
def test_a_damaged_record_names_no_code(content: bytes, store: Store) -> None:
    store.attach(store.parent_id, {command_path("20260131T235959Z-0a1b2c3d"): content})
    assert numeric_code_of(read_command(store, "20260131T235959Z-0a1b2c3d")) is None
    assert read_command(store, "20260131T235959Z-00000000") == {}
    store.attach(store.parent_id, {MANIFEST: content})
    assert set(store.manifest()) <= {"code", "versions"}


def test_trials_name_their_commands_latest_first_and_nonsense_is_passed_over(store: Store) -> None:
    ids = [f"2026013{day}T000000Z-0a1b2c3d" for day in range(3)]
    client: MlflowClient = store.client
    named: tuple[dict[str, str], ...] = (
        {"command": ids[1], "resumed_by": f"{ids[2]},../../etc"},
        {"command": ids[0]},
        {"command": "?"},
        {},
    )
    for seed, tags in enumerate(named):
        config = TrialConfig(learning_rate=0.1, epochs=3, seed=seed)
        keys = {"kind": "trial", "trial_key": config.trial_key, "cell_key": config.cell_key}
        run = client.create_run(store.experiment_id, tags=keys | tags)
        for name, value in config.to_params().items():
            client.log_param(run.info.run_id, name, value)
    assert commands_of(store.trials().values()) == ids[::-1]
