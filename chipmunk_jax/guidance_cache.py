"""Steps of guidance that run the prompt's side alone.

With v_c the velocity of the prompt's side, v_u that of the other and g the scale of guidance,

    v = v_u + g (v_c - v_u) = v_c + (g - 1) d,   d = v_c - v_u

A step that runs both sides keeps d; a one-sided step, and a skipped one, takes the d of the last step that ran both. The prompt's
entries come first: a one-sided step reads and writes the first half of every cache, and leaves the other half as it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.model import Condition, Model, modulations_of
from chipmunk_jax.schedule import Step, by_kind

Caches = dict[str, LayerCache] | None


@struct.dataclass
class Told:
    """What a network is told of its entries beside their tokens: for all steps, or at() one."""

    cond: Condition  # [B, ..] each
    t: jax.Array  # f32 [steps, B], or [B]
    mods: Any  # of model.modulations(), the steps in front, or of one

    @classmethod
    def of(cls, model: Model, times: jax.Array, cond: Condition, entries: int) -> "Told":
        """What it is told of the first so many entries at times [steps]."""
        cond = {name: x[:entries] for name, x in cond.items()}
        t = jnp.broadcast_to(jnp.asarray(times)[:, None], (len(times), entries))
        return cls(cond, t, modulations_of(model, t, cond))

    def at(self, index: jax.Array) -> "Told":
        """Of one step."""
        t, mods = jax.tree.map(lambda a: a[index], (self.t, self.mods))
        return Told(self.cond, t, mods)


def guide(velocity: jax.Array, guidance: jax.Array | None, difference: jax.Array | None = None) -> jax.Array:
    """The guided velocity, f32 [B, N, C].

    Args:
        velocity: of both sides of guidance, the prompt's first, [2 B, N, C]; with a difference of the prompt's alone, [B, N, C].
        guidance: the scale; None: there is one side, and nothing to do.
        difference: of the prompt's side to the other, [B, N, C]; None: that of these velocities.
    """
    if guidance is None:
        return velocity
    if difference is not None:
        return velocity + (guidance - 1) * difference
    prompted, other = jnp.split(velocity, 2)
    return other + guidance * (prompted - other)


def run_sides(
    model: Model,
    step: Step,
    whole: Told,
    prompted: Told,
    positions: jax.Array,
    tokens: jax.Array,
    cache: Caches,
    difference: jax.Array | None,
) -> tuple[jax.Array, Caches, jax.Array | None]:
    """Hidden tokens, caches and difference after the blocks have run for both sides, or for the prompt's alone.

    Args:
        model: the network.
        step: of this step.
        whole: of all entries at this step.
        prompted: of the prompt's at this step.
        positions: [N, axes].
        tokens: [2 B, N, D] of model.embed(), or of one side [B, N, D].
        cache: of all entries.
        difference: f32 [B, N, C], of the last step that ran both sides; the hidden tokens returned are then the prompt's,
            [B, N, D]. None: no step is one-sided; they are those of all entries.
    """

    def run(step: Step, tokens: jax.Array, cache: Caches, difference: jax.Array | None):
        one = difference is not None and step.sides == 1
        told, own = (prompted, tokens[: len(difference)]) if one else (whole, tokens)
        hidden, cache = model.hidden(own, told.t, told.cond, positions, cache, step, told.mods)
        if one or difference is None:
            return hidden, cache, difference
        velocity, other = jnp.split(model.velocity(hidden, whole.mods), 2)
        return hidden[: len(velocity)], cache, velocity - other

    return by_kind(step, run, tokens, cache, difference)
