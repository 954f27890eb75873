"""The modes of JAX for which this library is written, whatever stricter or wider modes its caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.errors import InputError


@contextmanager
def usual_modes() -> Iterator[None]:
    """Within, or in a function that this decorates, JAX's modes that check or change the lines of a program are the usual ones.

    A caller sets them for its own lines, but JAX applies them to every library too. Here, a weight [D] is multiplied with tokens
    [B, N, D] on a hundred lines (jax_numpy_rank_promotion, jax_numpy_dtype_promotion); indices of kernels have 32 bits, and with 64
    would take twice the registers (jax_enable_x64); seeds and zeros come from the host as scalars (jax_transfer_guard); and a seed
    is one sample (jax_threefry_partitionable). So the program is the same in all modes, to the bit. Large arrays are always moved
    explicitly: see sampling.run().
    """
    promotion = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    bits = jax.enable_x64(False), jax.threefry_partitionable(True)
    with promotion[0], promotion[1], bits[0], bits[1], jax.transfer_guard("allow"):
        yield


def check_untraced(what: str) -> None:
    """Raises InputError within a transformation of JAX, where no array has numbers yet."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise InputError(f"{what} under jit, grad, vmap or the like: expected outside of them, as it needs numbers")


def key_of(seed: int) -> jax.Array:
    """jax.random.key(seed) as JAX makes it where jax_default_prng_impl and jax_random_seed_offset are not set."""
    return jax.random.wrap_key_data(np.asarray([0, seed], np.uint32), impl="threefry2x32")
