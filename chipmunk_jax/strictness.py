"""JAX as this library is written for, whatever stricter or wider modes its caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def usual_modes() -> Iterator[None]:
    """Within, or in a function that this decorates, the modes of JAX that judge or change a program's own lines are the usual ones.

    JAX applies them to every library that the program calls, too. A weight [D] is multiplied with tokens [B, N, D] on a hundred
    lines here (jax_numpy_rank_promotion, jax_numpy_dtype_promotion); the indices of the kernels are of 32 bits, in twice the
    registers they would be of 64 (jax_enable_x64); seeds and zeros come from the host, a scalar each (jax_transfer_guard). So the
    program is the same one in all modes, to the bit. What large arrays do is explicit without: see sampling.run().
    """
    promotion = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with promotion[0], promotion[1], jax.enable_x64(False), jax.transfer_guard("allow"):
        yield
