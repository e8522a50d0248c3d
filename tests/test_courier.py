import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from grid.record import courier
from grid.record.courier import Courier, Refusal, describe
from grid.record.spool import Line, Spool
from tests.waiting import wait_until


class Shelf:
    """A carrier to a store that keeps lists, and fails for the groups in `failing`."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, int]] = []
        self.failing: set[str] = set()
        self.refused: set[int] = set()

    def group_of(self, line: Line) -> str:
        return str(line["group"])

    def deliver(self, group: str, lines: Sequence[Line], *, again: bool) -> None:
        if group in self.failing or "all" in self.failing:
            raise RuntimeError(f"no luck with {group}")
        if self.refused & {line["number"] for line in lines}:
            raise Refusal("not today")
        self.arrived += [(group, line["number"]) for line in lines]

    def is_refused(self, error: Exception) -> bool:
        return False

    def of(self, group: str) -> list[int]:
        return [number for name, number in self.arrived if name == group]


class Desk:
    """A courier with its queue and shelf."""

    def __init__(self, path: Path):
        self.spool, self.shelf, self.number = Spool(path), Shelf(), 0
        self.courier = Courier("courier", self.spool, self.shelf)

    def send(self, groups: str) -> None:
        for group in groups:
            self.number += 1
            self.spool.append({"group": group, "number": self.number})

    def try_once(self) -> bool:
        try:
            self.courier.catch_up()
        except RuntimeError:
            return False
        return True


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.001)
    desk = Desk(tmp_path / "spool.jsonl")
    yield desk
    desk.spool.close()


def test_a_store_that_takes_nothing_for_long_parks_nothing_and_gets_everything_in_order(desk: Desk) -> None:
    desk.shelf.failing = {"all"}
    desk.send("abcdefgh" * 2)
    assert not any(desk.try_once() for _ in range(5))
    assert (desk.courier.parked.lines, desk.courier.waiting, desk.shelf.arrived) == ([], 16, [])
    desk.shelf.failing = set()
    assert desk.try_once()
    assert {group: desk.shelf.of(group) for group in "abcdefgh"} == {
        group: [number, number + 8] for number, group in enumerate("abcdefgh", start=1)
    }
    assert (desk.courier.parked.lines, desk.courier.waiting, desk.spool.pending()[0]) == ([], 0, [])


def test_groups_that_fail_hold_no_other_up_however_many_they_are(desk: Desk) -> None:
    desk.shelf.failing = set("pqrst")
    desk.send("pqrstpqrst")
    for _ in range(20):
        desk.send("a")
        desk.try_once()
    assert len(desk.shelf.of("a")) == 20
    assert desk.courier.parked.held == set("pqrst")
    assert desk.spool.pending()[0] == []
    assert desk.courier.waiting == 10


def test_what_follows_a_parked_line_waits_behind_it(desk: Desk) -> None:
    desk.shelf.failing = {"p"}
    desk.send("p")
    for _ in range(4):
        desk.send("a")
        desk.try_once()
    desk.send("pp")
    desk.try_once()
    assert (desk.shelf.of("p"), len(desk.courier.parked.lines)) == ([], 3)
    desk.shelf.failing = set()
    assert desk.try_once()
    assert desk.shelf.of("p") == sorted(desk.shelf.of("p"))
    assert (len(desk.shelf.of("p")), desk.courier.parked.path.exists()) == (3, False)


def test_a_refused_line_is_found_among_others_and_they_arrive_once(desk: Desk) -> None:
    desk.shelf.refused = {2, 5}
    desk.send("aaaaaa")
    assert desk.try_once()
    assert desk.shelf.of("a") == [1, 3, 4, 6]
    assert [(line.line["number"], line.reason, line.again) for line in desk.courier.parked.lines] == [
        (2, "not today", False),
        (5, "not today", False),
    ]
    desk.send("a")
    desk.try_once()
    assert desk.shelf.of("a")[-1] == 7  # a line that is parked for good holds nothing back


def test_the_thread_retries_parked_lines_while_it_runs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "PARKED_WAIT_SECONDS", 0.01)
    desk.shelf.failing = {"p"}
    desk.courier.start()
    desk.send("p")
    wait_until(lambda: desk.send("a") or desk.courier.wake() or desk.courier.parked.held == {"p"})
    desk.shelf.failing = set()
    wait_until(lambda: desk.shelf.of("p") == [1])
    assert desk.courier.close(time.monotonic() + 60)
    assert not desk.courier.parked.path.exists()


def test_a_disk_that_is_full_while_lines_are_parked_loses_none(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.shelf.refused = {2}
    desk.send("aaa")

    def refuse(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(desk.courier.parked, "add", refuse)
    with pytest.raises(OSError, match="No space left"):
        desk.courier.catch_up()
    assert desk.courier.waiting == 2  # the first arrived alone
    monkeypatch.undo()
    monkeypatch.setattr(courier, "FIRST_WAIT_SECONDS", 0.001)
    assert desk.try_once()
    assert (desk.shelf.of("a"), len(desk.courier.parked.lines), desk.courier.waiting) == ([1, 3], 1, 0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("the cable is cut"), "the cable is cut"),
        (Refusal("not today"), "not today"),
        (KeyError("region"), "KeyError: 'region'"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("postgresql://me:secret@db/x is away"), "RuntimeError: postgresql://me:***@db/x is away"),
    ],
)
def test_an_error_is_described_in_one_line_without_secrets(error: Exception, text: str) -> None:
    assert describe(error) == text
