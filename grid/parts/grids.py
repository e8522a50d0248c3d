"""The named grids."""

from grid.parts.adding import grid
from grid.parts.registry import Levels

FULL: Levels = {
    "model": ("mlp", "cnn"),
    "lr_schedule": ("constant", "step", "cosine", "one_cycle"),
    "activation": ("relu", "leaky_relu", "elu", "gelu"),
    "optimizer": ("sgd", "adam", "rmsprop", "asgd", "adagrad"),
    "batch_norm": ("off", "on"),
    "regularization": ("none", "l1", "l2"),
    "dropout": ("off", "on"),
}

grid("full", "Which combination of all techniques wins, and what does each contribute?", FULL)
grid("mlp", "The full grid for the MLP alone", {**FULL, "model": ("mlp",)})
grid("cnn", "The full grid for the CNN alone", {**FULL, "model": ("cnn",)})
grid(
    "techniques",
    "Which techniques matter at all? A screening with two levels per factor",
    {
        "model": ("mlp", "cnn"),
        "lr_schedule": ("constant", "one_cycle"),
        "activation": ("relu", "gelu"),
        "optimizer": ("sgd", "adam"),
        "batch_norm": ("off", "on"),
        "regularization": ("none", "l2"),
        "dropout": ("off", "on"),
    },
)
grid(
    "smoke",
    "Does everything work here? A small grid on images drawn from fonts, without a network",
    {
        "model": ("mlp", "cnn"),
        "lr_schedule": ("cosine",),
        "activation": ("relu", "gelu"),
        "optimizer": ("sgd", "adam"),
        "batch_norm": ("off", "on"),
        "regularization": ("none",),
        "dropout": ("off", "on"),
    },
    data="glyphs",
    per_class=100,
    epochs=9,
)
