"""Random weights and inputs of a variant: speed does not depend on what they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Condition, Model
from chipmunk_jax.models import MODELS
from chipmunk_jax.pipelines import Variant
from chipmunk_jax.pipelines.variant import Settings


def shortened(variant: Variant, layers: int | None) -> Variant:
    """The variant with so many layers in all, shared out among its stacks as they were, at least one each; None: all.

    Raises:
        InputError: fewer layers than stacks, or more than there are.
    """
    depths = MODELS[variant.network].depths
    sizes = {name: getattr(variant.config, name) for name in depths}
    total = sum(sizes.values())
    if layers is None:
        return variant
    if not len(depths) <= layers <= total:
        raise InputError(f"--layers {layers}: expected {len(depths)} to {total}")
    left = layers
    for i, name in enumerate(depths[:-1]):
        sizes[name] = min(max(1, round(layers * sizes[name] / total)), left - (len(depths) - 1 - i))
        left -= sizes[name]
    return replace(variant, config=replace(variant.config, **sizes | {depths[-1]: left}))


def random_model(variant: Variant, dtype: jnp.dtype) -> Model:
    """A network whose every parameter is drawn, leaf by leaf on the device: never more than one beside the network.

    All with standard deviation D ** -0.5 (0.018 for FLUX.1-dev), so that every layer moves the tokens and a wrong one shows.
    """
    network, noise, cond = variant.shapes(variant.complete(), 1, dtype)
    width = next(iter(network.stacks(noise.shape[1], cond).values())).width
    graph, state = nnx.split(network)
    leaves, tree = jax.tree.flatten(state)
    draw = jax.jit(lambda key, shape, dtype: width**-0.5 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return nnx.merge(graph, tree.unflatten(draw(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)))


def random_inputs(variant: Variant, settings: Settings, batch: int, seed: int = 1) -> tuple[jax.Array, Condition]:
    """noise [B, N, C] and the conditions [B, ..], f32, unit normal."""
    _, noise, cond = variant.shapes(settings, batch, jnp.float32)
    noise_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(cond))
    drawn = {name: jax.random.normal(key, a.shape) for key, (name, a) in zip(keys, cond.items(), strict=True)}
    if "guidance" in cond:
        drawn["guidance"] = jnp.full(batch, variant.distilled or 0.0, jnp.float32)
    if "mask" in cond:
        drawn["mask"] = jnp.ones(cond["mask"].shape, bool)  # the longest prompt
    return jax.random.normal(noise_key, noise.shape), drawn
