"""Workload: samples of a variant with random weights and inputs, as speed does not depend on what they are."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.bench.record import Record, times
from chipmunk_jax.errors import InputError
from chipmunk_jax.memory import check_room
from chipmunk_jax.model import Condition, Model, Stack
from chipmunk_jax.models import MODELS, Component
from chipmunk_jax.pipelines import Variant
from chipmunk_jax.pipelines.room import PlannedSample
from chipmunk_jax.pipelines.variant import Settings
from chipmunk_jax.sparsity import Sparsity, to_dict

FEW = 2**23  # parameters of a leaf that the host draws


@dataclass(frozen=True, kw_only=True)
class Workload(PlannedSample):
    """What is timed: steps or samples, dense and with this sparsity."""

    name: str  # of VARIANTS, whatever layers are left of it

    def check_room(self, steps: int, sparsity: Sparsity) -> None:
        """Raises InputError where weights, inputs and all that so many steps hold at once have no room."""
        shapes = self.variant.shapes(self.settings, self.batch, self.dtype)
        usual = dict(guidance=self.variant.guidance, solver=self.variant.solver)
        check_room(*shapes, placed=False, steps=steps, sparsity=sparsity, **usual)

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Sizes of the stacks of layers."""
        return self.variant.stacks(self.settings)

    @property
    def layers(self) -> int:
        """Layers of all stacks."""
        return sum(stack.layers for stack in self.stacks.values())

    def record(self, kind: str, seconds: dict[str, list[float]], sizes: dict[str, int], **fields: Any) -> Record:
        """What was measured of one kind, against the dense one.

        Args:
            kind: the record's variant.
            seconds: of the repeats of every kind that has a time.
            sizes: that its shape holds besides.
            fields: others of the record.
        """
        shape = self.variant.sizes(self.settings) | {"batch": self.batch} | sizes | {"text": self.variant.text_rows}
        common = dict(sparsity=to_dict(self.sparsity), dtype=self.dtype, baseline="dense", model=self.name)
        taken = times(seconds.get(kind, ()), seconds.get("dense", ()))
        return Record(variant=kind, shape=shape, **taken, **common, **fields)


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
    """A network whose every parameter is drawn, see random_weights()."""
    network, noise, cond = variant.shapes(variant.complete(), 1, dtype)
    width = next(iter(network.stacks(noise.shape[1], cond).values())).width
    return random_weights(network, width**-0.5)


def random_weights(component: Component, deviation: float = 0.02) -> Component:
    """A component whose every parameter is drawn, leaf by leaf: never more than one beside the component.

    All with one standard deviation (D ** -0.5 is 0.018 for FLUX.1-dev), so that every layer moves the tokens and a wrong one shows.

    Args:
        component: shapes in place of weights.
        deviation: of all parameters.
    """
    graph, state = nnx.split(component)
    leaves, tree = jax.tree.flatten(state)
    # A program for each of many shapes takes longer.
    most = max((a.size for a in leaves if a.size <= FEW), default=0)
    few = deviation * np.random.default_rng(0).standard_normal(most, np.float32)
    draw = jax.jit(lambda key, shape, dtype: deviation * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = (
        jax.device_put(few[: a.size].reshape(a.shape).astype(a.dtype)) if a.size <= FEW else draw(key, a.shape, a.dtype)
        for key, a in zip(keys, leaves, strict=True)
    )
    return nnx.merge(graph, tree.unflatten(drawn))


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
