"""The drift guard: a step that would err too much by its plan computes more, a skipped one its columns, a delta step everything.

With v the velocity, rho(a, b) = mean|a - b| / mean|b|, f the last full step, l the last step that ran and k the one before it, the
change since then and since the last full step is estimated before a step, at its time t, and from these the error of its velocity:

    change = (t_l - t) rho(v_l, v_k) / (t_k - t_l)
    error  = LEFT (rho(v_l, v_f) + change)     of a delta step
             LEFT rho(v_l, v_f) + change       of a skipped step

All of it is in the scan: nothing is asked of the host.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chipmunk_jax.schedule import Step
from chipmunk_jax.step_cache import relative_change

LEFT = 0.3  # of the change since a full step, what a delta step leaves out: 0.2 to 0.4 in samples of the small Wan


@struct.dataclass
class DriftGuard:
    """What the guard carries from step to step; velocities are guided, f32 [B, N, C]."""

    base: jax.Array | None  # velocity of the last full step
    last: jax.Array | None  # velocity of the last step that ran
    time: jax.Array  # f32, of the last step that ran
    drift: jax.Array  # f32, rho of these two velocities
    rate: jax.Array  # f32, change over time between the last two that ran; 0 before there are two
    full: jax.Array  # bool [steps], those that computed everything
    skipped: jax.Array  # bool [steps]

    @classmethod
    def start(cls, steps: int, x: jax.Array) -> "DriftGuard":
        """Before any of so many steps; x [B, N, C]."""
        velocity, none = jnp.zeros(x.shape, jnp.float32), jnp.zeros(steps, bool)
        return cls(velocity, velocity, jnp.float32(jnp.inf), jnp.float32(0), jnp.float32(0), none, none)

    def allowed(self, step: Step, bound: jax.Array, t: jax.Array) -> Step:
        """The step at time t with as much left out of its plan as errs up to the bound, as far as two steps tell."""
        change = (self.time - t) * self.rate
        step = step.made_full((LEFT * (self.drift + change) > bound) & ~step.is_full)
        return step if step.skip is None else step.replace(skip=step.skip & (LEFT * self.drift + change <= bound))

    def after(self, step: Step, index: jax.Array, t: jax.Array, velocity: jax.Array) -> "DriftGuard":
        """This after a step as it was taken, its number, its time, and its velocity, f32 [B, N, C]."""
        skipped = np.False_ if step.skip is None else step.skip
        # No step was at an infinite time: the first rate is 0, unless nothing over it is no number.
        rate = jnp.where(jnp.isinf(self.time), 0, relative_change(velocity, self.last) / (self.time - t))
        last = jnp.where(skipped, self.last, velocity)
        base = jnp.where(step.is_full, velocity, self.base)
        return DriftGuard(
            base=base,
            last=last,
            time=jnp.where(skipped, self.time, t),
            drift=relative_change(last, base),
            rate=jnp.where(skipped, self.rate, rate),
            full=self.full.at[index].set(step.is_full),
            skipped=self.skipped.at[index].set(skipped),
        )
