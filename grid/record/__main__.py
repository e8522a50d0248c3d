"""Deliver what an earlier driver left in its spool: `python -m grid.record --replay --experiment NAME`."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from grid.arguments import Parser, add_experiment, add_storage, add_store, run_command
from grid.masking import mask
from grid.record.lease import become_driver
from grid.record.recorder import Recorder
from grid.record.store import Store
from grid.store_uri import check_store_uri
from grid.wording import count


def main(arguments: Sequence[str] | None = None) -> int:
    """Deliver what is left in the spool of an experiment, parked reports included, and return the exit code.

    0: everything has arrived; 1: the store did not take some reports; 2: it takes none, or the input is wrong.
    """
    parser = Parser(prog="python -m grid.record", description="Deliver what an interrupted run left in its spool.")
    parser.add_argument("--replay", action="store_true", required=True, help="deliver it to the store")
    add_experiment(parser)
    add_store(parser)
    add_storage(parser)
    parser.add_argument("--spool", type=Path, default=Path("spool"), metavar="DIR", help="folder of spools (spool)")
    options = parser.parse_args(arguments)

    def replay() -> int:
        store = Store(check_store_uri(options.store), options.experiment)
        storage = options.storage if "://" in options.storage else str(Path(options.storage).absolute())
        with ExitStack() as stack:
            spool = become_driver(store, stack, spool=options.spool.absolute(), storage=storage)
            recorder = Recorder(store, spool)
            reports, files = recorder.replay()
            complaints = recorder.complain("run the same command to try again, or delete the file to give them up")
        delivered = count(reports, "report") + (f" and {count(files, 'file')}" if files else "")
        print(f"{delivered} delivered to {mask(store.uri)}")
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        return 1 if recorder.parked else 0

    return run_command(parser.name, replay)


if __name__ == "__main__":
    sys.exit(main())
