import os
import socket
import subprocess
import sys
import time

import pytest

from grid.config import InputError
from grid.record.store import DEAD_AFTER_SECONDS, Store
from grid.wording import first_line


def lease_as(store: Store, driver: str, seconds_ago: float = 0.0) -> None:
    store.client.set_tag(store.parent_id, "driver", driver)
    store.client.set_tag(store.parent_id, "driver_seen", str(time.time() - seconds_ago))


def test_there_is_one_parent_run_however_often_an_experiment_is_made(store: Store) -> None:
    again = Store(store.uri, "some grid")
    again.create()
    assert (again.experiment_id, again.parent_id) == (store.experiment_id, store.parent_id)


def test_a_second_driver_is_told_who_is_first(store: Store) -> None:
    lease_as(store, "elsewhere:42", seconds_ago=5)
    with pytest.raises(InputError, match=r"^experiment 'some grid' is being run by elsewhere:42 \(alive 5 s ago\)"):
        store.claim()
    assert store.client.get_run(store.parent_id).data.tags["driver"] == "elsewhere:42"


def test_a_silent_driver_elsewhere_is_passed_over(store: Store) -> None:
    lease_as(store, "elsewhere:42", seconds_ago=DEAD_AFTER_SECONDS + 1)
    store.claim()
    assert store.client.get_run(store.parent_id).data.tags["driver"].endswith(f":{os.getpid()}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_dead_driver_on_this_machine_is_passed_over_at_once(store: Store) -> None:
    code = f"from grid.record.store import Store; s = Store({store.uri!r}, 'some grid'); s.create(); s.claim()"
    subprocess.run([sys.executable, "-c", code], check=True)
    store.claim()


def test_of_two_drivers_at_once_the_later_has_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.record.store.time.sleep", lambda seconds: lease_as(store, "elsewhere:42"))
    with pytest.raises(InputError, match="^experiment 'some grid' was lease by another driver just now"):
        store.claim()
    assert store.client.get_run(store.parent_id).data.tags["driver"] == "elsewhere:42"


def test_a_claim_can_be_renewed_and_given_up(store: Store) -> None:
    store.claim()
    store.claim()
    store.release()
    assert store.client.get_run(store.parent_id).data.tags["driver"] == ""


def test_a_claim_is_kept_alive_and_given_up_at_the_end(store: Store) -> None:
    with store.lease(every_seconds=0.02):
        lease_as(store, f"{socket.gethostname()}:{os.getpid()}", seconds_ago=1000)
        time.sleep(0.3)
        tags = store.client.get_run(store.parent_id).data.tags
        assert time.time() - float(tags["driver_seen"]) < 100
    assert store.client.get_run(store.parent_id).data.tags["driver"] == ""


@pytest.mark.parametrize(("error", "line"), [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError")])
def test_an_error_becomes_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize("call", ["create", "claim", "trials"])
def test_a_store_that_does_not_answer_is_told(call: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise OSError("the cable is cut")

    for name in ("get_experiment_by_name", "get_run", "search_runs"):
        monkeypatch.setattr(store.client, name, refuse)
    with pytest.raises(InputError, match="^can't use the store sqlite.*: the cable is cut; pass another --store$"):
        getattr(store, call)()


def test_a_claim_is_given_up_by_who_has_it_alone(store: Store) -> None:
    store.claim()
    lease_as(store, "elsewhere:42")  # while this driver's machine slept
    store.release()
    with pytest.raises(InputError, match="is being run by elsewhere:42"):
        store.claim()
