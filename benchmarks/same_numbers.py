"""Do two stores hold the same numbers? Compares the trials of one experiment in both, value by value, to the last bit.

    python -m benchmarks.same_numbers sqlite:////OLD/mlflow.db sqlite:///mlflow.db --experiment smoke-glyphs

For a change of the code that must not change a number: run a grid before and after it with `--controls 1`, so that no
trial is stopped and every epoch can be compared. Seconds.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grid.arguments import Parser, run_command
from grid.metrics import EPOCH_METRICS
from grid.record.store import Store
from grid.store_uri import check_store_uri
from grid.wording import count

TIMES = ("epoch_seconds", "samples_per_second")
"""Metrics that depend on the machine's load."""
Value = tuple[str, int]
"""Metric and epoch."""


@dataclass(frozen=True)
class Comparison:
    """What two stores have in common, and where they differ."""

    trials: int
    """In both stores."""
    only_in_one: int
    """Trials that the other store lacks."""
    values: int
    """In both stores."""
    different: int
    """Values that are not bit-identical, or that only one store has."""


def compare(one: Mapping[str, Mapping[Value, float]], other: Mapping[str, Mapping[Value, float]]) -> Comparison:
    """Compare the values of two stores, both trial key -> value of a metric at an epoch."""
    shared = one.keys() & other.keys()
    return Comparison(
        trials=len(shared),
        only_in_one=len(one.keys() ^ other.keys()),
        values=sum(len(one[key].keys() & other[key].keys()) for key in shared),
        different=sum(len({value for value, _ in one[key].items() ^ other[key].items()}) for key in shared),
    )


def read_values(uri: str, experiment: str) -> dict[str, dict[Value, float]]:
    """Return trial key -> the values of its metrics after every epoch, those that measure time left out.

    Raises:
        InputError: The store can't be read, or does not have the experiment.
    """
    store = Store(check_store_uri(uri, must_exist=True), experiment)
    store.open(missing=False)
    return {
        key: {
            (name, point.step): point.value
            for name in EPOCH_METRICS
            if name not in TIMES
            for point in store.client.get_metric_history(run_id, name)
        }
        for key, run_id in store.run_ids().items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return the exit code: 0 if all is equal, 1 if not, 2 for wrong input."""
    parser = Parser(prog="python -m benchmarks.same_numbers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stores", nargs=2, metavar="STORE", help="MLflow tracking URI")
    parser.add_argument("--experiment", required=True, metavar="NAME", help="MLflow experiment in both stores")
    options = parser.parse_args(arguments)

    def run() -> int:
        found = compare(*(read_values(uri, options.experiment) for uri in options.stores))
        print(f"{count(found.trials, 'trial')} in both stores, {found.only_in_one:,} in one of them only")
        print(f"{count(found.values, 'value')} in both, {found.different:,} different")
        return 1 if found.different or found.only_in_one else 0

    return run_command(parser.name, run)


if __name__ == "__main__":
    sys.exit(main())
