"""python -m grid.run --grid smoke --only activation=relu,squared_relu --parts examples/own_activation.py

Compares an activation of your own with relu: squares of what relu lets through, So et al. 2021,
https://arxiv.org/abs/2109.08668.
"""

import torch

from grid import parts


@parts.activation("squared_relu", shape="rising")
class SquaredReLU(torch.nn.Module):
    def forward(self, inputs):
        return torch.relu(inputs).square()
