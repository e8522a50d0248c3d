import pytest

from grid.config import InputError
from grid.record.store import Store


def test_there_is_one_parent_run_however_often_an_experiment_is_created(store: Store) -> None:
    again = Store(store.uri, "some grid")
    again.create()
    assert (again.experiment_id, again.parent_id) == (store.experiment_id, store.parent_id)


@pytest.mark.parametrize("call", ["create", "trials"])
def test_a_store_that_is_down_is_reported_in_one_line(call: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise OSError("the cable is cut")

    for name in ("get_experiment_by_name", "search_runs"):
        monkeypatch.setattr(store.client, name, refuse)
    with pytest.raises(InputError, match="^can't use the store sqlite.*: the cable is cut; pass another --store$"):
        getattr(store, call)()
