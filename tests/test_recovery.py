"""What becomes of trials whose workers die, hang or wait, by the rules alone."""

import pytest

from grid.tune.recovery import (
    EPOCH_FACTOR,
    FEWEST_FUTILE_DEATHS,
    MOST_DEATHS,
    AwakeClock,
    Deadlines,
    Death,
    Recovery,
    StorageWaits,
    explain_death,
)

DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: ..."
OWN = Death("killed, or crashed", own=True)
LOST = Death("its node was lost", own=False)


@pytest.mark.parametrize(
    ("text", "killed", "reason", "own"),
    [
        (DIED, False, "killed, or crashed; the kernel's log (dmesg) of its machine may say why", True),
        (DIED, True, "killed by the kernel for want of memory", True),
        (
            "OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. ...\n17 0.5 preempt.py",
            True,
            "killed by Ray because its node ran low on memory",
            True,
        ),
        ("The actor died because its node has died. Node Id: 1f", True, "its node was lost", False),
        ("NodeDiedError: Task failed because the node ...", False, "its node was lost", False),
        (
            "The actor died because its node has died. the actor's node was preempted: spot",
            False,
            "its node was preempted",
            False,
        ),
        ("The actor 1f is unavailable: ...", False, "its node does not answer", False),
        (
            "The actor died because of an error raised in its creation task, ray::TrialWorker.__init__()\n"
            "  File ...\nImportError: no torch",
            False,
            "it could not start: ImportError: no torch",
            True,
        ),
        (
            "ray::TrialWorker.train()\nTraceback (most recent call last):\n  ...\nValueError: is unavailable",
            False,
            "it raised ValueError: is unavailable",
            True,
        ),
        ("Something new.", False, "Something new.", True),
        ("", False, "no reason given", True),
    ],
)
def test_a_death_is_explained(text: str, killed: bool, reason: str, own: bool) -> None:
    assert explain_death(text, killed_for_memory=killed) == Death(reason, own)


def test_a_trial_whose_worker_dies_again_and_again_fails_with_the_reason() -> None:
    recovery = Recovery(slots=2)
    assert [recovery.died("key", OWN) for _ in range(MOST_DEATHS - 1)] == [""] * (MOST_DEATHS - 1)
    failure = recovery.died("key", OWN)
    assert failure == f"its worker died {MOST_DEATHS} times without finishing an epoch: killed, or crashed"


def test_lost_nodes_do_not_count_and_a_new_epoch_forgives() -> None:
    recovery = Recovery(slots=100)
    for epoch in range(1, 4 * MOST_DEATHS):
        assert recovery.died("key", LOST) == ""
        assert recovery.died("key", OWN) == ""
        recovery.progressed("key", epoch)


def test_an_epoch_that_is_trained_again_forgives_nothing() -> None:
    recovery = Recovery(slots=2)
    failures = []
    for _ in range(MOST_DEATHS):
        recovery.progressed("key", 1)
        failures.append(recovery.died("key", OWN))
    assert failures[:-1] == [""] * (MOST_DEATHS - 1)
    assert failures[-1]


@pytest.mark.parametrize(("slots", "most"), [(1, FEWEST_FUTILE_DEATHS), (100, 300)])
def test_the_run_ends_when_no_trial_gets_anywhere(slots: int, most: int) -> None:
    recovery = Recovery(slots)
    for death in range(most - 1):
        recovery.died(f"key {death}", LOST)
        assert recovery.futile == ""
    recovery.died("key", OWN)
    assert recovery.futile.startswith(f"{most} workers died in a row, none after an epoch (its node was lost); pass")
    recovery.progressed("other", 1)
    assert recovery.futile == ""


def failed(recovery: Recovery, *reasons: str) -> str:
    for reason in reasons:
        recovery.ended(reason)
    return recovery.futile


@pytest.mark.parametrize("slots", [1, 12])
def test_the_run_ends_when_the_first_trials_all_fail_alike(slots: int) -> None:
    most = max(8, slots)
    reasons = [f"Traceback ...\nValueError: 128 images, seed {seed}" for seed in range(most)]
    assert failed(Recovery(slots), *reasons[:-1]) == ""
    first = f"the first {most} trials all failed alike (ValueError: 128 images, seed 0); fix that, or pass --keep-going"
    assert failed(Recovery(slots), *reasons) == first
    assert failed(Recovery(slots, keep_going=True), *reasons) == ""


def test_one_that_trains_succeeds_or_fails_otherwise_keeps_the_run_going() -> None:
    alike = ["ValueError: x"] * 20
    trains = Recovery(1)
    trains.progressed("slow", 1)
    assert failed(trains, *alike) == ""
    assert failed(Recovery(1), "", *alike) == ""
    assert failed(Recovery(1), *alike[:7], "KeyError: 'y'", *alike) == ""


class Time:
    def __init__(self) -> None:
        self.now = 1000.0
        self.awake = AwakeClock(lambda: self.now)

    def run(self, seconds: float) -> None:
        for _ in range(round(10 * seconds)):
            self.now += 0.1
            self.awake.look()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.awake.look()


@pytest.fixture
def time() -> Time:
    return Time()


def test_an_epoch_is_overdue_after_many_times_what_others_of_its_model_took(time: Time) -> None:
    deadlines = Deadlines(time.awake, floor_seconds=10)
    deadlines.end("other", "mlp", 2.0)
    deadlines.begin("key", "mlp")
    time.run(2 * EPOCH_FACTOR - 1)
    assert deadlines.overdue() == {}
    time.run(2)
    assert deadlines.overdue() == {"key": "an epoch took more than 40 s, 20 times as long as expected"}
    assert deadlines.overdue() == {}


def test_the_epochs_of_the_trial_itself_count_more_than_those_of_its_model(time: Time) -> None:
    deadlines = Deadlines(time.awake, floor_seconds=10)
    for _ in range(9):
        deadlines.end("other", "mlp", 0.1)
    deadlines.end("slow", "mlp", 5.0)
    deadlines.begin("slow", "mlp")
    time.run(99)
    assert deadlines.overdue() == {}
    time.run(2)
    assert set(deadlines.overdue()) == {"slow"}


def test_short_epochs_and_starts_get_time(time: Time) -> None:
    deadlines = Deadlines(time.awake, floor_seconds=10)
    deadlines.end("other", "mlp", 0.01)
    deadlines.begin("running", "mlp")
    deadlines.begin("starting", "mlp", first=True)
    time.run(9)
    assert deadlines.overdue() == {}
    time.run(2)
    assert set(deadlines.overdue()) == {"running"}
    time.run(10)
    assert set(deadlines.overdue()) == {"starting"}


def test_nothing_is_overdue_before_an_epoch_is_known_or_after_it_has_ended(time: Time) -> None:
    deadlines = Deadlines(time.awake, floor_seconds=10)
    deadlines.begin("first of its model", "mlp", first=True)
    deadlines.end("other", "cnn", 1.0)
    deadlines.begin("ended", "cnn")
    deadlines.end("ended", "cnn", 1.0)
    deadlines.begin("dead", "cnn")
    deadlines.forget("dead")
    time.run(1000)
    assert deadlines.overdue() == {}


def test_a_machine_that_sleeps_makes_no_epoch_overdue(time: Time) -> None:
    deadlines = Deadlines(time.awake, floor_seconds=10)
    deadlines.end("other", "mlp", 0.1)
    deadlines.begin("key", "mlp")
    time.sleep(8 * 3600)
    time.run(5)
    assert deadlines.overdue() == {}


def test_the_run_ends_if_the_storage_stays_away(time: Time) -> None:
    waits = StorageWaits(time.awake, patience_seconds=60)
    for _ in range(3):  # hiccups
        assert waits.failed("key", "can't write") == ""
        time.run(50)
        waits.answered("key")
    assert waits.failed("key", "can't write") == ""
    time.sleep(8 * 3600)
    assert waits.failed("key", "can't write") == ""
    time.run(61)
    problem = waits.failed("key", "can't write to the storage 's3://b': SlowDown")
    assert problem == "can't write to the storage 's3://b': SlowDown; that has lasted for 62 s: repair it or make room"
