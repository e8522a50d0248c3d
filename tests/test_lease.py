"""The lease: who may drive an experiment, for how long, and what a driver that has lost it still does."""

import errno
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from grid.config import InputError, TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record import courier
from grid.record import holder as holder_module
from grid.record import lease as lease_module
from grid.record.fence import LeaseLostError
from grid.record.holder import Holder, StoreLock
from grid.record.lease import Lease
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.store_uri import sqlite_path
from tests import lease_driver
from tests.lease_driver import EXPERIMENT, EXPIRY, elsewhere
from tests.waiting import wait_until

CONFIG = TrialConfig(learning_rate=0.1, epochs=9)
REFUSED = r"^experiment 'some grid' is being run by {}; wait for it or stop it$"
HERE = REFUSED.format(rf"\S+:{os.getpid()}")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    lease_driver.shorten(monkeypatch)


def opened(store: Store) -> Store:
    """Return the same experiment as another driver sees it."""
    other = Store(store.uri, store.experiment)
    other.open()
    return other


def tag(store: Store, name: str = "driver") -> str:
    return str(store.client.get_run(store.parent_id).data.tags.get(name, ""))


def crash(lease: Lease) -> None:
    """End the heartbeats of a lease, and unlock its file, as the death of its driver would."""
    lease._ending.set()
    lease._thread.join()
    if lease._lock._file:
        lease._lock._file.close()


@contextmanager
def process(store: Store, folder: Path, *options: str, wrap: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run a driver in a process of its own; the first line that it prints is in `said`."""
    command = [*wrap, sys.executable, lease_driver.__file__, store.uri, str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def line(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def until_zombie(killed: subprocess.Popen[str]) -> None:
    """Return once a process that was killed is dead, which may take a while, without asking for its exit code."""
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)


def points(store: Store, seed: int) -> list[int]:
    """Return the recorded epochs of the trial with this seed."""
    key = TrialConfig(learning_rate=0.1, epochs=lease_driver.EPOCHS, seed=seed).trial_key
    runs = store.run_ids(trial_key=key)
    return [point.step for point in store.client.get_metric_history(runs[key], "val_loss")] if runs else []


# --- one driver ---


def test_a_second_driver_on_this_machine_is_refused_at_once_with_the_name_of_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 1000.0)
    with Lease(store), pytest.raises(InputError, match=HERE), Lease(opened(store)):
        pass


def test_a_second_driver_elsewhere_is_refused_as_soon_as_it_has_seen_a_heartbeat(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(store), elsewhere(), pytest.raises(InputError, match=HERE), Lease(opened(store)):
        pass
    told = rf"experiment 'some grid' was last run by \S+:{os.getpid()}, which may be alive: watching its heartbeat for "
    assert re.fullmatch(f"{told}up to 6 s\n", capsys.readouterr().err)


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_of_many_drivers_that_start_at_once_on_a_new_experiment_one_gets_the_lease(
    store_uri: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 600.0)  # all of them share one processor and one file
    Store(store_uri, "warm").open()
    for attempt in range(3):
        experiment, got, refused = f"new {attempt}", [], []
        ready = threading.Barrier(6)

        def drive(experiment: str, got: list[Lease], refused: list[str], ready: threading.Barrier) -> None:
            store = Store(store_uri, experiment)
            ready.wait()
            try:
                store.open()
                lease = Lease(store)
                lease.acquire()
                got.append(lease)
            except InputError as error:
                refused.append(str(error))

        with ExitStack() as stack:
            if place == "elsewhere":
                stack.enter_context(elsewhere())
            threads = [threading.Thread(target=drive, args=(experiment, got, refused, ready)) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [len(got), len(refused)] == [1, 5], refused
        assert all(f"experiment '{experiment}' is being run by" in message for message in refused)
        runs = got[0]._store.client.search_runs([got[0]._store.experiment_id])
        assert len(runs) == 1
        got[0].release()


@pytest.mark.parametrize("spaces", [(), ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")])
def test_of_two_processes_that_start_at_once_one_drives_whatever_their_process_ids(
    store_uri: str, tmp_path: Path, spaces: tuple[str, ...]
) -> None:
    if spaces and subprocess.run([*spaces, "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not make a pid namespace")
    store = Store(store_uri, EXPERIMENT)
    with process(store, tmp_path / "a", wrap=spaces) as one, process(store, tmp_path / "b", wrap=spaces) as other:
        said = sorted([line(one), line(other)])
        assert said[0] == "drives"
        assert said[1].startswith("experiment 'some grid' is being run by ")
    store.open()
    assert len(store.client.search_runs([store.experiment_id], "tags.kind = 'grid'")) == 1


@pytest.mark.parametrize("slow", ["create_experiment", "set_experiment_tag", "delete_experiment", "get_experiment"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_is_slow_gives_no_second_driver_the_lease(store: Store, slow: str, when: str) -> None:
    first, got, refused = opened(store), [], []
    quick = getattr(first.client, slow)
    waiting = threading.Event()

    def slowly(*given: Any, **named: Any) -> Any:
        if when == "before":
            waiting.set()
            time.sleep(1.2)
        answer = quick(*given, **named)
        waiting.set()
        if when == "after":
            time.sleep(1.2)
        return answer

    def drive(lease: Lease) -> None:
        try:
            lease.acquire()
            got.append(lease)
        except InputError as error:
            refused.append(str(error))

    with elsewhere(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(first.client, slow, slowly)
        leases = [Lease(first), Lease(opened(store))]
        threads = [threading.Thread(target=drive, args=(lease,)) for lease in leases]
        threads[0].start()
        waiting.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert [len(got), len(refused)] == [1, 1], refused
    got[0].release()


def test_two_folders_and_a_link_to_the_store_are_the_same_experiment(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    other = Store(f"sqlite:///{tmp_path}/link/mlflow.db", store.experiment)
    other.open()
    with (
        closing(Spool(tmp_path / "a" / "some.jsonl")) as one,
        closing(Spool(tmp_path / "b" / "some.jsonl")) as another,
        Lease(store, one),
        pytest.raises(InputError, match=HERE),
        Lease(other, another),
    ):
        pass


def test_an_experiment_that_another_driver_creates_at_the_same_time_is_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Store(store.uri, store.experiment)
    find, not_yet = late.client.get_experiment_by_name, [True]
    monkeypatch.setattr(
        late.client, "get_experiment_by_name", lambda name: None if not_yet and not_yet.pop() else find(name)
    )
    late.open()
    assert late.experiment_id == store.experiment_id


# --- its end ---


def test_a_lease_that_was_released_is_free_at_once_and_leaves_nothing(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        with elsewhere(), Lease(opened(store)) as lease:
            assert lease.number == number
            assert tag(store).endswith(f":{os.getpid()}")
        assert tag(store) == ""
    with Lease(opened(store)):
        pass
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("*.lock"))
    assert {entry.name for entry in store.client.search_experiments()} == {"Default", "unused", "some grid"}
    tags = store.client.get_experiment(store.experiment_id).tags
    assert {name: tags[name] for name in tags if name.startswith("lease_")} == {"lease_4": "released"}


@pytest.mark.slow
@pytest.mark.parametrize("place", [[], ["--elsewhere"]], ids=["lock", "process id"])
def test_the_lease_of_a_dead_driver_on_this_machine_is_free_at_once(
    store: Store, tmp_path: Path, place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(store, tmp_path, *place) as driver:
        assert line(driver) == "drives"
        driver.kill()
        until_zombie(driver)
        monkeypatch.setattr(lease_module, "POLL_SECONDS", 1000.0)
        with ExitStack() as stack:
            if place:
                stack.enter_context(elsewhere())
            with Lease(opened(store)) as lease:
                assert lease.number == 2


@pytest.mark.slow
@pytest.mark.parametrize("offset", [-150, 0, 86400])
def test_a_lease_elsewhere_ends_with_its_heartbeats_whatever_the_clocks_say(
    store: Store, tmp_path: Path, offset: int
) -> None:
    with process(store, tmp_path, "--elsewhere", f"--clock={offset}") as driver:
        assert line(driver) == "drives"
        with pytest.raises(InputError, match=REFUSED.format(rf"\S+:{driver.pid}")), Lease(opened(store)):
            pass
        driver.kill()
        begun = time.monotonic()
        with Lease(opened(store)) as lease:
            assert time.monotonic() - begun >= EXPIRY
            assert lease.number == 2


def test_a_driver_that_was_stopped_itself_while_it_watched_goes_on_watching(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere():
        first = Lease(opened(store))
        first.acquire()
    crash(first)
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: next(hours))
    polls = []
    waiting = Lease(opened(store))
    monkeypatch.setattr(waiting._ending, "wait", lambda seconds: bool(polls.append(seconds)))
    waiting.acquire()
    assert len(polls) > EXPIRY / 0.2 - 1
    monkeypatch.undo()
    waiting.release()


def test_waiting_can_be_ended_from_another_thread(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 1000.0)
    with elsewhere():
        first = Lease(opened(store))
        first.acquire()
    crash(first)
    waiting = Lease(opened(store))
    threading.Timer(0.5, waiting.release).start()
    with pytest.raises(InputError, match="^stopped waiting for experiment 'some grid'$"):
        waiting.acquire()
    assert waiting.number == 0


def test_a_lock_can_be_released_by_two_threads_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = StoreLock(store.uri, store.experiment_id)
    lock.acquire()
    assert lock.name
    is_at, others = holder_module._is_at, iter([lock.release])

    def interrupted(path: Path, file: TextIO) -> bool:
        for release in others:
            release()
        return is_at(path, file)

    monkeypatch.setattr(holder_module, "_is_at", interrupted)
    lock.release()
    assert not lock.name
    assert not list(Path(sqlite_path(store.uri) or "").parent.glob("*.lock"))


@pytest.mark.slow
def test_ctrl_c_ends_a_command_that_waits_for_a_lease(store: Store, tmp_path: Path) -> None:
    with elsewhere():
        first = Lease(opened(store))
        first.acquire()
    crash(first)
    command = [sys.executable, "-m", "grid.record", "--replay", "--store", store.uri, "--experiment", "some grid"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    waiting = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    assert waiting.stderr is not None
    assert "which may be alive: watching its heartbeat for up to 90 s" in waiting.stderr.readline()
    waiting.send_signal(signal.SIGINT)
    told = waiting.communicate(timeout=100)[1].splitlines()
    assert (told[-1], waiting.returncode) == ("grid.record: interrupted", 130)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("changed", "dead"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"pid": 10**30}, False),
        ({"started": "1"}, True),
        ({"started": ""}, False),
        ({"boot": "another"}, False),
        ({"boot": ""}, False),
        ({"spaces": "others", "pid": 2**22 + 1}, False),
        ({"spaces": "", "pid": 2**22 + 1}, False),
        ({"lock": "1:2"}, False),
        ({"lock": "3:4", "spaces": "others"}, True),
    ],
)
def test_a_holder_is_dead_only_if_that_is_certain(changed: dict[str, Any], dead: bool) -> None:
    here = Holder.here()
    holder = Holder.from_tags(Holder(**{**here.__dict__, **changed}).to_tags())
    assert holder.is_dead(Holder.here(lock="3:4")) == dead


def test_a_kernel_without_time_namespaces_knows_those_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.readlink

    def read_older(path: str) -> str:
        if path.endswith("/time"):
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(os, "readlink", read_older)
    gone = Holder(**{**Holder.here().__dict__, "pid": 2**22 + 1})
    assert Holder.from_tags(gone.to_tags()).is_dead(Holder.here())


def test_a_lease_whose_name_was_purged_is_held_on(store: Store) -> None:
    with Lease(store) as lease:
        purge(store)
        with elsewhere(), pytest.raises(InputError, match=REFUSED.format("another driver")), Lease(opened(store)):
            pass
        lease._confirm()
    purge(store)
    with Lease(opened(store)) as lease:
        assert lease.number == 2


def purge(store: Store) -> None:
    """Do what `mlflow gc` does."""
    client = MlflowClient(store.uri)
    for entry in client.search_experiments(ViewType.DELETED_ONLY):
        client._tracking_client.store._hard_delete_experiment(entry.experiment_id)


# --- heartbeats and the fence ---


def test_heartbeats_survive_any_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("nobody knows why")

    with Lease(store) as lease:
        with monkeypatch.context() as patch:
            for name in ("set_experiment_tag", "get_experiment", "set_tag"):
                patch.setattr(lease._client, name, fail)
            time.sleep(1)
        before = lease._confirmed_at
        wait_until(lambda: lease._confirmed_at > before)
        assert lease._thread.is_alive()


@pytest.mark.parametrize("clock", [0, 1], ids=["the machine slept", "the virtual machine was paused"])
def test_the_store_is_asked_only_after_a_pause_without_heartbeats(
    store: Store, monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 1000.0)
    now = [1000.0, 1000.0]
    monkeypatch.setattr(lease_module, "_read_clocks", lambda: tuple(now))
    with Lease(store) as lease:
        asked: list[str] = []
        find = lease._client.get_experiment_by_name
        monkeypatch.setattr(lease._client, "get_experiment_by_name", lambda name: asked.append(name) or find(name))
        now[clock] += EXPIRY / 2 - 0.1
        store.client.set_tag(store.parent_id, "some tag", "")
        assert not asked
        now[clock] += 0.2
        store.client.set_tag(store.parent_id, "some tag", "")
        assert asked
        asked.clear()
        store.client.set_tag(store.parent_id, "some tag", "")
        assert not asked  # that was a heartbeat


def test_a_store_that_is_down_after_a_pause_is_not_written_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store) as lease:
        monkeypatch.setattr(lease, "_confirmed_at", (0.0, 0.0))
        monkeypatch.setattr(lease._client, "get_experiment", unplugged)
        with pytest.raises(OSError, match="^the cable is cut$"):
            store.client.set_tag(store.parent_id, "some tag", "")


def test_nothing_is_written_while_no_heartbeat_can_be_and_everything_as_soon_as_one_can(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 1000.0)
    monkeypatch.setattr(lease_module, "EXPIRY_SECONDS", 600.0)
    with Lease(store) as lease, closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"))) as database:
        for what in ("INSERT", "UPDATE"):
            database.execute(
                f"CREATE TRIGGER no_{what} BEFORE {what} ON experiment_tags "
                "BEGIN SELECT RAISE(ABORT, 'no heartbeats'); END"
            )
        lease._confirmed_at = (0.0, 0.0)
        with pytest.raises(MlflowException, match="no heartbeats"):
            store.client.set_tag(store.parent_id, "some tag", "")
        assert not lease.is_fresh()
        assert "some tag" not in store.client.get_run(store.parent_id).data.tags
        for what in ("INSERT", "UPDATE"):
            database.execute(f"DROP TRIGGER no_{what}")
        store.client.set_tag(store.parent_id, "some tag", "")
        assert lease.is_fresh()


def test_reports_for_an_experiment_that_was_deleted_for_long_wait_until_it_is_restored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 1000.0)
    monkeypatch.setattr(courier, "LONGEST_WAIT_SECONDS", 0.1)
    with closing(Spool(tmp_path / "spool.jsonl")) as spool, Lease(store, spool) as lease:
        recorder = Recorder(store, spool)
        recorder.begin({}, {})
        lease._client.delete_experiment(store.experiment_id)
        lease._confirmed_at = (0.0, 0.0)
        recorder.started(CONFIG, control=False)
        wait_until(lambda: "must be in the 'active' state" in recorder.error)
        assert not lease.is_fresh()
        lease._client.restore_experiment(store.experiment_id)
        wait_until(lambda: not recorder.error and bool(store.run_ids()))
        assert (recorder.parked, recorder.dropped) == ({}, {})
        assert recorder.close(finished=True)


def test_a_driver_that_was_replaced_stops_says_so_and_writes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 1000.0)  # it sleeps
    first = Lease(store)
    first.acquire()
    with elsewhere(), Lease(opened(store)) as second:
        assert second.number == 2
        first._confirmed_at = (0.0, 0.0)
        message = rf"^\S+:{os.getpid()} has taken over experiment 'some grid' from this driver"
        for _ in range(2):
            with pytest.raises(LeaseLostError, match=message):
                store.client.set_tag(store.parent_id, "some tag", "")
        first.release()
        assert "some tag" not in store.client.get_run(store.parent_id).data.tags
        assert tag(store) != ""
        with pytest.raises(LeaseLostError, match=message):
            store.client.set_tag(store.parent_id, "some tag", "")


def test_a_driver_that_has_given_the_experiment_up_delivers_nothing_more(store: Store, tmp_path: Path) -> None:
    with closing(Spool(tmp_path / "spool.jsonl")) as spool:
        recorder = Recorder(store, spool)
        with Lease(store, spool) as lease:
            recorder.begin({}, {})  # and whatever is raised before it is closed
        recorder.started(CONFIG, control=False)
        recorder._attach_later(store.parent_id, "late.txt", b"late")
        threads = [each._thread for each in (recorder._events, recorder._artifacts)]
        wait_until(lambda: bool(store.run_ids()) or not any(thread.is_alive() for thread in threads))
        assert (store.run_ids(), store.artifact("late.txt"), lease.is_fresh()) == ({}, None, False)
        told = "this driver has given experiment 'some grid' up; what has not arrived is kept for the next run"
        assert [each.error for each in (recorder._events, recorder._artifacts)] == [told, told]
        assert not recorder.close(finished=False)
        assert len(spool.pending()[0]) == 1


READING = ("get_", "search_", "list_", "download_")
"""How the names of the methods of a client begin that only read."""


def test_everything_that_writes_is_fenced(store: Store) -> None:
    class Lost:
        def check(self) -> None:
            raise LeaseLostError("lost")

        def is_fresh(self) -> bool:
            return True

    store.fence(Lost())
    methods = [name for name in dir(MlflowClient) if callable(getattr(MlflowClient, name))]
    writing = [name for name in methods if not name.startswith(("_", *READING))]
    assert {"log_batch", "set_tag", "create_run", "set_terminated", "log_artifacts"} < set(writing)
    assert [name for name in writing if not is_refused(getattr(store.client, name))] == []


def is_refused(method: Callable[[], object]) -> bool:
    try:
        method()
    except (LeaseLostError, TypeError) as error:  # the latter if it was called, and lacks arguments
        return isinstance(error, LeaseLostError)
    return False


READ_THEN_LEASE = """
import sys
import requests
from sqlalchemy import Engine, event

send = requests.Session.send
from grid.record.fence import _check_again
from grid.record.lease import Lease
from grid.record.store import Store
from grid.store_uri import sqlite_path

store = Store(sys.argv[1], sys.argv[2])
store.open()
store.trials()
assert not event.contains(Engine, "commit", _check_again) and requests.Session.send is send
with Lease(store):
    assert event.contains(Engine, "commit", _check_again) and requests.Session.send is not send
"""


def test_nothing_of_requests_and_sqlalchemy_is_changed_before_there_is_a_lease(store: Store) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", READ_THEN_LEASE, store.uri, store.experiment]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize("kind", ["sqlite", "http"])
def test_a_driver_that_is_stopped_in_the_middle_of_a_write_does_not_write(store: Store, kind: str) -> None:
    class Stopped:
        fresh = True

        def check(self) -> None:
            self.fresh = False

        def is_fresh(self) -> bool:
            return self.fresh

    if kind == "http":
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # accepts, and never answers
            store.client = MlflowClient(f"http://127.0.0.1:{server.server_port}")
            store.fence(Stopped())
            with pytest.raises(MlflowException, match="stopped in the middle of a write"):
                store.client.set_tag("a run", "some tag", "")
        return
    reading = store.client
    store.fence(Stopped())
    with pytest.raises(MlflowException, match="stopped in the middle of a write"):
        store.client.set_tag(store.parent_id, "some tag", "")
    assert "some tag" not in reading.get_run(store.parent_id).data.tags


@pytest.mark.slow
@pytest.mark.parametrize("place", [[], ["--elsewhere"]], ids=["here", "elsewhere"])
def test_a_stopped_driver_is_replaced_only_where_it_can_be_fenced_and_records_nothing_when_it_wakes(
    store: Store, tmp_path: Path, place: list[str]
) -> None:
    with process(store, tmp_path / "a", "--seed=1", *place) as first:
        assert line(first) == "drives"
        wait_until(lambda: len(points(store, 1)) > 1)
        stop_outside_of_a_transaction(first, tmp_path / "mlflow.db")
        with process(store, tmp_path / "b", "--seed=2") as second:
            said = line(second)
            if not place:  # it has the lock on the store as long as it lives
                assert said == f"experiment 'some grid' is being run by {os.uname().nodename}:{first.pid}; " + (
                    "wait for it or stop it"
                )
                return
            assert said == "drives"
            before = points(store, 1)
            os.killpg(first.pid, signal.SIGCONT)
            assert f":{second.pid} has taken over experiment 'some grid' from this driver" in line(first)
            assert first.wait(100) == 2
            assert points(store, 1) == before
            wait_until(lambda: len(points(store, 2)) > 1)


def stop_outside_of_a_transaction(driver: subprocess.Popen[str], database: Path) -> None:
    """Stop a driver as the sleep of its machine would, which leaves no lock on another machine's file."""
    while True:
        os.killpg(driver.pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED)
        with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
                return
            except sqlite3.OperationalError:
                os.killpg(driver.pid, signal.SIGCONT)
                time.sleep(0.1)


# --- the spool of a driver that was replaced ---


def leave(store: Store, spool: Path, epochs: range) -> None:
    """Be a driver that dies with epochs in its spool that have not reached the store."""
    lease = Lease(store, waiting := Spool(spool))
    lease.acquire()
    recorder = Recorder(store, waiting)
    recorder.started(CONFIG, control=False)
    for epoch in epochs:
        recorder.epoch_ended(CONFIG, EpochReport(epoch=epoch, **dict.fromkeys(EPOCH_METRICS, 0.5)), is_rung=False)
    crash(lease)
    store.client = lease._client
    waiting._file.close()
    waiting._lock.close()


def recover(store: Store, spool: Path, kind: str = "trial") -> list[int]:
    """Be a driver that takes over, delivers and ends; return the recorded epochs."""
    with Lease(store, waiting := Spool(spool), kind):
        Recorder(store, waiting, kind).recover()
    waiting.close()
    runs = store.run_ids()
    history = store.client.get_metric_history(runs[CONFIG.trial_key], "val_loss") if runs else []
    return [point.step for point in history]


def test_the_same_spool_is_delivered_by_the_next_driver(store: Store, tmp_path: Path) -> None:
    leave(opened(store), tmp_path / "a.jsonl", range(1, 4))
    assert recover(opened(store), tmp_path / "a.jsonl") == [1, 2, 3]


def test_a_spool_is_set_aside_if_another_driver_has_continued_since(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "a.jsonl"
    leave(opened(store), spool, range(1, 4))
    leave(opened(store), tmp_path / "b.jsonl", range(1, 3))
    assert recover(opened(store), tmp_path / "b.jsonl") == [1, 2]
    capsys.readouterr()
    assert recover(opened(store), spool) == [1, 2]
    assert capsys.readouterr().err == (
        "4 reports of an earlier run from here came too late: another driver has continued experiment 'some grid' "
        f"since, and trains these epochs itself; kept in {tmp_path}/a.superseded-1\n"
    )
    assert not spool.exists()
    leave(opened(store), spool, range(3, 5))
    leave(opened(store), tmp_path / "b.jsonl", range(3, 4))
    assert recover(opened(store), spool) == [1, 2]
    assert (tmp_path / "a.superseded-2" / "a.jsonl").read_text().count("\n") == 3


def test_a_driver_of_finalists_in_between_supersedes_no_trial(store: Store, tmp_path: Path) -> None:
    leave(opened(store), tmp_path / "a.jsonl", range(1, 4))
    recover(opened(store), tmp_path / "b.jsonl", "confirm")
    assert recover(opened(store), tmp_path / "a.jsonl") == [1, 2, 3]


def test_what_came_between_and_was_purged_supersedes(store: Store, tmp_path: Path) -> None:
    leave(opened(store), tmp_path / "a.jsonl", range(1, 4))
    recover(opened(store), tmp_path / "b.jsonl", "confirm")
    purge(store)
    assert recover(opened(store), tmp_path / "a.jsonl") == []


def test_the_spool_of_an_earlier_version_is_delivered(store: Store, tmp_path: Path) -> None:
    leave(opened(store), tmp_path / "a.jsonl", range(1, 4))
    (tmp_path / "a.lock").write_text("")
    recover(opened(store), tmp_path / "b.jsonl")
    assert recover(opened(store), tmp_path / "a.jsonl") == [1, 2, 3]


def test_a_spool_that_can_not_be_written_refuses_the_lease(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spool = Spool(tmp_path / "a.jsonl")
    monkeypatch.setattr("grid.record.spool.os.fsync", fail)
    with pytest.raises(InputError, match=r"^can't write to the spool .*/a.jsonl: No space left on device; free disk"):
        Lease(store, spool).acquire()
    spool.close()
    with Lease(opened(store)):
        pass


@pytest.mark.parametrize(
    ("edited", "name"),
    [
        ({"driver": "a\nb\x1b[2J\u202e"}, "ab[2J"),
        ({"driver": "\n"}, "another driver"),
        ({"driver": "host" * 1000}, "host" * 25),
        ({"pid": "9" * 5000, "driver": "a:1"}, "a:1"),
    ],
)
def test_a_holder_that_somebody_has_edited_still_fits_into_one_line(edited: dict[str, str], name: str) -> None:
    found = Holder.from_tags(edited)
    assert (found.driver, found.pid) == (name, 0)


@pytest.mark.parametrize("name", ["lease_٣", "lease_03", "lease_0", "lease_-1", "lease_"])
def test_a_tag_that_is_no_number_of_a_lease_is_passed_over(name: str, store: Store) -> None:
    store.client.set_experiment_tag(store.experiment_id, name, "5")
    for number in (1, 2):
        with Lease(opened(store)) as lease:
            assert lease.number == number


# --- the store ---


def test_a_lease_on_a_store_that_is_down_is_refused_in_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.client, "get_experiment", unplugged)
    with pytest.raises(InputError, match="^can't use the store sqlite.*: the cable is cut; pass another --store$"):
        Lease(store).acquire()


def test_releasing_a_lease_on_a_store_that_is_down_lets_it_expire(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(store) as lease:
        monkeypatch.setattr(lease._client, "set_tag", unplugged)
    monkeypatch.undo()
    assert tag(store).endswith(f":{os.getpid()}")


def test_a_folder_that_may_not_be_written_leaves_the_lease_to_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoreLock, "acquire", lambda self: None)
    with Lease(store), pytest.raises(InputError, match=HERE), Lease(opened(store)):
        pass


def unplugged(*given: object, **named: object) -> None:
    raise OSError("the cable is cut")
