"""The step benchmark at a tiny scale, and its arithmetic."""

import subprocess
import sys

import pytest
import torch

from benchmarks import step_speed
from grid.config import TrialConfig

PLAIN = TrialConfig(learning_rate=1e-3, epochs=1, batch_size=32)


def test_the_work_of_an_mlp_is_that_of_its_matrix_products():
    sizes = [(784, 512), (512, 256), (256, 128), (128, 47)]
    forward = sum(2 * in_size * out_size for in_size, out_size in sizes)
    first = 2 * 784 * 512  # the images need no gradient
    data = step_speed.random_images(64, "cpu")
    assert step_speed.flops_per_image(PLAIN, data) == 3 * forward - first


def test_the_work_of_a_cnn_is_that_of_its_convolutions_and_matrix_products():
    first, second, third = 2 * 9 * 1 * 32 * 28**2, 2 * 9 * 32 * 64 * 14**2, 2 * 9 * 64 * 128 * 7**2
    dense, last = 2 * 128 * 3**2 * 256, 2 * 256 * 47
    data = step_speed.random_images(64, "cpu")
    config = TrialConfig(model="cnn", learning_rate=1e-3, epochs=1, batch_size=32)
    assert step_speed.flops_per_image(config, data) == 3 * (first + second + third + dense + last) - first


def test_the_measured_peak_is_above_100_mflops(monkeypatch):
    monkeypatch.setattr(step_speed, "SECONDS", 0.05)
    assert step_speed.matmul_peak(torch.float32, "cpu") > 1e8


def test_the_command_prints_a_row_for_each_trial_and_needs_neither_ray_nor_mlflow():
    code = "import sys; sys.modules.update(ray=None, mlflow=None); from benchmarks import step_speed"
    code += "; step_speed.SECONDS = 0.05; step_speed.main()"
    small = ["--models", "mlp", "--precisions", "float32", "--images", "256", "--repeats", "1", "--profile", "3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *small], capture_output=True, text=True, timeout=1200, check=True
    )
    assert done.stdout.count("\nfloat32 ") == 3
    assert done.stdout.count(" x ") == 9
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_an_unknown_device_is_reported_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step_speed", "--device", "tpu"])
    with pytest.raises(SystemExit):
        step_speed.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.step_speed: argument --device: invalid choice: 'tpu' (choose from")
