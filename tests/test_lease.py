"""The lease: who may drive an experiment, and for how long."""

import os
import socket
import subprocess
import sys
import time

import pytest

from grid.config import InputError
from grid.record import lease as lease_module
from grid.record.lease import EXPIRY_SECONDS, Lease
from grid.record.store import Store

ELSEWHERE = "elsewhere:42"


def lease_as(store: Store, driver: str, seconds_ago: float = 0.0) -> None:
    store.client.set_tag(store.parent_id, "driver", driver)
    store.client.set_tag(store.parent_id, "driver_seen", str(time.time() - seconds_ago))


def holder(store: Store) -> str:
    return str(store.client.get_run(store.parent_id).data.tags["driver"])


def test_a_second_driver_is_refused_with_the_name_of_the_first(store: Store) -> None:
    lease_as(store, ELSEWHERE, seconds_ago=5)
    message = r"^experiment 'some grid' is being run by elsewhere:42 \(last heartbeat 5 s ago\)"
    with pytest.raises(InputError, match=message), Lease(store):
        pass
    assert holder(store) == ELSEWHERE


def test_the_lease_of_a_silent_driver_elsewhere_expires(store: Store) -> None:
    lease_as(store, ELSEWHERE, seconds_ago=EXPIRY_SECONDS + 1)
    with Lease(store):
        assert holder(store).endswith(f":{os.getpid()}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_lease_of_a_dead_driver_on_this_machine_expires_at_once(store: Store) -> None:
    code = (
        "import os; from grid.record.lease import Lease; from grid.record.store import Store\n"
        f"store = Store({store.uri!r}, 'some grid'); store.create(); lease = Lease(store)\n"
        "lease.request(); lease.confirm(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not holder(store).endswith(f":{os.getpid()}")
    with Lease(store):
        assert holder(store).endswith(f":{os.getpid()}")


def test_of_two_simultaneous_drivers_the_later_one_gets_the_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: lease_as(store, ELSEWHERE))
    with pytest.raises(InputError, match="^another driver has just started on experiment 'some grid'"), Lease(store):
        pass
    assert holder(store) == ELSEWHERE


def test_the_same_driver_may_take_its_lease_again(store: Store) -> None:
    with Lease(store), Lease(store):
        pass
    assert holder(store) == ""


def test_heartbeats_keep_a_lease_alive_until_it_is_released(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.02)
    with Lease(store):
        lease_as(store, f"{socket.gethostname()}:{os.getpid()}", seconds_ago=1000)
        time.sleep(0.3)
        tags = store.client.get_run(store.parent_id).data.tags
        assert time.time() - float(tags["driver_seen"]) < 100
    assert holder(store) == ""


def test_only_the_holder_can_release_a_lease(store: Store) -> None:
    with Lease(store):
        lease_as(store, ELSEWHERE)  # while this driver's machine slept
    assert holder(store) == ELSEWHERE


def test_a_lease_on_a_store_that_is_down_is_refused_in_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.client, "get_run", unplugged)
    with pytest.raises(InputError, match="^can't use the store sqlite.*: the cable is cut; pass another --store$"):
        Lease(store).request()


def test_releasing_a_lease_on_a_store_that_is_down_lets_it_expire(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(store):
        monkeypatch.setattr(store.client, "get_run", unplugged)
    monkeypatch.undo()
    assert holder(store).endswith(f":{os.getpid()}")


def unplugged(*given: object, **named: object) -> None:
    raise OSError("the cable is cut")
