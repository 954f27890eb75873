"""Tells a network that has lost blocks: no tensor says how many there were, and a pruned network may have as few by design."""

from dataclasses import asdict
from typing import Any

from chipmunk_jax.pipelines.variant import VARIANTS

BLOCKS = {
    "depth": "double blocks",
    "depth_single_blocks": "single blocks",
    "refiner_depth": "refiner blocks",
    "num_layers": "blocks",
}


def other_depths(config: Any) -> str:
    """How many blocks a network has where a published one of otherwise the same sizes has others; empty where there is none."""
    rows = {name: row.config for name, row in VARIANTS.items() if type(row.config) is type(config)}
    found = asdict(config)
    for name, published in rows.items() if config not in rows.values() else ():
        others = {field: value for field, value in asdict(published).items() if value != found[field]}
        if others.keys() <= BLOCKS.keys():
            told = (f"{found[field]} {BLOCKS[field]} where {name} has {value}" for field, value in others.items())
            return f"{', '.join(told)}: pruned, or cut short"
    return ""
