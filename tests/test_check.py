"""`python -m grid.check`: every fault that would spoil a grid is found, and sound parts have none."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from grid.check import main
from tests.test_sources import arrays

ROOT = Path(__file__).parents[1]
HEAD = "import random, time\nimport numpy as np\nimport torch\nfrom torch import nn\nfrom grid import parts\n"
FAULTS = {
    "draws from torch": (
        "@parts.on_images('noise', ('off', 'on'))\n"
        "def noise(images, use):\n    return images + torch.randn_like(images)",
        "own.py:6: factor noise: draws from global random state (torch, numpy or random); draw from the generators",
    ),
    "draws from random": (
        "@parts.on_loss('noise', ('off', 'on'))\n"
        "def noise(loss, logits, labels, use):\n    return loss * (1 + random.random())",
        "factor noise: draws from global random state",
    ),
    "draws from numpy": (
        "@parts.on_images('noise', ('off', 'on'))\n"
        "def noise(images, use):\n    return images * float(np.random.uniform(0.5, 1))",
        "factor noise: draws from global random state",
    ),
    "clock": (
        "@parts.on_images('clock', ('off', 'on'))\ndef clock(images, use):\n    return images + time.time() % 1",
        "factor clock: two trainings of one trial differ; draw from the generators that are given, from nothing else",
    ),
    "lost state": (
        "@parts.optimizer('falling', learning_rate=0.01)\nclass Falling(torch.optim.SGD):\n    count = 0\n"
        "    def step(self, closure=None):\n        self.count += 1\n"
        "        self.param_groups[0]['lr'] = 0.01 / self.count\n        return super().step(closure)",
        "optimizer falling: a training that was saved after an epoch and resumed goes on differently; keep state in",
    ),
    "shared module": (
        "slopes = nn.PReLU()\nparts.activation('slopes')(lambda: slopes)",
        "own.py:7: activation slopes: all layers share one module; decorate the class, or a function that builds a new",
    ),
    "shared layer": (
        "@parts.net('twice')\ndef build(config, spec):\n    layer = nn.Linear(784, 784)\n"
        "    return nn.Sequential(nn.Flatten(), layer, layer, nn.Linear(784, spec.classes))",
        "model twice: layers 1 and 2 share one module with weights; build a module for each",
    ),
    "shape of logits": (
        "@parts.net('narrow')\ndef build(config, spec):\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))",
        "model narrow: returns (1, 3) for 1 images of 47 classes; return one row each",
    ),
    "said to rise": (
        "@parts.activation('wave', shape='rising')\nclass Wave(nn.Module):\n"
        "    def forward(self, inputs):\n        return torch.sin(inputs)",
        "activation wave: shape='rising' is wrong, as it falls at -1",
    ),
    "said to rise and learns": (
        "parts.activation('slopes', shape='rising')(nn.PReLU)",
        "activation slopes: shape='rising' is wrong, as it has parameters, so that it may fall; leave shape out",
    ),
    "said to have one valley": (
        "@parts.activation('wave', shape='falling_then_rising')\nclass Wave(nn.Module):\n"
        "    def forward(self, inputs):\n        return torch.sin(inputs)",
        "activation wave: shape='falling_then_rising' is wrong, as it falls again after it has risen",
    ),
    "error": (
        "@parts.on_gradients('halved', ('off', 'on'))\ndef halved(parameters, use):\n"
        "    for parameter in parameters:\n        parameter.gard.mul_(0.5)",
        "factor halved: line 9: AttributeError: 'Parameter' object has no attribute 'gard'",
    ),
    "explodes": (
        "parts.optimizer('huge', learning_rate=1e30)(torch.optim.SGD)",
        "optimizer huge: the loss is not finite after two epochs; lower the learning rate",
    ),
    "does nothing": (
        "@parts.on_loss('nothing', ('off', 'on'))\ndef nothing(loss, logits, labels, use):\n    return loss",
        "factor nothing: level on changes nothing in the mlp; only the first level, off, may do nothing",
    ),
    "other images each time": (
        "@parts.data('noise')\ndef noise(folder):\n"
        "    images = np.random.default_rng().integers(0, 256, (40, 8, 8), dtype=np.uint8)\n"
        "    return images, np.arange(40) % 4, images, np.arange(40) % 4",
        "data noise: returns other images at a second call; draw from a generator with a seed of its own",
    ),
    "test images of another size": (
        "@parts.data('odd')\ndef odd(folder):\n    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4\n"
        "    return images, labels, images[:, :7], labels",
        "data odd: the test images of 'odd' are of shape (7, 8), the train images (8, 8); bring them to one size",
    ),
    "exclusion": (
        "@parts.exclude('mine')\ndef mine(cell):\n    return cell['optimiser'] == 'sgd'",
        "own.py:6: exclusion mine: exclusion 'mine': KeyError: 'optimiser'",
    ),
    "data of a grid": (
        "parts.grid('mine', 'Which?', {'optimizer': ['sgd', 'adam']}, data='nowhere')",
        "grid mine: unknown data set 'nowhere'; choose from",
    ),
}
SOUND = """
@parts.activation('hat')
class Hat(nn.Module):
    def forward(self, inputs):
        return 1 - inputs.abs()

@parts.optimizer('averaging', learning_rate=0.1)
def averaging(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.5)

@parts.lr_schedule('halving')
def halving(config, optimizer, steps):
    return torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 2), 0.5)

@parts.regularization('bound')
def bound(weights, config):
    for weight in weights:
        weight.grad.add_(weight.detach().clamp(-1, 1), alpha=1e-3)

@parts.on_images('noise', ('off', '0.1'))
def noise(images, use):
    return images + 0.1 * torch.randn(images.shape, generator=use.generator)

parts.setting('heat', 1.0, rule=('above 0', lambda value: value > 0))
parts.grid('mine', 'Which?', {'optimizer': ['sgd', 'averaging']}, data='glyphs', epochs=3)
"""


def check(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (folder / "own.py").write_text(HEAD + text)
    exit_code = main([str(folder / "own.py"), "--data-dir", str(folder)])
    printed = capsys.readouterr()
    assert printed.err == ""
    return exit_code, printed.out


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_its_place(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = FAULTS[name]
    exit_code, printed = check(text, tmp_path, capsys)
    *faults, conclusion = printed.splitlines()
    assert exit_code == 1
    assert message in faults[0]
    assert all(re.match(r"own.py:\d+: ", line) for line in faults)
    assert conclusion == f"1 part checked: {len(faults)} fault{'s' if len(faults) > 1 else ''}"


def test_sound_parts_have_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(SOUND, tmp_path, capsys) == (0, "7 parts checked: all sound\n")


def test_what_a_net_does_not_use_is_a_note_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "@parts.net('linear')\ndef build(config, spec):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(9))"
    exit_code, printed = check(text.replace("LazyLinear(9)", "Linear(784, spec.classes)"), tmp_path, capsys)
    assert exit_code == 0
    notes = re.findall(r"note: (\w+) changes nothing: use spec.techniques, or hold it by --only (\S+)", printed)
    assert notes == [("activation", "activation=relu"), ("batch_norm", "batch_norm=off"), ("dropout", "dropout=off")]


def test_a_net_is_tried_on_the_images_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np  # noqa: PLC0415

    np.savez(tmp_path / "own.npz", **arrays())
    text = (
        "@parts.data('own')\ndef own(folder):\n    file = np.load(folder / 'own.npz')\n"
        "    return [file[f'{part}_{kind}'] for part in ('train', 'test') for kind in ('images', 'labels')]\n"
        "@parts.net('linear')\ndef build(config, spec):\n    assert spec.image_shape == (1, 6, 5)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(30, spec.classes))"
    )
    exit_code, printed = check(text, tmp_path, capsys)
    assert exit_code == 0, printed


def test_a_file_that_works_only_where_it_lies_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.txt").write_text("0.5")
    monkeypatch.chdir(tmp_path)
    exit_code, printed = check(
        "from pathlib import Path\nshare = float(Path('weights.txt').read_text())\nparts.setting('share', share)\n",
        tmp_path,
        capsys,
    )
    assert exit_code == 1
    assert "can't be used in another process: own.py line 7: FileNotFoundError" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1", "own.py adds no parts; decorate them, such as"), ("1 / 0", "own.py line 1: ZeroDivisionError")],
)
def test_a_file_that_adds_nothing_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(text)
    assert main([str(tmp_path / "own.py")]) == 2
    assert f"grid.check: {message}" in capsys.readouterr().err


def test_a_wrong_argument_is_answered_without_torch() -> None:
    code = "import sys, grid.check; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
