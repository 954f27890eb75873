"""Blocks of consecutive keys as their mean key and mean value: they stand in attention for the keys that a list leaves out.

A group of queries gives each mean the weight of as many keys as its list leaves out of the block. Softmax over the chosen keys and
these means together follows what the rest of the keys do, at the price of one column a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.columns import Columns, PinnedKeys
from pallas_kernels.groups import group_count, split_groups

BLOCKS = (64, 128)  # keys of a block
LANES = 256  # blocks that a program counts
STEP = (
    32  # blocks that column_attention takes at once: with 64, only one of its programs fits a multiprocessor of an H100
)


class BlockMeans(NamedTuple):
    """The keys of one layer by blocks: M of them, ceil(N / block) up to the next multiple of STEP, the last ones empty."""

    k: jax.Array  # [B, M, H, d]: means of the keys of a block that are no padding
    v: jax.Array  # [B, M, H, d]: of their values
    left: (
        jax.Array
    )  # f32 [B, H, G, M]: how many of them a group neither lists nor has pinned; bytes would be loaded too late


def block_means(
    k: jax.Array,
    v: jax.Array,
    columns: Columns,
    layer: jax.Array | int = 0,
    *,
    block: int,
    pinned: PinnedKeys | None = None,
    valid: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> BlockMeans:
    """The means of all blocks of keys, and how many keys of each the lists of one layer leave out.

    Args:
        k, v: [B, N, H, d].
        columns: lists [L, B, H, G, K] of rows of k, packed or not, none of them padding or pinned.
        layer: i32 scalar, which entry of the lists to read.
        block: consecutive keys of a block, 64 or 128; the last may be ragged.
        pinned: keys that groups attend to besides their lists.
        valid: [B], i32: keys from there on are padding, and left out; None: there is none.
        implementation: see dispatch.choose; of the counts, as the means are a sum that XLA makes at the speed of memory.

    Raises:
        ValueError: shapes that do not fit, or another block.
    """
    batch, keys, heads, _ = k.shape
    if block not in BLOCKS or v.shape != k.shape:
        raise ValueError(f"block={block}, k {k.shape}, v {v.shape}: expected a block of {BLOCKS}, and equal shapes")
    columns.check((batch, heads, columns.counts.shape[-1]), f"k {k.shape}", packable=True)
    mean = functools.partial(_mean, block=block, valid=valid)
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    count = _reference if implementation == "reference" else functools.partial(_pallas, implementation=implementation)
    return BlockMeans(mean(k), mean(v), count(columns, layer, pinned, valid, batch, keys, block))


def _mean(x, *, block, valid):
    """[B, N, H, d] -> [B, M, H, d], summed in float32."""
    batch, keys, heads, width = x.shape
    starts = block * jnp.arange(group_count(keys, block))
    if valid is not None:  # what stands in the padding may be anything
        x = jnp.where((jnp.arange(keys) < valid[:, None])[..., None, None], x, 0)
    sizes = jnp.clip(_ends(valid, keys, batch)[:, None] - starts, 0, block)
    sums = split_groups(x.reshape(batch, keys, heads * width), block).sum(2, dtype=jnp.float32)
    means = (sums / jnp.maximum(sizes, 1)[..., None]).astype(x.dtype)
    empty = _blocks(keys, block) - means.shape[1]
    return jnp.pad(means, ((0, 0), (0, empty), (0, 0))).reshape(batch, -1, heads, width)


def _blocks(keys, block):
    """M."""
    return STEP * group_count(keys, STEP * block)


def _ends(valid, keys, batch):
    """Where the padding begins, i32 [B]."""
    return jnp.full(batch, keys, jnp.int32) if valid is None else valid.astype(jnp.int32)


def _reference(columns: Columns, layer, pinned: PinnedKeys | None, valid, batch, keys, block):
    blocks = _blocks(keys, block)
    kept = _by_block(*columns.listed(layer, batch), blocks, block)  # [B, H, G, M]
    if pinned is not None:
        kept += _by_block(*pinned.listed(valid, keys), blocks, block)
    ends = _ends(valid, keys, batch)
    sizes = jnp.clip(ends[:, None] - block * jnp.arange(blocks), 0, block)
    return (sizes[:, None, None] - kept).astype(jnp.float32)


def _by_block(ids, listed, blocks, block):
    """How many of these entries [.., n] name a key of each block: i32 [.., M]."""
    return ((ids // block)[..., None] == jnp.arange(blocks)).sum(-2, dtype=jnp.int32, where=listed[..., None])


def _pallas(columns: Columns, layer, pinned: PinnedKeys | None, valid, batch, keys, block, *, implementation):
    heads, groups = columns.counts.shape[2:]
    blocks = _blocks(keys, block)
    theirs = None if pinned is None else pinned.counted(valid, batch)
    parts = group_count(blocks, LANES)
    return pl.pallas_call(
        functools.partial(_body, block=block, parts=parts),
        grid=(groups * parts, heads, batch),
        name="block_means",
        out_shape=jax.ShapeDtypeStruct((batch, heads, groups, blocks), jnp.float32),
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=1),
    )(columns, theirs, _ends(valid, keys, batch), jnp.asarray(layer, jnp.int32)[None])


def _body(columns, pinned, end_ref, layer_ref, left_ref, *, block, parts):
    g, part = lax.div(pl.program_id(0), parts), lax.rem(pl.program_id(0), parts)
    h, b = pl.program_id(1), pl.program_id(2)
    blocks = part * LANES + jnp.arange(LANES)
    first, last = (jnp.minimum(block * at, end_ref[b]) for at in (blocks, blocks + 1))
    left = last - first
    lists = [(*columns.loader(layer_ref[0], b, h, g), columns.capacity)]
    if pinned is not None:
        lists.append((*pinned.loader(b, g), pinned.ids.shape[0]))
    for load, count, capacity in lists:
        begin = _place(load, jnp.zeros_like(blocks), count, first, capacity)
        left -= _place(load, begin, jnp.minimum(begin + block, count), last, block) - begin
    plgpu.store(left_ref.at[b, h, g, blocks], left.astype(jnp.float32), mask=blocks < left_ref.shape[3])


def _place(load, low, high, bound, most):
    """The first slots from low to high whose ids reach `bound`, else high; lists ascend, and high - low is `most` at most."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) >> 1
        before = (low < high) & (load(middle, low < high) < bound)
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    return lax.fori_loop(0, most.bit_length(), halve, (low, jnp.broadcast_to(high, low.shape)))[0]
