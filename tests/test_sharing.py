"""How trials share a device: measured on CPUs with real trainings; the memory of a GPU is a number here."""

import signal
import threading
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest

from grid.config import InputError, TrialConfig
from grid.data.dataset import DataShape
from grid.driver import try_nodes as module
from grid.driver.messages import describe_cost, describe_packing
from grid.driver.try_nodes import try_nodes
from grid.parts.files import load_files
from grid.plan import sharing as sharing_module
from grid.plan.forecast import Forecast
from grid.plan.packing import Packing, Sharing, most_per_gpu, pack, pack_as_measured
from grid.plan.sharing import NotMeasuredError, measure_sharing

GIB = 2**30
SHAPE = DataShape((1, 28, 28), 47, 512)
PLAIN = TrialConfig(learning_rate=0.1, epochs=3, hidden_sizes="8", channels="4-8", dense_size=8)
NETS = [PLAIN, replace(PLAIN, model="cnn")]
FASTER = Sharing({1: 1000.0, 2: 1900.0, 4: 2600.0, 8: 2650.0}, GIB, 100.0)
NO_FASTER = Sharing({1: 1000.0, 2: 1000.0}, GIB, 400.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "SECONDS", 0.2)
    monkeypatch.setattr(sharing_module, "PATIENCE_SECONDS", 900.0)


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_numbers_of_trials_double(most: int, expected: list[int]) -> None:
    assert sharing_module._doubling(most) == expected


def test_real_processes_train_a_net_alone_and_together() -> None:
    sharing = measure_sharing(NETS, SHAPE, 2)
    assert sorted(sharing.speeds) == [1, 2]
    assert sharing.trial_bytes == 0
    assert 1 / 10 < sharing.speeds[1] / sharing.cpu_speed < 10  # the same net on the same kind of device


def test_the_slowest_net_that_trains_is_trained_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"mlp": 0.1, "cnn": 0.3, "resnet": "it fails"}
    monkeypatch.setattr(sharing_module, "_epoch_seconds", lambda trial, data: seconds[trial.model])
    monkeypatch.setattr(sharing_module, "_begun", lambda trial, data: trial)
    monkeypatch.setattr(sharing_module, "_speed", lambda trial, asked: (trial.model, asked))
    monkeypatch.setattr(sharing_module, "keep_freed_memory", lambda: None)
    ours, theirs = Pipe()
    ours.send(7.0)
    nets = [replace(PLAIN, model=model) for model in seconds]
    child = threading.Thread(target=sharing_module._train_on_request, args=(theirs, [], nets, SHAPE))
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # of the main thread only
    child.start()
    assert ours.recv() == 1
    assert ours.recv() == ("cnn", 7.0)
    ours.close()
    child.join()


def test_no_more_trials_are_started_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([5 * GIB, 3 * GIB])
    monkeypatch.setattr(sharing_module, "_free_bytes", lambda device: next(free))
    sharing = measure_sharing(NETS[:1], SHAPE, 8)
    assert sharing.trial_bytes == 2 * GIB
    assert sorted(sharing.speeds) == [1, 2]


def test_what_keeps_a_trial_from_training_is_said() -> None:
    with pytest.raises(NotMeasuredError, match="InputError: channels=4-8 halve images of 2 x 2"):
        measure_sharing(NETS[1:], replace(SHAPE, image=(1, 2, 2)), 1)


def test_a_process_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(NotMeasuredError, match="does not answer in time"):
        measure_sharing(NETS, SHAPE, 1)


def test_one_cell_that_fails_does_not_matter() -> None:
    vanishing = replace(PLAIN, model="cnn", channels="4-4-4-4-4-4")
    assert measure_sharing([vanishing, *NETS], SHAPE, 1).speeds[1] > 0


class Answers:
    """Stands for a process: answers so often, then no more."""

    def __init__(self, times: int):
        self._left = times

    def train(self) -> None:
        self._left -= 1

    def answer(self) -> float:
        if self._left < 0:
            raise NotMeasuredError("has died")
        return 100.0


@pytest.mark.parametrize(
    ("times", "speeds"),
    [([9, 9, 9, 9], {1: 100, 2: 200, 4: 400}), ([9, 9, 9, 0], {1: 100, 2: 200}), ([1, 9], {1: 100})],
)
def test_what_was_measured_before_a_process_died_counts(times: list[int], speeds: dict[int, int]) -> None:
    assert sharing_module._speeds([Answers(number) for number in times]) == speeds  # type: ignore[misc]
    with pytest.raises(NotMeasuredError, match="has died"):
        sharing_module._speeds([Answers(0)])  # type: ignore[list-item]


def test_a_net_of_a_parts_file_is_measured() -> None:
    load_files([Path(__file__).parents[1] / "examples" / "own_activation.py"])
    assert measure_sharing([replace(PLAIN, activation="squared_relu")], SHAPE, 1).speeds[1] > 0


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({1: 1000.0}, 1),
        ({1: 1000.0, 2: 1040.0}, 1),  # not worth it
        ({1: 1000.0, 2: 1900.0, 4: 2600.0, 8: 2650.0}, 4),
        ({1: 1000.0, 2: 900.0, 4: 2000.0}, 4),
        ({1: 1000.0, 2: 1900.0, 4: 1200.0}, 2),
    ],
)
def test_the_fastest_number_is_chosen_unless_fewer_are_about_as_fast(speeds: dict[int, float], best: int) -> None:
    assert Sharing(speeds, GIB, 1.0).best == best


def test_a_gpu_is_packed_as_measured_within_the_cpus() -> None:
    packing = pack_as_measured(pack(8, 1, 80 * GIB), [FASTER])
    assert (packing.concurrency, packing.gpus_per_trial) == (4, 0.25)
    assert packing.reason == "4 per GPU, measured, 2.6 times as fast as 1, 1.0 GiB each"
    assert packing.slots == pytest.approx(2.6)
    narrow = pack_as_measured(pack(2, 1, 80 * GIB), [FASTER])
    assert (narrow.concurrency, narrow.reason) == (2, "2 per GPU, limited by the CPUs")
    assert narrow.slots == pytest.approx(1.9)


def test_the_machine_whose_gpu_holds_the_fewest_counts() -> None:
    packing = pack_as_measured(pack(8, 2, 80 * GIB), [FASTER, NO_FASTER])
    assert (packing.concurrency, packing.slots) == (2, 2.0)
    assert packing.reason == "1 per GPU, measured, 2 are no faster than 1"


def test_a_number_of_the_user_is_kept_and_its_speed_known() -> None:
    packing = pack_as_measured(pack(8, 1, 80 * GIB, 2), [FASTER])
    assert (packing.concurrency, packing.reason, packing.slots) == (2, "as --concurrency asks", pytest.approx(1.9))
    assert most_per_gpu(packing) == 2


@pytest.mark.parametrize(("cpus", "gpus", "most"), [(64, 1, 8), (4, 1, 4), (8, 4, 2), (1, 2, 1)])
def test_as_many_are_measured_as_the_cpus_allow(cpus: int, gpus: int, most: int) -> None:
    assert most_per_gpu(pack(cpus, gpus, 2 * GIB)) == most


def test_a_gpu_that_is_slower_than_the_cpus_is_said() -> None:
    packing = pack_as_measured(pack(8, 1, 80 * GIB), [NO_FASTER])
    said = "a GPU trains 1,000 images a second, the 8 CPUs beside it up to 3,200; --device cpu may be faster"
    assert packing.note == describe_packing(packing)["note"] == said
    assert "note" not in describe_packing(pack_as_measured(pack(8, 1, 80 * GIB), [FASTER]))
    assert "note" not in describe_packing(pack(8, 0, 0))


def test_the_cost_of_gpus_is_by_what_they_train_together() -> None:
    assumed, packing = pack(8, 1, 80 * GIB), pack_as_measured(pack(8, 1, 80 * GIB), [FASTER])
    assert (assumed.slots, packing.slots) == (8, pytest.approx(2.6))
    cost = Forecast(100.0, 100, 7200.0, 0.1)
    assert describe_cost(cost, "this machine", packing, 3.0) | {"epochs": "", "time": ""} == {
        "epochs": "",
        "time": "",
        "GPU-hours": "2.0",
        "price": "6.00 at 3 per hour",
    }


def test_trying_the_nodes_returns_the_measured_packing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packing = replace(pack(8, 1, 80 * GIB), machines="1 node with a GPU", devices=("T4",), bfloat16=False)
    monkeypatch.setattr(module, "measure_sharing", lambda *arguments: FASTER)
    tried = try_nodes(NETS, SHAPE, packing, connected=False)
    assert tried == replace(pack(8, 1, 80 * GIB), concurrency=4, gpus_per_trial=0.25)
    assert (tried.machines, tried.devices, tried.bfloat16) == ("1 node with a GPU", ("T4",), False)

    def fail(*_: object) -> None:
        raise NotMeasuredError("has died")

    monkeypatch.setattr(module, "measure_sharing", fail)
    assert try_nodes(NETS, SHAPE, packing, connected=False) is packing
    assert_said(capsys, "has died")
    monkeypatch.setattr(module, "measure_sharing", lambda *arguments: 1 / 0)
    assert try_nodes(NETS, SHAPE, packing, connected=False) is packing
    assert_said(capsys, "ZeroDivisionError: division by zero")


def test_a_number_of_the_user_that_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "measure_sharing", lambda *arguments: NO_FASTER)
    tried = try_nodes(NETS, SHAPE, pack(8, 1, 80 * GIB, 6), connected=False)
    assert tried.concurrency == 6
    assert capsys.readouterr().err == "note: on this machine a GPU holds 2 trials at once, fewer than asked for\n"


def assert_said(capsys: pytest.CaptureFixture[str], reason: str) -> None:
    said = f"note: on this machine it was not measured how trials share a GPU: {reason}\n"
    assert capsys.readouterr().err == said


def test_nothing_is_measured_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_sharing", None)
    packing = Packing(2, 1.0, 0.0)
    assert try_nodes(NETS, SHAPE, packing, connected=False) is packing
    with pytest.raises(InputError):
        try_nodes(NETS, replace(SHAPE, image=(1, 2, 2)), packing, connected=False)
