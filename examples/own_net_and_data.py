"""python -m grid.run --grid fashion --parts examples/own_net_and_data.py --data-dir /usr/share/datasets/fashion-mnist

A small residual net, He et al. 2016, https://arxiv.org/abs/1512.03385, on Fashion-MNIST, Xiao et al. 2017,
https://arxiv.org/abs/1708.07747: its four .gz files, as Debian's package dataset-fashion-mnist has them.
"""

import gzip

import numpy as np
from torch import nn

from grid import parts
from nets.blocks import block, conv3x3, output


@parts.data("fashion")
def load(folder):
    read = [
        np.frombuffer(gzip.open(folder / f"{part}-{kind}-ubyte.gz").read(), np.uint8, offset=offset)
        for part in ("train", "t10k")
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
    ]
    names = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    return read[0].reshape(-1, 28, 28), read[1], read[2].reshape(-1, 28, 28), read[3], names


class Residual(nn.Sequential):
    def forward(self, maps):
        return maps + super().forward(maps)


@parts.net("small_resnet")
def build(config, spec):
    layers, channels = [], spec.image_shape[0]
    for wider in (32, 64, 128):
        args = spec.techniques, spec.weights, spec.masks
        layers += [*block(conv3x3, channels, wider, *args, pooled=True), Residual(*block(conv3x3, wider, wider, *args))]
        channels = wider
    head = output(channels, spec.classes, spec.techniques, spec.weights)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


parts.grid(
    "fashion",
    "Which techniques suit a small residual net on Fashion-MNIST?",
    {
        "model": ["small_resnet"],
        "lr_schedule": ["one_cycle"],
        "activation": ["relu", "gelu"],
        "optimizer": ["sgd", "adam"],
        "batch_norm": ["off", "on"],
    },
    data="fashion",
    epochs=9,
)
