"""Names of tensors as a network has them: without the prefixes that training code, compilation and packaging add."""

from collections.abc import Callable, Collection
from dataclasses import replace

from chipmunk_jax.convert.safetensors import Weights

NETWORK = "model.diffusion_model."  # of the network in a file that may hold its VAE and text encoders too
PREFIXES = (NETWORK, "diffusion_model.", "transformer.", "model.", "module.", "_orig_mod.", "net.")


def strip_prefix(weights: Weights, known: Callable[[Collection[str]], bool]) -> Weights:
    """Weights without the prefixes that all names share; one after the other is removed until the names are known.

    Where some names begin with NETWORK, the others are left out; a name that is there both with and without it is doubled.

    Args:
        weights: as read.
        known: whether names are those of a network. If they never are, the weights are returned unchanged.
    """
    names = {name: name for name in weights.tensors}  # in the file -> without prefixes
    twins = {name for name in names if name.startswith(NETWORK) and name.removeprefix(NETWORK) in names}
    if not known(names.values()):
        names = inside(names)
        while not known(names.values()):
            prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None)
            if not names or prefix is None:
                return weights
            names = inside({old: new.removeprefix(prefix) for old, new in names.items()})
    outside = dict.fromkeys(name.partition(".")[0] for name in weights.tensors if name not in names)
    return replace(
        weights,
        tensors={new: weights.tensors[old] for old, new in names.items() if old not in twins},
        doubled=tuple(names.get(name, name) for name in weights.doubled)
        + tuple(name.removeprefix(NETWORK) for name in sorted(twins)),
        left_out=weights.left_out + tuple(outside),
    )


def inside(names: dict[str, str]) -> dict[str, str]:
    """The names that begin with NETWORK, without it; all names where none does."""
    return {old: new.removeprefix(NETWORK) for old, new in names.items() if new.startswith(NETWORK)} or names
