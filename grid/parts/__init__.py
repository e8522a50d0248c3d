"""What a trial is made of: activations, optimizers, schedules, penalties, nets, grids, settings and further factors.

A file of your own adds parts by the functions below, and `--parts FILE.py` makes them known to `grid.run`:

    import torch
    from grid import parts

    @parts.activation("squared_relu", shape="rising")
    class SquaredReLU(torch.nn.Module):
        def forward(self, inputs):
            return torch.relu(inputs).square()

The built-in parts are added in the same way. Standard library only, so that names are known at no cost.
"""

from grid.parts import builtin, grids
from grid.parts.adding import (
    activation,
    data,
    exclude,
    grid,
    lr_schedule,
    net,
    on_averages,
    on_batch,
    on_gradients,
    on_images,
    on_loss,
    on_net,
    on_prediction,
    optimizer,
    regularization,
    setting,
)
from grid.parts.registry import LEVELS

__all__ = [
    "LEVELS",
    "activation",
    "builtin",
    "data",
    "exclude",
    "grid",
    "grids",
    "lr_schedule",
    "net",
    "on_averages",
    "on_batch",
    "on_gradients",
    "on_images",
    "on_loss",
    "on_net",
    "on_prediction",
    "optimizer",
    "regularization",
    "setting",
]
