"""The drift guard: a step that would err too much by its plan computes more, a skipped one its columns, a delta step everything.

With v the velocity and |.| the mean of absolute values, f the last full step, l the last step that ran and k the one before it, the
error of a step at time t is estimated before it runs, from the change of the velocity since the last one that ran:

    change = (t_l - t) / (t_k - t_l) |v_l - v_k| / |v_k|
    error  = left (|v_l - v_f| / |v_f| + change)     of a delta step
             left |v_l - v_f| / |v_f| + change       of a skipped step

`left` is what delta steps leave out of the change since a full one. Each full step that comes after a delta step tells: between
two full steps the velocity goes nearly straight, so at the time of that delta step it was

    w = v_f + (t_f - t_l) / (t_f - t) (v - v_f)      and     left = |v_l - w| / |w - v_f|

All of it is in the scan: nothing is asked of the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chipmunk_jax.schedule import Step
from chipmunk_jax.step_cache import relative_change

LEFT = 0.3  # before it is known, and at least; of samples of the small Wan at 4,096 tokens 0.4 to 0.7, at 490 tokens above 1


@struct.dataclass
class DriftGuard:
    """What the guard carries from step to step; velocities are guided, f32 [B, N, C]; all numbers f32."""

    base: jax.Array  # velocity of the last full step
    last: jax.Array  # velocity of the last step that ran
    base_time: jax.Array  # of the last full step
    time: jax.Array  # of the last step that ran
    drift: jax.Array  # relative change between these two
    rate: jax.Array  # relative change over time between the last two that ran; 0 before there are two
    left: jax.Array

    @classmethod
    def start(cls, x: jax.Array) -> "DriftGuard":
        """Before any step; x [B, N, C]."""
        velocity = jnp.zeros(x.shape, jnp.float32)
        numbers = map(jnp.float32, (jnp.inf, jnp.inf, 0, 0, LEFT))  # no step was at an infinite time
        return cls(velocity, velocity, *numbers)

    def allowed(self, step: Step, bound: jax.Array, t: jax.Array) -> Step:
        """The step at time t with as much left out of its plan as errs up to the bound, as far as two steps tell."""
        change = (self.time - t) * self.rate
        step = step.made_full((self.left * (self.drift + change) > bound) & ~step.is_full)
        if step.skip is None:
            return step
        return step.replace(skip=step.skip & (self.left * self.drift + change <= bound))

    def after(self, step: Step, t: jax.Array, velocity: jax.Array) -> "DriftGuard":
        """This after a step as it was taken, its time, and its velocity, f32 [B, N, C]."""
        skipped = np.False_ if step.skip is None else step.skip
        # Before two steps nothing over it is no number.
        rate = jnp.where(jnp.isinf(self.time), 0, relative_change(velocity, self.last) / (self.time - t))
        last, base = jnp.where(skipped, self.last, velocity), jnp.where(step.is_full, velocity, self.base)
        return DriftGuard(
            base=base,
            last=last,
            base_time=jnp.where(step.is_full, t, self.base_time),
            time=jnp.where(skipped, self.time, t),
            drift=relative_change(last, base),
            rate=jnp.where(skipped, self.rate, rate),
            left=jnp.where(step.is_full & (self.drift > 0), self._left_before(t, velocity), self.left),
        )

    def _left_before(self, t: jax.Array, velocity: jax.Array) -> jax.Array:
        """What the last delta step has left out, by a full step after it."""
        moved = (self.base_time - self.time) / (self.base_time - t) * (velocity - self.base)
        found = jnp.abs(self.last - self.base - moved).mean() / jnp.abs(moved).mean()
        return jnp.clip(found, LEFT, 1)
