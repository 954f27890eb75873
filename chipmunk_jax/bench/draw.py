"""Random arrays on the device. Never zeros: a matrix unit that multiplies zeros draws less power and clocks higher."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import Columns


@partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Normal with standard deviation `scale`: [shape], dtype."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@partial(jax.jit, static_argnums=1)
def scores(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Log-normal, as uneven as attention mass: [shape], bf16, positive.

    Drawn a slice of the first axis at a time, as those of a video take 5 GB.
    """
    draw = lambda key: jnp.exp(jax.random.normal(key, shape[1:], jnp.float32)).astype(jnp.bfloat16)
    return lax.map(draw, jax.random.split(key, shape[0]))


@partial(jax.jit, static_argnums=(1, 2, 3))
def lists(key: jax.Array, shape: tuple[int, ...], kept: int, columns: int) -> Columns:
    """Lists [*shape, kept] of distinct columns, 0 to columns - 1, ascending; every one of them full.

    Sums of exponential gaps, scaled to 0..1, are uniform numbers in ascending order; spread over the columns that are not kept and
    moved up by one a place they become distinct. No list of all columns is ever made: that would take 10 GB for a video.
    """

    def draw(key):
        gaps = jax.random.exponential(key, (*shape[1:], kept + 1))
        sums = jnp.cumsum(gaps, axis=-1)
        spare = columns - kept
        places = jnp.floor(sums[..., :-1] / sums[..., -1:] * (spare + 1)).astype(jnp.int32)
        # A parallel sum may fall by a rounding.
        places = lax.cummax(jnp.clip(places, 0, spare), axis=places.ndim - 1)
        return places + jnp.arange(kept, dtype=jnp.int32)

    indices = lax.map(draw, jax.random.split(key, shape[0]))
    return Columns(indices, jnp.full(shape, kept, jnp.int32))
