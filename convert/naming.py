"""What the tables of the models share: rules of a linear layer and an MLP, and sizes read off the shapes of tensors."""

import re
from collections.abc import Mapping
from statistics import mode

from chipmunk_jax.convert.rules import Rule

Sizes = dict[str, tuple[tuple[str, int], ...]]  # field -> (tensor, axis) that have it


def linear(sources: str | tuple[str, ...], target: str) -> list[Rule]:
    """A linear layer with bias, or several beside one another as one."""
    sources = (sources,) if isinstance(sources, str) else sources
    return [
        Rule(tuple(f"{source}.weight" for source in sources), (f"{target}.kernel.T",)),
        Rule(tuple(f"{source}.bias" for source in sources), (f"{target}.bias",)),
    ]


def mlp(fc1: str, fc2: str, target: str) -> list[Rule]:
    """Two linear layers as an Mlp, which keeps both weights as [F, D]."""
    return [
        Rule((f"{fc1}.weight",), (f"{target}.fc1",)),
        Rule((f"{fc1}.bias",), (f"{target}.b1",)),
        Rule((f"{fc2}.weight",), (f"{target}.fc2.T",)),
        Rule((f"{fc2}.bias",), (f"{target}.b2",)),
    ]


def measure(shapes: Mapping[str, tuple[int, ...]], places: tuple[tuple[str, int], ...]) -> int | None:
    """The most frequent size at these (tensor, axis), as one bad tensor must not mislead; None where there is none."""
    found = [
        shape[axis]
        for pattern, axis in places
        for name, shape in shapes.items()
        if len(shape) > axis and re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name)
    ]
    return mode(found) if found else None


def count_layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """One more than the last layer."""
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in shapes)
    return max((int(layer[1]) + 1 for layer in found if layer), default=0)
