"""Solvers of the flow dx/dt = velocity from noise (t = 1) to the sample (t = 0), and the times they stop at."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np


class Solver(Protocol):
    """A rule for one step. Static: hashable, its data live in the state."""

    def init(self, x: jax.Array) -> Any:
        """State before the first step, a pytree."""

    def step(
        self, x: jax.Array, state: Any, velocity: jax.Array, t: jax.Array, t_next: jax.Array
    ) -> tuple[jax.Array, Any]:
        """x at t_next, f32, and the new state."""


@dataclass(frozen=True)
class Euler:
    """x + (t_next - t) velocity, in float32."""

    def init(self, x: jax.Array) -> tuple[()]:
        return ()

    def step(self, x, state, velocity, t, t_next):
        return x + (t_next - t) * velocity, state


MOST_STEPS = 100_000  # a mistyped number must not be taken for work


def flux_timesteps(steps: int, tokens: int, *, shift: bool = True) -> np.ndarray:
    """Times of FLUX.1, 1 to 0, f32 [steps + 1].

    A longer sequence stays longer at high noise: t <- e^mu / (e^mu + 1 / t - 1), where mu goes linearly with the image tokens from
    0.5 at 256 to 1.15 at 4096 (Black Forest Labs).

    Args:
        steps: at least 1.
        tokens: of the image.
        shift: False for FLUX.1-schnell, whose times are evenly spaced.

    Raises:
        ValueError: steps below 1 or above 100,000.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if steps > MOST_STEPS:
        raise ValueError(f"steps={steps}: expected at most {MOST_STEPS}")
    t = np.linspace(1.0, 0.0, steps + 1)
    if shift:
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        t[1:-1] = 1 / (1 + math.exp(-mu) * (1 / t[1:-1] - 1))  # the same, and no overflow for any size
    return t.astype(np.float32)
