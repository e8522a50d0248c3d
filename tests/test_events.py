import json

import pytest

from grid.record.events import KINDS, Ended, EpochEnded, Event, Started, Suspended, TimeSpent, from_json, to_json

EVENTS: list[Event] = [
    Started(trial_key="k", time=1, name="mlp relu", params={"seed": "0"}, tags={"kind": "trial"}),
    EpochEnded(trial_key="k", time=2, epoch=1, metrics={"val_accuracy": 0.5}, tags={"stopped_at_epoch": "1"}),
    Ended(
        trial_key="k",
        time=3,
        epoch=1,
        metrics={"epochs_run": 1.0},
        tags={"status": "failed"},
        status="failed",
        error="E",
    ),
    Suspended(trial_key="k", time=4),
    TimeSpent(time=5, seconds=1.5),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_spool(event: Event) -> None:
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


def test_every_event_has_a_name_on_disk() -> None:
    assert {type(event) for event in EVENTS} == set(KINDS.values())


def test_spools_of_version_0_1_are_read() -> None:
    lines = [
        '{"kind":"start","trial_key":"k","time":1,"name":"mlp relu","params":{"seed":"0"},"tags":{"kind":"trial"}}',
        '{"kind":"epoch","trial_key":"k","time":2,"epoch":1,"metrics":{"val_accuracy":0.5},"tags":{"stopped_at_epoch":"1"}}',
        '{"kind":"end","trial_key":"k","time":3,"epoch":1,"metrics":{"epochs_run":1.0},"tags":{"status":"failed"},'
        '"status":"failed","error":"E"}',
        '{"kind":"rest","trial_key":"k","time":4}',
    ]
    assert [from_json(json.loads(line)) for line in lines] == EVENTS[: len(lines)]
