"""Softmax attention over chosen columns: one list of key indices for each head and each group of queries.

    S[b, i, h] = softmax_j(scale * q[b, i, h] . k[b, c_j, h]) v[b, c_j, h],   c = the list of (b, h, i // group)

normalised over the chosen columns alone (Chipmunk, section 3). A full step stores `dense - S`, a delta step adds a new S to it;
both directions are fused here, on the whole stacked cache, so that no layer's slice of it is ever copied.

Keys that groups always attend to, those of a text or of a neighbourhood, come in one more list for all heads and layers. Means of
blocks of keys may stand for the keys that neither names: S is then the softmax over the columns and the means (see block_means.py).

Softmax needs some number near the logits of a row to subtract from them. The log-sum-exp of an earlier step serves as well as the
running maximum, and spares the kernel to look for it and to rescale what it has summed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, launch
from pallas_kernels.block_means import STEP, BlockMeans
from pallas_kernels.columns import Columns, PinnedKeys, Scaled, covers
from pallas_kernels.exp2 import LOG2E
from pallas_kernels.groups import check_group, group_count, join_groups, split_groups
from pallas_kernels.launch import Launch
from pallas_kernels.tiles import tiles

# Of the sum of weights: a shift off by 60 keeps 10^5 of them below it, and values of 10^4 their sum finite.
LARGEST_TOTAL = 2.0**112
MASKED = -1e30  # finite, so that a row without any column stays free of inf - inf
BLOCK = 64  # columns a step: with more, sums spill; with fewer, the matrix units wait for loads
LARGEST_FLOAT8 = 448.0  # of e4m3fn


def column_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    columns: Columns,
    layer: jax.Array | int = 0,
    *,
    lse: jax.Array,
    group: int,
    scale: float,
    residual: jax.Array | Scaled | None = None,
    pinned: PinnedKeys | None = None,
    means: BlockMeans | None = None,
    valid: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """residual[layer] + S, or S alone without a residual: [B, N, H, d], dtype of q.

    Args:
        q, k, v: [B, N, H, d], bf16 (any float for the reference).
        columns: lists [L, B, H, G, K] of rows of k, packed or not. A list of no columns gives S = 0, or that of the means.
        layer: i32 scalar, which entry of the stacked arrays to read.
        lse: [L, B, H, N], f32: a number near the largest logits of each query, as the log-sum-exp of an earlier step. S is exact
            where it is off by up to 60, and finite whatever it is.
        group: queries that share a list, a multiple of 64; G = ceil(N / group).
        scale: of the logits, usually d ** -0.5.
        residual: [L, B, N, H, d], what the unchosen columns contributed; in the dtype of q, or in 8 bits.
        pinned: keys that groups attend to besides their lists.
        means: of blocks of k and v, each with the weight of the keys that columns and pinned leave out; None: they have none.
        valid: [B], i32: keys of `pinned` from there on are padding, and left out; None: there is none.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    _check(q, k, v, columns, lse, group, residual)
    implementation = _choose(implementation, q, residual)
    if implementation == "reference":
        out = _reference(q, k, v, *_listed(columns, layer, pinned, valid, k), means, group, scale)
        base = 0 if residual is None else _unscaled(residual, layer, len(q))
        return (base + out).astype(q.dtype)
    options = dict(group=group, scale=scale, residual=residual, pinned=pinned, means=means, valid=valid)
    return _pallas(q, k, v, columns, lse, layer, **options, implementation=implementation)


def store_attention_residual(
    dense: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    columns: Columns,
    layer: jax.Array | int,
    *,
    lse: jax.Array,
    group: int,
    scale: float,
    residual: jax.Array | Scaled,
    pinned: PinnedKeys | None = None,
    means: BlockMeans | None = None,
    valid: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array | Scaled:
    """residual [L, B, N, H, d] with residual[layer] = dense - S, written in place.

    Args:
        dense: [B, N, H, d], the output of attention over all keys.
        residual: [L, B, N, H, d], to write to; in the dtype of q, or in 8 bits.
        q, k, v, columns, layer, lse, group, scale, pinned, means, valid, implementation: as in column_attention.

    Raises:
        ValueError, NotImplementedError: as in column_attention.
    """
    _check(q, k, v, columns, lse, group, residual)
    if dense.shape != q.shape:
        raise ValueError(f"dense {dense.shape}: expected the shape of q, {q.shape}")
    implementation = _choose(implementation, q, residual)
    if implementation == "reference":
        out = _reference(q, k, v, *_listed(columns, layer, pinned, valid, k), means, group, scale)
        return _with_layer(residual, layer, dense.astype(jnp.float32) - out)
    options = dict(group=group, scale=scale, residual=residual, pinned=pinned, means=means, valid=valid)
    return _pallas(q, k, v, columns, lse, layer, **options, dense=dense, implementation=implementation)


def _choose(implementation, q, residual) -> dispatch.Implementation:
    return dispatch.choose(implementation, dtype=q.dtype, head_dim=q.shape[-1], float8=isinstance(residual, Scaled))


def _check(q, k, v, columns: Columns, lse, group, residual) -> None:
    check_group(group)
    batch, rows, heads, width = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, width):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, N, H, d] with equal B, H and d")
    columns.check((batch, heads, group_count(rows, group)), f"q {q.shape}", packable=True)
    if not covers(lse.shape[1:], (batch, heads, rows)):
        raise ValueError(f"lse {lse.shape}: expected [L, B, H, N] = [L, {batch}, {heads}, {rows}]")
    shape = None if residual is None else jax.tree.leaves(residual)[0].shape
    if shape is not None and not covers(shape[1:], q.shape):
        raise ValueError(f"residual {shape}: expected [L, {', '.join(map(str, q.shape))}]")


def _listed(columns: Columns, layer, pinned: PinnedKeys | None, valid, k):
    """Ids [B, H, G, n], i32, of all keys of one layer's groups, and which of these entries count."""
    batch, keys = k.shape[:2]
    own = columns.listed(layer, batch)
    if pinned is None:
        return own
    theirs = (jnp.broadcast_to(a, (*own[0].shape[:-1], keys)) for a in pinned.listed(valid, keys))
    return tuple(jnp.concatenate(both, -1) for both in zip(own, theirs, strict=True))


def _unscaled(residual, layer, batch):
    """residual[layer], f32 [B, N, H, d]."""
    own = jax.tree.map(lambda stack: stack[layer, :batch], residual)
    if not isinstance(own, Scaled):
        return own.astype(jnp.float32)
    return own.values.astype(jnp.float32) * own.scale.swapaxes(1, 2)[..., None]


def _with_layer(residual, layer, values):
    """residual with values [B, N, H, d], f32, in its layer."""
    batch = len(values)
    if not isinstance(residual, Scaled):
        return residual.at[layer, :batch].set(values.astype(residual.dtype))
    scale = jnp.abs(values).max(-1) / LARGEST_FLOAT8
    values = (values / jnp.where(scale > 0, scale, 1)[..., None]).astype(residual.values.dtype)
    scale = residual.scale.at[layer, :batch].set(scale.swapaxes(1, 2))
    return Scaled(residual.values.at[layer, :batch].set(values), scale)


def _reference(q, k, v, ids, listed, means: BlockMeans | None, group, scale):
    """S in float32 over the listed ones of these keys [B, H, G, n], and the means."""
    queries = split_groups(q.swapaxes(1, 2), group)  # [B, H, G, group, d]
    gather = jax.vmap(jax.vmap(lambda rows, columns: rows[columns]))  # over B and H: [N, d], [G, n] -> [G, n, d]
    keys, values = gather(k.swapaxes(1, 2), ids), gather(v.swapaxes(1, 2), ids)
    keys, values = (jnp.where(listed[..., None], x, 0) for x in (keys, values))
    times = listed.astype(jnp.float32)  # how often each column counts
    if means is not None:
        theirs = [jnp.broadcast_to(x.swapaxes(1, 2)[:, :, None], (*means.left.shape, q.shape[-1])) for x in means[:2]]
        keys, values = (jnp.concatenate(both, -2) for both in zip((keys, values), theirs, strict=True))
        times = jnp.concatenate([times, means.left], -1)
    logits = jnp.einsum("bhgqd,bhgkd->bhgqk", queries, keys, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(times[..., None, :] > 0, logits, -jnp.inf)
    shift = jnp.maximum(logits.max(-1, keepdims=True), MASKED)
    weights = jnp.exp(logits - shift) * times[..., None, :]
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhgqk,bhgkd->bhgqd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0)
    return join_groups(out, q.shape[1]).swapaxes(1, 2)


def _pallas(
    q, k, v, columns: Columns, lse, layer, *, group, scale, residual, pinned, means, valid, dense=None, implementation
):
    """residual[layer] + S, or S, as a new array; with `dense`, the residual with dense - S in its layer, in place."""
    layer, source = jnp.asarray(layer, jnp.int32)[None], residual if dense is None else dense
    mode = "store" if dense is not None else "new" if residual is None else "add"
    outs, tree = jax.tree.flatten(jax.ShapeDtypeStruct(q.shape, q.dtype) if dense is None else residual)
    wide, narrow = tiles("column_attention", group)
    heavy, theirs = 0, None
    if pinned is not None:
        heavy, theirs = pinned.heavy * (group // wide.rows), pinned.counted(valid, len(q))
    # Tiles of one head run side by side and share its keys in the L2 cache.
    for part in launch.launches(q.shape[1], q.shape[2], q.shape[0], wide, narrow):
        body = functools.partial(_body, mode=mode, part=part, heavy=heavy, group=group, scale=scale)
        inputs = (q, k, v, columns, theirs, means, lse, layer, source)
        outs = launch.run(body, f"column_attention_{mode}", inputs, outs, part, implementation)
    return tree.unflatten(outs)


def _body(
    q_ref, k_ref, v_ref, columns, pinned, means, lse_ref, layer_ref, source_ref, *refs,
    mode, part: Launch, heavy, group, scale,
):  # fmt: skip
    tile, layer = part.tile.rows, layer_ref[0]
    i, h = _place(part, heavy)
    b, g = pl.program_id(2), lax.div(i * tile, group)
    rows_total, width = q_ref.shape[1], q_ref.shape[3]
    rows = i * tile + jnp.arange(tile)
    at = (b, rows[:, None], h, jnp.arange(width)[None, :])
    inside = jnp.broadcast_to((rows < rows_total)[:, None], (tile, width))
    q = plgpu.load(q_ref.at[at], mask=inside, other=0)
    shift = LOG2E * plgpu.load(lse_ref.at[layer, b, h, rows], mask=rows < rows_total, other=0)

    # Gathered rows, 16 bytes a copy, pipelined.
    rows_of = lambda k, v, ids: (k[b, ids, h, :], v[b, ids, h, :])
    lists = [columns.loader(layer, b, h, g)] + ([] if pinned is None else [pinned.loader(b, g)])
    once = lambda load: lambda slots: (*rows_of(k_ref, v_ref, load(slots)), None)
    sources = [(once(load), count) for load, count in lists]
    if means is not None:
        times = lambda slots: plgpu.load(means.left.at[b, h, g, slots])
        sources.append((lambda slots: (*rows_of(means.k, means.v, slots), times(slots)), means.k.shape[1]))
    out, total = _attend(q, shift, sources, scale=scale)
    # Zero, but not to the compiler: it would keep the places of all these rows in registers throughout the loop.
    rows = rows + (jnp.min(total) < 0).astype(jnp.int32)
    at = (b, rows[:, None], h, jnp.arange(width)[None, :])
    inside = jnp.broadcast_to((rows < rows_total)[:, None], (tile, width))
    load = lambda ref, *where: plgpu.load(ref.at[*where, *at], mask=inside).astype(jnp.float32)
    store = lambda ref, x, *where: plgpu.store(ref.at[*where, *at], x.astype(ref.dtype), mask=inside)
    of_rows = (layer, b, h, rows)
    if mode == "new":
        store(refs[-1], out)
    elif mode == "add" and isinstance(source_ref, Scaled):
        scale = plgpu.load(source_ref.scale.at[of_rows], mask=rows < rows_total)
        store(refs[-1], load(source_ref.values, layer) * scale[:, None] + out)
    elif mode == "add":
        store(refs[-1], load(source_ref, layer) + out)
    elif len(refs) == 2:  # the residual, before and after
        store(refs[-1], load(source_ref) - out, layer)
    else:
        residual = load(source_ref) - out
        scale = jnp.max(jnp.abs(residual), axis=1) / LARGEST_FLOAT8
        store(refs[-2], residual / jnp.where(scale > 0, scale, 1)[:, None], layer)
        plgpu.store(refs[-1].at[of_rows], scale, mask=rows < rows_total)


def _attend(q, shift, sources, *, scale):
    """S [tile, d], f32, over the columns of all sources, and the sums of its weights [tile], none negative.

    Args:
        q: [tile, d].
        shift: [tile], f32, what is subtracted from the logits, in units of log 2.
        sources: (load, count) of each: a function, slots [n] -> keys [n, d], values [n, d], and how often each counts, f32 [n]
            or None for once; and how many slots there are: of means a multiple of STEP, an int.
    """

    def weigh(load, count, step, ragged, j, carry):
        """The carry with `step` more columns of a source."""
        acc, total = carry
        slots = j * step + jnp.arange(step)
        # The last step is filled up with the first column: a chosen one, so unchosen garbage is never read.
        k, v, times = load(jnp.where(slots < count, slots, 0) if ragged else slots)
        # One fused multiply-add per logit; the scale never touches q, which would be rounded again.
        weights = jnp.exp2(plgpu.dot(q, k.T) * (scale * LOG2E) - shift[:, None])
        if times is not None:
            weights *= times[None, :]
        if ragged:
            weights = jnp.where((slots < count)[None, :], weights, 0)
        return acc + plgpu.dot(weights.astype(v.dtype), v), total + weights.sum(axis=1)

    carry = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32))
    for load, count in sources:
        if isinstance(count, int):
            carry = lax.fori_loop(0, count // STEP, functools.partial(weigh, load, count, STEP, False), carry)
            continue
        whole, steps = lax.div(count, BLOCK), lax.div(count + BLOCK - 1, BLOCK)
        carry = lax.fori_loop(0, whole, functools.partial(weigh, load, count, BLOCK, False), carry)
        carry = lax.fori_loop(whole, steps, functools.partial(weigh, load, count, BLOCK, True), carry)
    acc, total = carry
    # No key at all, or a shift so far off that all weights vanished, or grew beyond what float32 can sum times a value.
    known = (total > 0) & (total < LARGEST_TOTAL)
    return jnp.where(known[:, None], acc / jnp.where(known, total, 1)[:, None], 0), total


def _place(part: Launch, heavy: int):
    """Row tile and head of this program: the last `heavy` tiles of all heads, then the others head by head."""
    tiles, heads, _ = part.grid
    # A launch that is not the last, or is a rest of narrow tiles, fills a few waves alone: nobody waits long.
    if not heavy or part.first or heavy >= tiles:
        return part.first + pl.program_id(0), pl.program_id(1)
    program, early, late = pl.program_id(1) * tiles + pl.program_id(0), heavy * heads, tiles - heavy
    others = jnp.maximum(program - early, 0)
    first = program < early
    i = jnp.where(first, late + lax.rem(program, heavy), lax.rem(others, late))
    return i, jnp.where(first, lax.div(program, heavy), lax.div(others, late))
