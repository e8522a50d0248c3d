"""The rounds of controls that `--more-controls` drew after a grid had ended: `more_controls.json` of the parent run.

A copy is written first: whenever a crash interrupts the writing, one of the two files is whole.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from grid.config import InputError
from grid.record.store import Store
from grid.recorded import ROUNDS, Round, parse_rounds

COPY = "more_controls.copy.json"


def read_rounds(store: Store) -> tuple[Round, ...]:
    """Return the rounds of an experiment, oldest first.

    Raises:
        InputError: The store does not answer, or its files are damaged.
    """
    files = store.artifacts(ROUNDS, COPY)
    for content in files.values():
        try:
            return parse_rounds(content)
        except ValueError:
            continue
    if files:
        hint = "put a whole copy into the artifacts of its run of kind grid"
        raise InputError(f"{ROUNDS} of experiment '{store.experiment}' is damaged; {hint}")
    return ()


def record_rounds(store: Store, rounds: Sequence[Round]) -> None:
    """Replace the recorded rounds.

    Raises:
        InputError: The store does not take them.
    """
    content = json.dumps([asdict(each) for each in rounds], indent=2).encode()
    with store.answering():
        for name in (COPY, ROUNDS):
            store.attach(store.parent_id, {name: content})
