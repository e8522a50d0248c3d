"""A driver in its own process, without Ray: takes the lease and records one epoch after another until it is killed.

    python tests/lease_driver.py STORE FOLDER [--elsewhere] [--clock SECONDS] [--seed N]

Prints `drives` once it holds the lease. Its heartbeats and their expiry are short. `--elsewhere` makes it look as if it
ran on another machine, which shares neither kernel nor files; `--clock` puts its clocks forward or back.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grid.config import InputError, TrialConfig
from grid.metrics import EPOCH_METRICS, EpochReport
from grid.record import holder as holder_module
from grid.record import lease as lease_module
from grid.record.holder import StoreLock
from grid.record.lease import Lease
from grid.record.recorder import Recorder
from grid.record.spool import open_spool
from grid.record.store import Store

EXPERIMENT = "some grid"
EPOCHS = 10**6
HEARTBEAT, EXPIRY = 0.3, 6.0


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Make heartbeats and expiry short."""
    patch.setattr(lease_module, "HEARTBEAT_SECONDS", HEARTBEAT)
    patch.setattr(lease_module, "EXPIRY_SECONDS", EXPIRY)
    patch.setattr(lease_module, "POLL_SECONDS", 0.1)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Make leases that begin in this block look as if their driver ran on another machine."""

    def no_lock(uri: str, experiment_id: str) -> StoreLock:
        return StoreLock("http://127.0.0.1:5000", experiment_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "StoreLock", no_lock)
        patch.setattr(holder_module, "_boot", lambda: "the boot of another machine")
        yield


def record_until_killed(store: Store, folder: Path, seed: int) -> None:
    """Record epochs of one trial, each as soon as the one before has been delivered."""
    spool = open_spool(folder, store.uri, store.experiment)
    store.open()
    with Lease(store, spool):
        recorder = Recorder(store, spool)
        recorder.recover()
        stored = store.trials()
        recorder.begin({}, stored)
        config = TrialConfig(learning_rate=0.1, epochs=EPOCHS, seed=seed)
        recorder.started(config, control=False)
        known = stored[config.trial_key].val_accuracies if config.trial_key in stored else ()
        print("drives", flush=True)
        for epoch in range(len(known) + 1, EPOCHS):
            report = EpochReport(epoch=epoch, **dict.fromkeys(EPOCH_METRICS, 0.5))
            recorder.epoch_ended(config, report, is_rung=False)
            while spool.pending(limit=1)[0] and not store.lost:
                time.sleep(0.01)
            if store.lost:
                recorder.close(finished=False)
                raise InputError(store.lost)


def main() -> int:
    """Drive until killed; 2 if that is not possible or the lease is lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--elsewhere", action="store_true")
    parser.add_argument("--clock", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    patch = pytest.MonkeyPatch()
    shorten(patch)
    clock, set_clock = time.time, time.clock_gettime
    patch.setattr(time, "time", lambda: clock() + options.clock)
    patch.setattr(time, "clock_gettime", lambda which: set_clock(which) + options.clock)
    try:
        if options.elsewhere:
            with elsewhere():
                record_until_killed(Store(options.store, EXPERIMENT), options.folder, options.seed)
        else:
            record_until_killed(Store(options.store, EXPERIMENT), options.folder, options.seed)
    except InputError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
