"""Solvers of the flow dx/dt = velocity from noise (t = 1) to the sample (t = 0), and the times they stop at."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chipmunk_jax.errors import InputError
from chipmunk_jax.sparsity import MOST_STEPS


class Solver(Protocol):
    """A rule for one step. Static: hashable, its data live in the state."""

    def times(self, timesteps: np.ndarray) -> np.ndarray:
        """What the network is told of the times [steps + 1] from which steps start, f32 [steps]."""

    def init(self, x: jax.Array) -> Any:
        """State before the first step, a pytree."""

    def step(
        self, x: jax.Array, state: Any, velocity: jax.Array, t: jax.Array, t_next: jax.Array
    ) -> tuple[jax.Array, Any]:
        """x at t_next, f32, and the new state."""


@dataclass(frozen=True)
class Euler:
    """x + (t_next - t) velocity, in float32."""

    def times(self, timesteps: np.ndarray) -> np.ndarray:
        return np.asarray(timesteps[:-1], np.float32)

    def init(self, x: jax.Array) -> tuple[()]:
        return ()

    def step(self, x, state, velocity, t, t_next):
        return x + (t_next - t) * velocity, state


@struct.dataclass
class UniPCState:
    """What UniPC keeps of the last two steps."""

    steps: jax.Array  # i32, how many are done
    corrected: jax.Array  # x at the last step's time, corrected
    # f32 [2, ..]: x - t velocity, what the flow led to as seen at the last step and at the one before.
    samples: jax.Array
    times: jax.Array  # f32 [2], theirs


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2 for flows (Zhao et al., arXiv 2302.04867; variant bh2, predicting the sample), in float32.

    Each step first corrects x by the velocity found there, then predicts the next x. The first prediction and the last one, to
    t = 0, are of order 1; so is the first correction. The network is told whole thousandths, as by diffusers and by Wan's own code.
    """

    def times(self, timesteps: np.ndarray) -> np.ndarray:
        # 0.7 in float32 is 699.99999 thousandths.
        thousandths = np.floor(1000 * np.asarray(timesteps[:-1], np.float64) + 1e-4)
        return (thousandths / 1000).astype(np.float32)

    def init(self, x: jax.Array) -> UniPCState:
        zeros = jnp.zeros((2, *x.shape), jnp.float32)
        return UniPCState(steps=jnp.int32(0), corrected=jnp.asarray(x), samples=zeros, times=jnp.ones(2, jnp.float32))

    def step(self, x, state, velocity, t, t_next):
        sample = x - t * velocity
        last, t_last = state.samples[0], state.times[0]
        x = jnp.where(state.steps > 0, _correct(state, sample, t), x)
        order_1 = (state.steps == 0) | (t_next == 0)
        h, base = _first_order(x, sample, t, t_next)
        # The slope of the predictions in the logarithm of the signal-to-noise ratio, which is the clock of the method.
        slope = jnp.where(order_1, 0, (last - sample) * h / _growth(t, t_last))
        x_next = base - (1 - t_next) * jnp.expm1(-h) * slope / 2
        state = UniPCState(
            steps=state.steps + 1,
            corrected=x,
            samples=jnp.stack([sample, last]),
            times=jnp.stack([jnp.asarray(t, jnp.float32), t_last]),
        )
        return x_next, state


def _correct(state: UniPCState, sample: jax.Array, t: jax.Array) -> jax.Array:
    """x at t, now that the sample that it leads to is known too."""
    (last, before), (t_last, t_before) = state.samples, state.times
    h, base = _first_order(state.corrected, last, t_last, t)
    ratio = _growth(t_last, t_before) / h
    # [[1, 1], [ratio, 1]] weights = (b_1, b_2), the integrals that make the correction exact for lines and parabolas.
    z = -h
    b_1 = (jnp.expm1(z) / z - 1) / jnp.expm1(z)
    b_2 = 2 * ((jnp.expm1(z) / z - 1) / z - 1 / 2) / jnp.expm1(z)
    weight_before = (b_2 - b_1) / (ratio - 1)
    order_2 = weight_before * (before - last) / ratio + (b_1 - weight_before) * (sample - last)
    change = jnp.where(state.steps > 1, order_2, (sample - last) / 2)
    return base - (1 - t) * jnp.expm1(-h) * change


def _first_order(x, sample, t, t_next):
    """h = _growth(t, t_next), and x at t_next were the sample to stay."""
    h = _growth(t, t_next)
    return h, t_next / t * x - (1 - t_next) * jnp.expm1(-h) * sample


def _growth(t, t_next):
    """By how much the logarithm of (1 - t) / t grows."""
    # Bounded for float32: at t = 0 all is signal, at 1 all is noise.
    log_ratio = lambda t: jnp.log1p(-jnp.minimum(t, 1 - 1e-7)) - jnp.log(jnp.maximum(t, 1e-30))
    return log_ratio(t_next) - log_ratio(t)


def flux_timesteps(steps: int, tokens: int, *, shift: bool = True) -> np.ndarray:
    """Times of FLUX.1, 1 to 0, f32 [steps + 1].

    A longer sequence stays longer at high noise: t <- e^mu / (e^mu + 1 / t - 1), where mu goes linearly with the image tokens from
    0.5 at 256 to 1.15 at 4096 (Black Forest Labs).

    Args:
        steps: at least 1.
        tokens: of the image.
        shift: False for FLUX.1-schnell, whose times are evenly spaced.

    Raises:
        InputError: steps below 1 or above 100,000, tokens below 1.
    """
    _check_steps(steps)
    if not isinstance(tokens, (int, np.integer)) or tokens < 1:
        raise InputError(f"tokens={tokens!r}: expected a whole number, at least 1")
    t = np.linspace(1.0, 0.0, steps + 1)
    return (shifted_by_tokens(t, tokens) if shift else t).astype(np.float32)


def shifted_by_tokens(t: np.ndarray, tokens: int) -> np.ndarray:
    """Times [steps + 1] from 1 to 0, f64, shifted as in flux_timesteps."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    t = np.array(t, np.float64)
    t[t > 0] = 1 / (1 + math.exp(-mu) * (1 / t[t > 0] - 1))  # the same, and no overflow for any size
    return t


def shifted_timesteps(steps: int, shift: float) -> np.ndarray:
    """Times of HunyuanVideo (shift 7), evenly spaced and then t <- shift t / (1 + (shift - 1) t): 1 to 0, f32 [steps + 1].

    Raises:
        InputError: steps below 1 or above 100,000, a shift that is not positive.
    """
    _check_steps(steps, shift)
    return shifted(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)


def wan_timesteps(steps: int, shift: float) -> np.ndarray:
    """Times of Wan2.1 as diffusers has them for UniPC: 0.999999 to 0, f32 [steps + 1].

    Evenly spaced from 1 to 1 / 1000, of which the last is left out, shifted as in shifted_timesteps, the first lowered by 1e-6, and
    0 at the end. (Wan's own code starts at 0.999 before the shift; its second of 10 times at shift 3 is 0.96394, this one 0.96432.)

    Raises:
        InputError: as shifted_timesteps.
    """
    _check_steps(steps, shift)
    t = shifted(np.linspace(1.0, 1e-3, steps + 1), shift)
    t[0], t[-1] = 1 - 1e-6, 0
    return t.astype(np.float32)


def shifted(t: np.ndarray, shift: float) -> np.ndarray:
    """Times t <- shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def _check_steps(steps: int, shift: float = 1.0) -> None:
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool):
        raise InputError(f"steps={steps!r}: expected a whole number")
    if steps < 1:
        raise InputError(f"steps={steps}: expected at least 1")
    if steps > MOST_STEPS:
        raise InputError(f"steps={steps}: expected at most {MOST_STEPS}")
    if not isinstance(shift, numbers.Real) or not 0 < shift < math.inf:
        raise InputError(f"shift={shift}: expected a positive number")
