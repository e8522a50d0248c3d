import os
import subprocess
import sys

import pytest
import torch

from benchmarks.step_speed import random_images
from grid.config import InputError, TrialConfig
from grid.data.dataset import DataShape
from grid.surroundings import cpu_name
from grid.train.canary import try_steps
from grid.train.hardware import numeric_settings, precision_problem, use_precision
from grid.train.trial import Trial

COUNT_PAGE_FAULTS = """
import resource, sys
from benchmarks.step_speed import random_images
from grid.config import TrialConfig
from grid.train.hardware import keep_freed_memory, numeric_settings
from grid.train.trial import Trial

def page_faults(epochs):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(epochs):
        trial.run_epoch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
params = {"model": "cnn", "batch_norm": "on", "dropout": "on", "learning_rate": "0.001", "epochs": "9"}
config = TrialConfig.from_params(numeric_settings("cpu", "float32") | params)
trial = Trial(config, random_images(640, "cpu"))
page_faults(1)
print(min(page_faults(1) for _ in range(2)))  # others come where the system reclaims memory meanwhile
"""


@pytest.fixture
def gpus(monkeypatch):
    """Make up GPUs of some compute capabilities."""

    def make_up(*capabilities):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)

    return make_up


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([(8, 0)], "bfloat16"),
        ([(8, 9), (9, 0)], "bfloat16"),
        ([(7, 5)], "float32"),  # T4, RTX 20xx: torch emulates it
        ([(7, 0)], "float32"),
        ([(9, 0), (7, 5)], "float32"),
    ],
)
def test_gpus_train_in_bfloat16_if_all_of_them_compute_in_it_themselves(capabilities, precision, gpus):
    gpus(*capabilities)
    assert numeric_settings("cuda")["precision"] == precision


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_a_precision_that_gpus_lack_is_refused(precision, gpus):
    gpus((7, 5))
    lacks = f"has a GPU of a compute capability below 8.0, which lacks {precision}; a grid can have --precision float32"
    assert precision_problem("cuda", precision) == lacks
    assert (
        try_steps(
            [TrialConfig(learning_rate=0.1, epochs=1, device="cuda", precision=precision)],
            DataShape((1, 28, 28), 47, 940),
        )
        == lacks
    )
    assert precision_problem("cuda", "float32") == precision_problem("cpu", "bfloat16") == ""
    gpus((8, 6))
    assert precision_problem("cuda", precision) == ""
    assert numeric_settings("cuda", precision)["precision"] == precision


def test_tf32_is_refused_on_a_cpu():
    with pytest.raises(InputError, match="--precision tf32 is one of NVIDIA's GPUs, and trials run on CPUs here"):
        numeric_settings("cpu", "tf32")


@pytest.mark.parametrize(("precision", "computed"), [("float32", "ieee"), ("bfloat16", "ieee"), ("tf32", "tf32")])
def test_on_a_gpu_float32_is_float32_in_products_and_convolutions(precision, computed):
    flags = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [each.fp32_precision for each in flags]
    try:
        for each in flags:
            each.fp32_precision = "tf32"
        use_precision("cuda", precision)
        assert [each.fp32_precision for each in flags] == [computed] * 2
    finally:
        for each, kept in zip(flags, before, strict=True):
            each.fp32_precision = kept


def test_a_trial_sets_the_precision_before_it_trains_and_before_it_is_evaluated(monkeypatch):
    seen = []
    monkeypatch.setattr("grid.train.trial.use_precision", lambda *settings: seen.append(settings))
    trial = Trial(TrialConfig(learning_rate=0.1, epochs=1, hidden_sizes="8"), random_images(128, "cpu"))
    with trial.evaluating():
        assert seen == [("cpu", "float32")]
    trial.run_epoch()
    assert seen == [("cpu", "float32")] * 3


def test_a_trial_says_on_what_it_was_trained():
    trial = Trial(TrialConfig(learning_rate=0.1, epochs=1, hidden_sizes="8"), random_images(128, "cpu"))
    assert trial.run_epoch().machine == {"device_name": cpu_name(), "torch_version": torch.__version__}


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_a_cpu_trains_in_bfloat16_if_it_has_the_instructions(capabilities, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert numeric_settings("cpu")["precision"] == precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("has", [True, False])
def test_a_given_precision_overrides_the_choice(precision, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    assert numeric_settings("cpu", precision)["precision"] == precision


def test_this_torch_reports_the_capabilities_that_are_read():
    """An x86 build reports the first two, an ARM build `bf16`."""
    assert {"avx512_bf16", "amx_bf16", "bf16"} & set(torch.cpu.get_capabilities())


def test_settings_are_fields_of_a_configuration():
    settings = numeric_settings("cpu")
    params = TrialConfig.from_params({**settings, "learning_rate": "0.1", "epochs": "1"}).to_params()
    assert {name: params[name] for name in settings} == settings
    assert set(settings) == {"device", "precision", "memory_format", "fused"}


@pytest.mark.skipif(sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="for glibc")
def test_training_steps_reuse_freed_memory_without_a_page_fault_each_time():
    returned, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT_PAGE_FAULTS, how], capture_output=True, check=True, text=True
            ).stdout
        )
        for how in ("returned", "kept")
    )
    if returned < 3000:
        pytest.skip(f"nothing to save: only {returned} page faults without it, as large pages may yield")
    assert kept < returned / 10  # about 20,000 page faults in an epoch otherwise
