"""Softmax attention over chosen columns: one list of key indices for each head and each group of queries.

    S[b, i, h] = softmax_j(scale * q[b, i, h] . k[b, c_j, h]) v[b, c_j, h],   c = the list of (b, h, i // group)

normalised over the chosen columns alone (Chipmunk, section 3). A full step stores `dense - S`, a delta step adds a new S to it;
both directions are fused here, on the whole stacked cache, so that no layer's slice of it is ever copied.

Softmax needs some number near the logits of a row to subtract from them. The log-sum-exp of an earlier step serves as well as the
running maximum, and spares the kernel to look for it and to rescale what it has summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, launch
from pallas_kernels.groups import check_group, group_count, join_groups, row_tile, split_groups
from pallas_kernels.launch import Launch, Tile

LOG2E = math.log2(math.e)
LARGEST_TOTAL = (
    2.0**112
)  # of weights: a shift off by 60 keeps 10^5 of them below it, and values of 10^4 their sum finite
NARROW = 32  # rows of a program where those of whole tiles would not fill a wave
MASKED = -1e30  # finite, so that a row without any column stays free of inf - inf


def column_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int = 0,
    *,
    lse: jax.Array,
    group: int,
    scale: float,
    residual: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual[layer] + S, or S alone without a residual: [B, N, H, d], dtype of q.

    Args:
        q, k, v: [B, N, H, d], bf16 (any float for the reference).
        indices: [L, B, H, G, K], i32: the first counts entries are distinct rows of k; the others are never used.
        counts: [L, B, H, G], i32, 0 to K. A list of no columns gives S = 0.
        layer: i32 scalar, which entry of the stacked arrays to read.
        lse: [L, B, H, N], f32: a number near the largest logits of each query, as the log-sum-exp of an earlier step. S is exact
            where it is off by up to 60, and finite whatever it is.
        group: queries that share a list, a multiple of 64; G = ceil(N / group).
        scale: of the logits, usually d ** -0.5.
        residual: [L, B, N, H, d], what the unchosen columns contributed.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    _check(q, k, v, indices, counts, lse, group, residual)
    implementation = dispatch.choose(implementation, dtype=q.dtype, head_dim=q.shape[-1])
    if implementation == "reference":
        out = _reference(q, k, v, indices[layer], counts[layer], group, scale)
        base = 0 if residual is None else residual[layer].astype(jnp.float32)
        return (base + out).astype(q.dtype)
    options = dict(group=group, scale=scale, residual=residual, implementation=implementation)
    return _pallas(q, k, v, indices, counts, lse, layer, **options)


def store_attention_residual(
    dense: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    layer: jax.Array | int,
    *,
    lse: jax.Array,
    group: int,
    scale: float,
    residual: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual [L, B, N, H, d] with residual[layer] = dense - S, written in place.

    Args:
        dense: [B, N, H, d], what attention over all keys gives.
        q, k, v, indices, counts, layer, lse, group, scale, residual, implementation: as in column_attention.

    Raises:
        ValueError, NotImplementedError: as in column_attention.
    """
    _check(q, k, v, indices, counts, lse, group, residual)
    if dense.shape != q.shape:
        raise ValueError(f"dense {dense.shape}: expected the shape of q, {q.shape}")
    implementation = dispatch.choose(implementation, dtype=q.dtype, head_dim=q.shape[-1])
    if implementation == "reference":
        out = _reference(q, k, v, indices[layer], counts[layer], group, scale)
        return residual.at[layer].set((dense.astype(jnp.float32) - out).astype(residual.dtype))
    options = dict(group=group, scale=scale, residual=residual, dense=dense, implementation=implementation)
    return _pallas(q, k, v, indices, counts, lse, layer, **options)


def _check(q, k, v, indices, counts, lse, group, residual) -> None:
    check_group(group)
    batch, rows, heads, width = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, width):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, N, H, d] with equal B, H and d")
    lists = (batch, heads, group_count(rows, group))
    if indices.shape[1:-1] != lists or counts.shape != indices.shape[:-1]:
        expected = ", ".join(map(str, lists))
        raise ValueError(
            f"indices {indices.shape}, counts {counts.shape}: expected [L, {expected}, K], [L, {expected}]"
        )
    if lse.shape[1:] != (batch, heads, rows):
        raise ValueError(f"lse {lse.shape}: expected [L, B, H, N] = [L, {batch}, {heads}, {rows}]")
    if residual is not None and residual.shape[1:] != q.shape:
        raise ValueError(f"residual {residual.shape}: expected [L, {', '.join(map(str, q.shape))}]")


def _reference(q, k, v, indices, counts, group, scale):
    """S in float32 for one layer's lists: indices [B, H, G, K], counts [B, H, G]."""
    queries = split_groups(q.swapaxes(1, 2), group)  # [B, H, G, group, d]
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]
    safe = jnp.where(listed, indices, 0)
    gather = jax.vmap(jax.vmap(lambda rows, columns: rows[columns]))  # over B and H: [N, d], [G, K] -> [G, K, d]
    keys, values = gather(k.swapaxes(1, 2), safe), gather(v.swapaxes(1, 2), safe)
    keys, values = (jnp.where(listed[..., None], x, 0) for x in (keys, values))
    logits = jnp.einsum("bhgqd,bhgkd->bhgqk", queries, keys, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(listed[..., None, :], logits, -jnp.inf)
    shift = jnp.maximum(logits.max(-1, keepdims=True), MASKED)
    weights = jnp.exp(logits - shift)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhgqk,bhgkd->bhgqd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0)
    return join_groups(out, q.shape[1]).swapaxes(1, 2)


def _pallas(q, k, v, indices, counts, lse, layer, *, group, scale, residual, dense=None, implementation):
    """residual[layer] + S, or S, as a new array; with `dense`, the residual with dense - S in its layer, in place."""
    layer = jnp.asarray(layer, jnp.int32)[None]
    sources = [a for a in ((residual,) if dense is None else (dense,)) if a is not None]
    out = jax.ShapeDtypeStruct(q.shape, q.dtype) if dense is None else residual
    # Tiles of one head run side by side and share its keys in the L2 cache.
    for part in launch.launches(q.shape[1], q.shape[2], q.shape[0], *_tiles(group)):
        mode = "store" if dense is not None else "add" if sources else "new"
        body = functools.partial(_body, mode=mode, part=part, group=group, scale=scale)
        inputs = (q, k, v, indices, counts, lse, layer, *sources)
        (out,) = launch.run(body, f"column_attention_{mode}", inputs, [out], part, implementation)
    return out


def _tiles(group):
    # 4 warps with 128 x 64 tiles beat every 8-warp setting on an H100.
    wide = Tile(row_tile(group), 1, warps=4, resident=2)
    return wide, wide._replace(rows=min(NARROW, wide.rows), stages=4)


def _body(q_ref, k_ref, v_ref, indices_ref, counts_ref, lse_ref, layer_ref, *refs, mode, part: Launch, group, scale):
    tile, layer, out_ref = part.tile.rows, layer_ref[0], refs[-1]
    i, h, b = part.first + pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows_total, width = q_ref.shape[1], q_ref.shape[3]
    g = lax.div(i * tile, group)
    rows = i * tile + jnp.arange(tile)
    at = (b, rows[:, None], h, jnp.arange(width)[None, :])
    inside = jnp.broadcast_to((rows < rows_total)[:, None], (tile, width))
    q = plgpu.load(q_ref.at[at], mask=inside, other=0)
    shift = LOG2E * plgpu.load(lse_ref.at[layer, b, h, rows], mask=rows < rows_total, other=0)

    out = _attend(
        q,
        shift,
        lambda columns: k_ref[b, columns, h, :],  # gathered rows, 16 bytes a copy, pipelined
        lambda columns: v_ref[b, columns, h, :],
        lambda slots: plgpu.load(indices_ref.at[layer, b, h, g, slots]),
        counts_ref[layer, b, h, g],
        scale=scale,
    )
    if mode == "add":
        out = plgpu.load(refs[0].at[layer, *at], mask=inside, other=0).astype(jnp.float32) + out
    elif mode == "store":
        out = plgpu.load(refs[0].at[at], mask=inside, other=0).astype(jnp.float32) - out
        at = (layer, *at)
    plgpu.store(out_ref.at[at], out.astype(out_ref.dtype), mask=inside)


def _attend(q, shift, keys, values, listed, count, *, scale):
    """S [tile, d], f32, of one list.

    Args:
        q: [tile, d].
        shift: [tile], f32, what is subtracted from the logits, in units of log 2.
        keys, values: functions, columns [n] -> rows [n, d].
        listed: function, slots [n] -> columns [n] of the list.
        count: how many there are.
    """
    block = 64  # columns a step: more spill, fewer starve the matrix units

    def step(offset, carry, ragged):
        acc, total = carry
        slots = offset + jnp.arange(block)
        # The last step is filled up with the first column: a chosen one, so unchosen garbage is never read.
        columns = listed(jnp.where(slots < count, slots, 0) if ragged else slots)
        logits = plgpu.dot(q, keys(columns).T)
        # One fused multiply-add per logit; the scale never touches q, which would be rounded again.
        weights = jnp.exp2(logits * (scale * LOG2E) - shift[:, None])
        if ragged:
            weights = jnp.where((slots < count)[None, :], weights, 0)
        chosen = values(columns)
        return acc + plgpu.dot(weights.astype(chosen.dtype), chosen), total + weights.sum(axis=1)

    carry = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32))
    whole = lax.div(count, block)
    carry = lax.fori_loop(0, whole, lambda j, c: step(j * block, c, False), carry)
    acc, total = lax.fori_loop(whole, lax.div(count + block - 1, block), lambda j, c: step(j * block, c, True), carry)
    # Nothing listed, or a shift so far off that all weights vanished, or grew beyond what float32 can sum times a value.
    known = (total > 0) & (total < LARGEST_TOTAL)
    return jnp.where(known[:, None], acc / jnp.where(known, total, 1)[:, None], 0)
