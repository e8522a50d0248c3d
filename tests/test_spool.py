import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grid.record.spool import Parked, Spool


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
from grid.record.spool import Parked, Spool
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


def damage(path: Path, content: bytes, mark: bytes | None = None) -> Spool:
    """Return a spool whose files a power loss has left like this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if mark is not None:
        path.with_suffix(".delivered").write_bytes(mark)
    return Spool(path)


TWO = b'{"name":"first"}\n{"name":"second"}\n'


@pytest.mark.parametrize(
    "mark", [b"", b"\0" * 8, b"\0", b"garbage", b"\xff\xfe", b"5", b"-17", b"999999", b"1e3", b"17\0\0"]
)
def test_a_damaged_note_of_what_was_delivered_delivers_all_again(mark: bytes, path: Path) -> None:
    spool = damage(path, TWO, mark)
    assert names(spool) == ["first", "second"]
    spool.append({"name": "third"})
    assert names(spool) == ["first", "second", "third"]
    spool.close()


def test_a_note_that_is_whole_counts(path: Path) -> None:
    spool = damage(path, TWO, b"17")
    assert (names(spool), spool.appended) == (["second"], 1)
    spool.close()


@pytest.mark.parametrize(
    "damaged", [b"\0" * 4096, b'{"name":"ha', b"\xff\xfe\0", b"17", b"[]", b"null", b"", b"[" * 100_000]
)
def test_a_damaged_line_is_left_out_and_counted(damaged: bytes, path: Path) -> None:
    spool = damage(path, b'{"name":"first"}\n' + damaged + b'\n{"name":"second"}\n')
    for _ in range(2):
        assert names(spool) == ["first", "second"]
        assert list(spool.unreadable.items()) == [(17, len(damaged) + 1)]
    spool.delivered(spool.pending()[1])
    spool.close()
    assert not path.exists()


@pytest.mark.parametrize("damaged", [b"\0" * 4096, b'{"name":"ha'])
def test_a_damaged_end_is_cut_off_and_counted(damaged: bytes, path: Path) -> None:
    spool = damage(path, TWO + damaged)
    spool.append({"name": "third"})
    assert names(spool) == ["first", "second", "third"]
    assert list(spool.unreadable.values()) == [len(damaged)]
    spool.close()


def test_zeros_before_a_line_do_not_take_it_along(path: Path) -> None:
    spool = damage(path, b"\0" * 512 + TWO)
    assert (names(spool), spool.unreadable) == (["first", "second"], {})
    spool.close()


def test_parked_lines_come_back_and_leave_no_file_when_they_are_gone(path: Path) -> None:
    spool = Spool(path)
    parked = Parked(spool)
    parked.add("a", [{"name": "first"}, {"name": "second"}], "a bug", again=True)
    parked.add("b", [{"name": "third"}], "too long", again=False)
    again = Parked(spool)
    assert again.lines == parked.lines
    assert (again.held, [line.reason for line in again.lines]) == ({"a"}, ["a bug", "a bug", "too long"])
    again.replace(again.lines[:2], [])
    assert (again.held, Parked(spool).lines) == (set(), parked.lines[2:])
    again.replace(again.lines, [])
    assert not again.path.exists()
    spool.close()


@pytest.mark.parametrize("damaged", [b"", b"\0" * 100, b'{"group":"a"}', b'{"group":"b","reason":"x","again":tr'])
def test_damaged_parked_lines_do_no_harm(damaged: bytes, path: Path) -> None:
    spool = Spool(path)
    Parked(spool).add("a", [{"name": "first"}], "a bug", again=True)
    (file := Parked(spool).path).write_bytes(damaged + b"\n" + file.read_bytes() + damaged)
    assert [line.line for line in Parked(spool).lines] == [{"name": "first"}]
    spool.close()
