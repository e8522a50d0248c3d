import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grid.record.spool import Spool


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "spool.jsonl"


def names(spool: Spool) -> list[str]:
    return [event["name"] for event in spool.pending()[0]]


def test_events_come_back_in_order(path: Path) -> None:
    spool = Spool(path)
    for name in ("first", "second"):
        spool.append({"name": name, "value": 0.1})
    assert spool.pending()[0] == [{"name": "first", "value": 0.1}, {"name": "second", "value": 0.1}]
    spool.close()


def test_delivered_events_do_not_come_back(path: Path) -> None:
    spool = Spool(path)
    spool.append({"name": "first"})
    spool.delivered(spool.pending()[1])
    spool.append({"name": "second"})
    assert names(spool) == ["second"]
    spool.close()


def test_another_process_takes_up_what_was_not_delivered(path: Path) -> None:
    spool = Spool(path)
    for name in ("first", "second", "third"):
        spool.append({"name": name})
    spool.delivered(spool.pending(limit=1)[1])
    spool.close()
    again = Spool(path)
    assert names(again) == ["second", "third"]
    again.close()


def test_what_was_appended_survives_a_killed_process(path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from grid.record.spool import Spool
Spool(Path({str(path)!r})).append({{"name": "last words"}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    spool = Spool(path)
    assert names(spool) == ["last words"]
    spool.close()


def test_a_line_torn_by_a_crash_is_cut_off(path: Path) -> None:
    spool = Spool(path)
    spool.append({"name": "whole"})
    spool.close()
    with path.open("ab") as file:
        file.write(b'{"name": "to')
    again = Spool(path)
    again.append({"name": "next"})
    assert names(again) == ["whole", "next"]
    again.close()


def test_a_spool_is_open_in_one_place_at_a_time(path: Path) -> None:
    spool = Spool(path)
    with pytest.raises(BlockingIOError):
        Spool(path)
    spool.close()
    Spool(path).close()


def test_a_dead_process_does_not_keep_the_spool(path: Path) -> None:
    opened = f"from pathlib import Path; from grid.record.spool import Spool; spool = Spool(Path({str(path)!r}))"
    code = f"import os; {opened}; os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    Spool(path).close()


def test_a_spool_that_is_all_delivered_leaves_no_events(path: Path) -> None:
    spool = Spool(path)
    spool.append({"name": "only"})
    spool.delivered(spool.pending()[1])
    spool.close()
    assert list(path.parent.iterdir()) == [path.with_suffix(".lock")]


def test_a_full_disk_is_an_error_and_nothing_of_the_event_is_left(path: Path) -> None:
    spool = Spool(path)
    spool.append({"name": "fits"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left|File too large"):
            spool.append({"name": "does not fit" * 10})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)
    spool.append({"name": "fits again"})
    spool.close()
    again = Spool(path)
    assert names(again) == ["fits", "fits again"]
    again.close()
