"""Train your own net on your own images: numpy arrays and a torch module, without a change to the package.

python examples/own_net_and_data.py
"""

import numpy as np
from torch import nn

from grid.config import LEVELS, TrialConfig
from grid.data.dataset import Dataset, Images, Labels
from grid.train.models import MODELS, NetSpec
from grid.train.trial import DeviceData, train
from nets.activations import ACTIVATIONS

SIDE, STRIPES = 16, ("horizontal", "vertical", "diagonal")


def draw_stripes(count: int, seed: int) -> tuple[Images, Labels]:
    """Return noisy stripes of random width and phase, `[image, row, column]`, and their direction, `[image]`."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:SIDE, :SIDE]
    labels = rng.integers(len(STRIPES), size=count)
    position = np.stack((row, column, row + column))[labels]  # [image, row, column]
    width, phase = rng.uniform(1, 2, (count, 1, 1)), rng.uniform(0, 6, (count, 1, 1))
    return (127 + 60 * np.sin(position / width + phase) + rng.normal(0, 60, position.shape)).clip(0, 255).astype(
        np.uint8
    ), labels


def build_tiny(config: TrialConfig, spec: NetSpec) -> nn.Module:
    """Build one convolution, averaged over the image. The seed of the trial draws the weights of torch's layers too."""
    activation = ACTIVATIONS[config.activation]()
    convolution = nn.Conv2d(1, 16, kernel_size=5)
    return nn.Sequential(convolution, activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, spec.classes))


MODELS["tiny"] = build_tiny
LEVELS["model"] += ("tiny",)

if __name__ == "__main__":
    dataset = Dataset("stripes", STRIPES, *draw_stripes(1500, seed=0), *draw_stripes(600, seed=1), fingerprint="")
    config = TrialConfig(model="tiny", learning_rate=1e-2, epochs=5)
    for report in train(config, DeviceData.from_dataset(dataset)).reports:
        print(f"epoch {report.epoch}: {report.val_accuracy:.1%} of the validation images")
