"""The named grids."""

import grid.parts.adding as parts
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

parts.grid("full", "Which combination of all techniques wins, and what does each contribute?", FULL)
parts.grid("mlp", "The full grid for the MLP alone", {**FULL, "model": ("mlp",)})
parts.grid("cnn", "The full grid for the CNN alone", {**FULL, "model": ("cnn",)})
parts.grid(
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
parts.grid(
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
parts.grid(
    "record",
    "How accurate can a small net be, and which technique earns how much of it?",
    {
        "model": ("resnet",),
        "lr_schedule": ("one_cycle",),
        "activation": ("gelu",),
        "optimizer": ("adamw",),
        "batch_norm": ("on",),
        "dropout": ("off", "on"),
        "augmentation": ("none", "elastic"),
        "label_smoothing": ("off", "on"),
        "mixup": ("off", "on"),
        "weight_averaging": ("off", "ema"),
        "test_time_shifts": ("off", "on"),
    },
    epochs=15,
    grace=5,
    settings={"channels": "24-48-84"},
)
