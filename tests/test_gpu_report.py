import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report

FORBID = """
import importlib.abc, sys
class Bare(importlib.abc.MetaPathFinder):
    missing = {"jaxtyping", "ray", "mlflow", "pandas", "scipy", "psutil", "pyarrow", "torchvision", "yaml"}
    def find_spec(self, name, path=None, target=None):
        stands_in = name == "jaxtyping" and any(folder.endswith("bare") for folder in sys.path)
        if name.partition(".")[0] in self.missing and not stands_in:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Bare())
import benchmarks.gpu_report, benchmarks.step_speed, tests.test_gpu
print("imported")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path / "page.md")])
    assert gpu_report.main() == 2
    said = capsys.readouterr().err
    assert said == ("benchmarks.gpu_report: no GPU that torch can use; run this on a machine with one\n")
    assert not (tmp_path / "page.md").exists()


def test_torch_numpy_and_pytest_suffice() -> None:
    paths = f"{gpu_report.ROOT}:{gpu_report.BARE}"
    done = subprocess.run(
        [sys.executable, "-c", FORBID], cwd=gpu_report.ROOT, env={"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout == "imported\n", done.stderr


def test_the_page_has_the_machine_the_tests_and_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        if arguments[0] == "-c":
            return 0, "device_name: X\ncompute_capability: 9.0\n"
        return (1, "1 failed\n") if "pytest" in arguments else (0, "images/s\n")

    monkeypatch.setattr(gpu_report, "_run", run)
    page = tmp_path / "page.md"
    assert gpu_report.report(page) == 1
    text = page.read_text()
    assert [text.index(part) for part in ("device_name: X", "1 failed", "images/s")] == sorted(
        text.index(part) for part in ("device_name: X", "1 failed", "images/s")
    )
