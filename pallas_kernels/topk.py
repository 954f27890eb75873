"""Exact top-k columns of rows of scores, as ascending lists.

Non-negative floats order like their bit patterns. One program a row finds the k-th largest pattern digit by digit, four bits a
pass, then writes the ids of the larger patterns, and of the leftmost equal ones, in ascending order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch


def topk_columns(
    scores: jax.Array,
    k: jax.Array | int,
    *,
    capacity: int,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """indices [..., capacity], i32, and counts [...], i32: the k largest scores of every row, ids ascending, ties from the left.

    Args:
        scores: [..., N], f32, bf16 or f16, not negative; +inf is taken first.
        k: how many, an i32 scalar of 0 to capacity that may be traced; slots behind the first k are unspecified.
        capacity: length of the lists, at most N.
        implementation: see dispatch.choose.

    Raises:
        ValueError: capacity outside 1..N, or scores of an integer dtype.
    """
    width = scores.shape[-1]
    if not 1 <= capacity <= width:
        raise ValueError(f"capacity={capacity}: expected 1 to N = {width}")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores of dtype {scores.dtype}: expected floats")
    k = jnp.minimum(jnp.asarray(k, jnp.int32), capacity)
    counts = jnp.broadcast_to(k, scores.shape[:-1])
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    if implementation == "reference":
        order = lax.top_k(scores, capacity)[1]  # stable: equal scores in ascending order of their ids
        return jnp.sort(jnp.where(jnp.arange(capacity) < k, order, width), axis=-1).astype(jnp.int32), counts
    warps = 4 if counts.size > 512 else 8  # few rows leave processors idle: each gets a larger program
    bits = lax.bitcast_convert_type(scores, jnp.int16 if scores.dtype.itemsize == 2 else jnp.int32)
    indices = pl.pallas_call(
        functools.partial(_body, digits=4 if bits.dtype == jnp.int16 else 8, block=256 * warps),
        grid=(counts.size,),
        name="topk_columns",
        out_shape=jax.ShapeDtypeStruct((counts.size, capacity), jnp.int32),
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=warps, num_stages=2),
    )(bits.reshape(-1, width), k[None])
    return indices.reshape(*scores.shape[:-1], capacity), counts


def _body(bits_ref, k_ref, indices_ref, *, digits, block):
    row = pl.program_id(0)
    width, capacity = bits_ref.shape[1], indices_ref.shape[1]
    blocks = -(-width // block)
    values = jnp.arange(16)  # of a digit

    def load(j):
        columns = j * block + jnp.arange(block)
        inside = columns < width
        # No sign: -0.0 and a negative NaN count too, else a list would have unwritten slots.
        bits = plgpu.load(bits_ref.at[row, columns], mask=inside, other=0) & jnp.iinfo(bits_ref.dtype).max
        return bits.astype(jnp.int32), columns, inside

    threshold = jnp.int32(0)  # the digits found so far
    wanted = k_ref[0]  # columns still to take among those that equal it
    for digit in reversed(range(digits)):
        shift = 4 * digit

        def count(j, at_least, shift=shift, threshold=threshold):
            pattern, _, inside = load(j)
            same = inside & (_above(pattern, shift) == _above(threshold, shift))
            value = jnp.where(same, (pattern >> shift) & 15, -1)
            # One reduction of a tile of 16 rows: as many separate ones would each wait for the whole program.
            return at_least + (value[None, :] >= values[:, None]).astype(jnp.int32).sum(axis=1)

        at_least = lax.fori_loop(0, blocks, count, jnp.zeros(16, jnp.int32))  # columns whose digit is >= 0, .., >= 15
        chosen = jnp.sum(((at_least >= wanted) & (values > 0)).astype(jnp.int32))  # at_least falls from left to right
        wanted = wanted - jnp.sum(jnp.where(values == chosen + 1, at_least, 0))
        threshold = threshold | (chosen << shift)

    def compact(j, carry):
        written, equals = carry
        pattern, columns, inside = load(j)
        equal = (inside & (pattern == threshold)).astype(jnp.int32)
        take = (inside & (pattern > threshold)) | ((equal == 1) & (jnp.cumsum(equal) + equals <= wanted))
        # Lanes that write nothing point behind the list: the interpreter scatters them too, and must not meet another's.
        slots = jnp.where(take, written + jnp.cumsum(take.astype(jnp.int32)) - 1, capacity + jnp.arange(block))
        plgpu.store(indices_ref.at[row, slots], columns, mask=take)
        return written + jnp.sum(take.astype(jnp.int32)), equals + jnp.sum(equal)

    lax.fori_loop(0, blocks, compact, (jnp.int32(0), jnp.int32(0)))


def _above(pattern, shift: int):
    """The digits above the one at `shift`."""
    return pattern >> (shift + 4) if shift < 28 else jnp.zeros_like(pattern)
