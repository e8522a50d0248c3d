"""How a command becomes the one driver of an experiment; see docs/architecture.md."""

from contextlib import ExitStack, closing
from pathlib import Path

from grid.record.lease import Lease
from grid.record.moved import find_move
from grid.record.spool import Spool, open_spool
from grid.record.store import Store


def become_driver(store: Store, stack: ExitStack, *, spool: Path, storage: str, kind: str = "trial") -> Spool:
    """Take the lease on an experiment, and what belongs to it if its store was moved or copied.

    Args:
        store: The experiment; created if it is missing.
        stack: Closes the spool and gives the lease up.
        spool: Folder of spools.
        storage: Folder or URI of checkpoints.
        kind: Of the runs that are recorded: `trial` or `confirm`.

    Returns:
        The spool of this driver.

    Raises:
        InputError: Another driver is alive, or the store, the spool or what was moved can't be written.
    """
    move = find_move(store.uri, store.experiment)
    if move is not None:
        move.take_reports(spool)
    name = store.experiment if kind == "trial" else f"{store.experiment} {kind}"
    opened = stack.enter_context(closing(open_spool(spool, store.uri, name)))
    store.open()
    lease = Lease(store, opened, kind)
    stack.callback(lease.release)  # also while it is still waited for, in another thread
    lease.acquire()
    if move is not None:
        move.take_rest(storage)
    return opened
