import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grid.config import InputError
from grid.plan.packing import (
    GPU_BYTES_PER_TRIAL,
    MAX_TRIALS_PER_CPU,
    MAX_TRIALS_PER_GPU,
    Node,
    Packing,
    pack,
    pack_nodes,
)

GIB = 2**30
CAPACITY = st.floats(0.5, 64)


@pytest.mark.parametrize(
    ("cpus", "gpus", "gpu_bytes", "expected"),
    [
        (4, 0, 0, Packing(4, 1.0, 0.0)),
        (2.5, 0, 0, Packing(2, 1.0, 0.0)),
        (0.5, 0, 0, Packing(1, 0.5, 0.0)),
        (8, 1, 80 * GIB, Packing(8, 1.0, 1 / 8)),
        (4, 1, 80 * GIB, Packing(4, 1.0, 1 / 4)),  # limited by CPUs
        (64, 1, 80 * GIB, Packing(8, 1.0, 1 / 8)),  # at most eight share a GPU
        (64, 1, 9 * GIB, Packing(4, 1.0, 1 / 4)),  # limited by memory
        (64, 1, 1 * GIB, Packing(1, 1.0, 1.0)),
        (16, 8, 80 * GIB, Packing(16, 1.0, 1 / 2)),
        (2, 4, 80 * GIB, Packing(4, 0.5, 1.0)),  # fewer CPUs than GPUs
    ],
)
def test_trials_at_once_follow_from_the_machine(cpus, gpus, gpu_bytes, expected):
    assert pack(cpus, gpus, gpu_bytes) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "concurrency", "expected"),
    [
        (4, 0, 1, Packing(1, 1.0, 0.0)),
        (4, 0, 8, Packing(8, 0.5, 0.0)),
        (8, 1, 1, Packing(1, 1.0, 1.0)),
        (8, 1, 16, Packing(16, 0.5, 1 / 16)),
        (8, 2, 3, Packing(3, 1.0, 1 / 2)),
        (8, 4, 1, Packing(1, 1.0, 1.0)),
    ],
)
def test_the_user_may_choose_how_many(cpus, gpus, concurrency, expected):
    assert pack(cpus, gpus, 80 * GIB, concurrency) == expected


@given(
    cpus=CAPACITY,
    gpus=st.integers(0, 16),
    gpu_bytes=st.integers(0, 200 * GIB),
    concurrency=st.none() | st.integers(1, 200),
)
def test_all_trials_fit_the_machine_at_once(cpus, gpus, gpu_bytes, concurrency):
    assume(concurrency is None or concurrency <= MAX_TRIALS_PER_CPU * max(1, cpus))
    packing = pack(cpus, gpus, gpu_bytes, concurrency)
    assert packing.concurrency == (concurrency or packing.concurrency) >= 1
    assert packing.concurrency * packing.cpus_per_trial <= cpus * (1 + 1e-9)
    assert packing.concurrency * packing.gpus_per_trial <= gpus * (1 + 1e-9)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([Node(3, 0, 0), Node(2, 0, 0)], Packing(5, 1.0, 0.0)),
        ([Node(1.5, 0, 0), Node(1.5, 0, 0)], Packing(2, 1.0, 0.0)),  # two half CPUs of two machines make no CPU
        ([Node(8, 0, 0), Node(4, 1, 80 * GIB)], Packing(4, 1.0, 1 / 4)),  # CPUs elsewhere drive no GPU
        ([Node(0, 0, 0), Node(8, 1, 16 * GIB)], Packing(8, 1.0, 1 / 8)),  # a head without CPUs
        ([Node(8, 1, 80 * GIB), Node(4, 1, 80 * GIB)], Packing(8, 1.0, 1 / 4)),  # the machine with fewer CPUs decides
    ],
)
def test_trials_at_once_follow_from_all_machines(nodes, expected):
    assert pack_nodes(nodes) == expected


def test_the_reason_names_the_limit():
    assert pack(8, 1, 80 * GIB).reason == "8 per GPU, the most that may share one"
    assert pack(4, 1, 80 * GIB).reason == "4 per GPU, limited by the CPUs"
    assert pack(8, 1, 9 * GIB).reason == "4 per GPU, limited by its memory"
    assert pack(4, 0, 0).reason == "one per CPU"
    assert pack(4, 0, 0, 3).reason == "as --concurrency asks"


@given(cpus=st.lists(CAPACITY, min_size=1, max_size=5), concurrency=st.integers(1, 60))
def test_machines_that_differ_hold_as_many_trials_as_asked_for(cpus, concurrency):
    assume(concurrency <= MAX_TRIALS_PER_CPU * max(1, sum(cpus)))
    share = pack_nodes([Node(each, 0, 0) for each in cpus], concurrency).cpus_per_trial
    assert sum(int(each / share + 1e-9) for each in cpus) >= concurrency


def test_a_cluster_without_any_cpu_is_refused():
    with pytest.raises(InputError, match="^no machine of the cluster has a CPU for trials; add a worker"):
        pack_nodes([Node(0, 0, 0)])


@given(cpus=CAPACITY, gpus=st.integers(1, 16), gpu_bytes=st.integers(GPU_BYTES_PER_TRIAL, 200 * GIB))
def test_the_trials_of_a_gpu_fit_its_memory(cpus, gpus, gpu_bytes):
    per_gpu = pack(cpus, gpus, gpu_bytes).concurrency / gpus
    assert 1 <= per_gpu <= MAX_TRIALS_PER_GPU
    assert per_gpu * GPU_BYTES_PER_TRIAL <= gpu_bytes


@pytest.mark.parametrize("concurrency", [0, -3])
@pytest.mark.parametrize("gpus", [0, 1])
def test_less_than_one_trial_at_once_is_refused(concurrency, gpus):
    with pytest.raises(InputError, match=f"^--concurrency must be 1 or more, got {concurrency}$"):
        pack(4, gpus, 80 * GIB, concurrency)


@pytest.mark.parametrize(
    ("packing", "device", "text"),
    [
        (Packing(4, 1.0, 0.0), "cpu", "4 at once, 1 CPU each"),
        (Packing(8, 1.0, 0.125), "cuda", "8 at once, 0.125 GPU each"),
        (Packing(3, 1.0, 1 / 3), "cuda", "3 at once, 0.333 GPU each"),
    ],
)
def test_a_packing_names_its_device_and_shares(packing, device, text):
    assert (packing.device, str(packing)) == (device, text)


def test_more_trials_than_may_share_a_cpu_are_refused():
    with pytest.raises(InputError, match="^--concurrency must be at most 128 here .64 per CPU., got 129$"):
        pack(2, 0, 0, 129)


def test_on_cpus_no_more_trials_run_than_there_are_cpus():
    assert pack(2, 0, 0, 16).slots == 2
    assert pack(8, 1, 80 * GIB, 6).slots == 6
