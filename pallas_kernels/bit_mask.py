"""Lists of columns as bit masks and back: a bit a column takes less memory than an id where more than one in 32 is kept.

bit j % 32 of word j // 32 is 1  <=>  column j is listed
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.groups import group_count

BITS = 32  # of a word
WORDS = 1024  # of a mask, that mask_to_lists takes at once


def lists_to_mask(indices: jax.Array, counts: jax.Array, columns: int) -> jax.Array:
    """mask [.., ceil(columns / 32)], i32, of the listed columns. A scatter of XLA's: lists are made once in many steps.

    Args:
        indices: [.., K], i32: the first counts entries are distinct, 0 to columns - 1; the others are never used.
        counts: [..], i32, 0 to K.
        columns: how many there are to list.

    Raises:
        ValueError: shapes that do not fit.
    """
    if counts.shape != indices.shape[:-1]:
        raise ValueError(f"indices {indices.shape}, counts {counts.shape}: expected [.., K] and [..]")
    words, capacity = group_count(columns, BITS), indices.shape[-1]
    ids = indices.reshape(-1, capacity)
    listed = jnp.arange(capacity) < counts.reshape(-1, 1)
    places = jnp.where(listed, ids // BITS, words)  # behind the last, where a scatter drops them
    rows = jnp.arange(len(ids))[:, None]
    # No two ids of a list share a bit: to add bits is to set them.
    mask = jnp.zeros((len(ids), words), jnp.int32).at[rows, places].add(jnp.int32(1) << (ids % BITS), mode="drop")
    return mask.reshape(*counts.shape, words)


def mask_to_lists(
    mask: jax.Array, *, capacity: int, implementation: dispatch.Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """indices [.., capacity], i32, ascending, and counts [..], i32, of the columns whose bit is 1.

    Args:
        mask: [.., words], i32, with no more than capacity bits a row.
        capacity: length of the lists; slots behind a count are unspecified.
        implementation: see dispatch.choose.
    """
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    rows = mask.reshape(-1, mask.shape[-1])
    if implementation == "reference":
        bits = (rows[..., None] >> jnp.arange(BITS)) & 1
        bits = bits.reshape(len(rows), -1) == 1
        places = jax.vmap(lambda row: jnp.nonzero(row, size=capacity, fill_value=0)[0])(bits)
        indices, counts = places.astype(jnp.int32), bits.sum(-1, dtype=jnp.int32)
    else:
        indices, counts = pl.pallas_call(
            _lists_body,
            grid=(len(rows),),
            name="mask_to_lists",
            out_shape=(jax.ShapeDtypeStruct((len(rows), capacity), jnp.int32), jax.ShapeDtypeStruct((len(rows),), jnp.int32)),
            interpret=implementation == "interpret",
            compiler_params=dispatch.compiler_params(num_warps=4, num_stages=2),
        )(rows)  # fmt: skip
    return indices.reshape(*mask.shape[:-1], capacity), counts.reshape(mask.shape[:-1])


def _lists_body(mask_ref, indices_ref, counts_ref):
    row = pl.program_id(0)
    total, capacity = mask_ref.shape[1], indices_ref.shape[1]

    def some_words(i, written):
        places = i * WORDS + jnp.arange(WORDS)
        words = plgpu.load(mask_ref.at[row, places], mask=places < total, other=0)
        bits = lax.population_count(words)

        def lowest_bit(_, carry):
            words, slots = carry
            lowest = words & -words
            live = (words != 0) & (slots < capacity)
            # Masked lanes point behind the list: the interpreter scatters them too, and must not meet a written slot.
            apart = jnp.where(live, slots, capacity + places)
            plgpu.store(indices_ref.at[row, apart], places * BITS + lax.population_count(lowest - 1), mask=live)
            return words ^ lowest, slots + 1

        # As many turns as the fullest word has bits: a store takes its time whether its lanes have one or not.
        lax.fori_loop(0, jnp.max(bits), lowest_bit, (words, written + jnp.cumsum(bits) - bits))
        return written + jnp.sum(bits)

    counts_ref[row] = lax.fori_loop(0, group_count(total, WORDS), some_words, 0)
