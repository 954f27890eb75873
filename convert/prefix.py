"""Names as a network has them: without the prefixes that training code, compilation and packaging put in front."""

from collections.abc import Callable, Collection
from dataclasses import replace

from chipmunk_jax.convert.safetensors import Weights

NETWORK = "model.diffusion_model."  # of the network in a file that may hold its VAE and text encoders too
VAES = ("vae.", "first_stage_model.")  # of the VAE in such a file
PREFIXES = (NETWORK, *VAES, "diffusion_model.", "transformer.", "model.", "module.", "_orig_mod.", "net.")


def strip_prefix(
    weights: Weights, known: Callable[[Collection[str]], bool], parts: Collection[str] = (NETWORK,)
) -> Weights:
    """Weights whose names have lost the prefixes that all of them have, one after the other, until they are known.

    Names beside NETWORK are left out, unless they are the same ones without it: those are doubled.

    Args:
        weights: as read.
        known: whether names are those that are looked for. If they never are, the weights stay as they are.
        parts: prefixes in front of them in a file that holds others too, which are left out.
    """
    names = {name: name for name in weights.tensors}  # in the file -> without prefixes
    twins = {name for name in names if name.startswith(NETWORK) and name.removeprefix(NETWORK) in names}
    if not known(names.values()):
        names = inside(names, parts)
        while not known(names.values()):
            prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names.values())), None)
            if not names or prefix is None:
                return weights
            names = inside({old: new.removeprefix(prefix) for old, new in names.items()}, parts)
    outside = dict.fromkeys(name.partition(".")[0] for name in weights.tensors if name not in names)
    return replace(
        weights,
        tensors={new: weights.tensors[old] for old, new in names.items() if old not in twins},
        doubled=tuple(names.get(name, name) for name in weights.doubled)
        + tuple(name.removeprefix(NETWORK) for name in sorted(twins)),
        left_out=weights.left_out + tuple(outside),
    )


def inside(names: dict[str, str], parts: Collection[str]) -> dict[str, str]:
    """Those under the first of the prefixes that any has, without it; all where none is."""
    for part in parts:
        if found := {old: new.removeprefix(part) for old, new in names.items() if new.startswith(part)}:
            return found
    return names
