"""Train one configuration with your own activation, without a change to the package.

python examples/own_activation.py

To compare it in a whole grid, add the same two lines to nets/activations.py and grid/config.py: the processes that
train a grid do not read this file.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from grid.config import LEVELS, TrialConfig
from grid.data.load import load
from grid.train.trial import DeviceData, train
from nets.activations import ACTIVATIONS


class SquaredReLU(nn.Module):
    """max(0, x)^2.

    Reference: So et al. 2021, https://arxiv.org/abs/2109.08668
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the activation of `inputs`."""
        return torch.relu(inputs).square()


ACTIVATIONS["squared_relu"] = SquaredReLU
LEVELS["activation"] += ("squared_relu",)

if __name__ == "__main__":
    data = DeviceData.from_dataset(load("glyphs", Path("data"), per_class=20))
    for activation in ("relu", "squared_relu"):
        config = TrialConfig(activation=activation, batch_norm=True, learning_rate=2e-3, epochs=5)
        print(f"{activation}: {train(config, data).best_val_accuracy:.1%} of the validation images")
