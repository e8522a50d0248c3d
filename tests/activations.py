"""The built-in activations as nets take them."""

from grid.parts.registry import ACTIVATIONS as SPECS
from nets.activations import Activation

ACTIVATIONS = {name: Activation(spec.build.resolve(), spec.shape) for name, spec in SPECS.items()}


def of_shape(*shapes: str) -> list[str]:
    """Return the names of the activations of any of some shapes."""
    return sorted(name for name, activation in ACTIVATIONS.items() if activation.shape in shapes)
