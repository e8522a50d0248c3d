import json
import sys

import pytest

from grid.record.manifest import PACKAGES, describe_code


def test_the_code_is_described_by_commit_versions_host_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--grid", "smoke"])
    described = describe_code()
    assert described["command"] == ["python", "-m", "grid.run", "--grid", "smoke"]
    assert set(described["versions"]) == {"python", *PACKAGES}
    assert described["commit"]
    assert json.loads(json.dumps(described)) == described


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_code()["commit"] == "unknown"
