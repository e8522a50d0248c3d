import os
import subprocess
import sys

import pytest
import torch

from grid.config import TrialConfig
from grid.train.hardware import numeric_settings

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
page_faults(3)
print(page_faults(3))
"""


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_trains_in_bfloat16_if_it_supports_it(native, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert numeric_settings("cuda")["precision"] == precision


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
    assert kept < returned / 10  # about 50,000 page faults in 15 steps otherwise
