"""Softmax attention over chosen columns: one list of key indices for each head and each group of queries.

    S[b, i, h] = softmax_j(scale * q[b, i, h] . k[b, c_j, h]) v[b, c_j, h],   c = the list of (b, h, i // group)

normalised over the chosen columns alone (Chipmunk, section 3). A full step stores `dense - S`, a delta step adds a new S to it;
both directions are fused here, on the whole stacked cache, so that no layer's slice of it is ever copied.

Keys that groups always attend to, those of a text or of a neighbourhood, come in one more list for all heads and layers.

Softmax needs some number near the logits of a row to subtract from them. The log-sum-exp of an earlier step serves as well as the
running maximum, and spares the kernel to look for it and to rescale what it has summed.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, launch
from pallas_kernels.groups import check_group, group_count, join_groups, split_groups
from pallas_kernels.launch import Launch
from pallas_kernels.tiles import tiles

LOG2E = math.log2(math.e)
# Of weights: a shift off by 60 keeps 10^5 of them below it, and values of 10^4 their sum finite.
LARGEST_TOTAL = 2.0**112
MASKED = -1e30  # finite, so that a row without any column stays free of inf - inf
BLOCK = 64  # columns a step: with more, sums spill; with fewer, the matrix units wait for loads
LARGEST_FLOAT8 = 448.0  # of e4m3fn
WRAP = 65_536  # ids that 16 bits tell apart


class Scaled(NamedTuple):
    """A stack of arrays in 8 bits: values times the scale of their row."""

    values: jax.Array  # [L, B, N, H, d], float8_e4m3fn
    scale: jax.Array  # [L, B, H, N], f32

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Scaled":
        """Of values [L, B, N, H, d]."""
        layers, batch, rows, heads, _ = shape
        return cls(jnp.zeros(shape, jnp.float8_e4m3fn), jnp.zeros((layers, batch, heads, rows)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "starts"], meta_fields=["heavy"])
@dataclass(frozen=True)
class PinnedKeys:
    """Keys that all heads and layers of a group attend to beside their own lists, which must not name them again."""

    ids: jax.Array  # [n], i32: those of group 0, then those of group 1, .., ascending within a group
    starts: jax.Array  # [G + 1], i32: where each group's begin, and n
    heavy: int = 0  # the last groups that have far more: their programs start first, lest all others wait for them


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
    residual: jax.Array | Scaled | None = None,
    wrap: jax.Array | None = None,
    pinned: PinnedKeys | None = None,
    valid: jax.Array | None = None,
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
        residual: [L, B, N, H, d], what the unchosen columns contributed; in the dtype of q, or in 8 bits.
        wrap: [L, B, H, G], i32, for lists of half the size (see pack_lists): entries from there on are less by 65,536.
        pinned: keys that groups attend to beside their lists.
        valid: [B], i32: keys of `pinned` from there on are padding, and left out; None: there is none.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    _check(q, k, v, indices, counts, lse, group, residual)
    keys = Keys(indices, counts, wrap, pinned, valid)
    implementation = _choose(implementation, q, residual)
    if implementation == "reference":
        out = _reference(q, k, v, *keys.listed(layer, k.shape[1]), group, scale)
        base = 0 if residual is None else _unscaled(residual, layer)
        return (base + out).astype(q.dtype)
    options = dict(group=group, scale=scale, residual=residual, implementation=implementation)
    return _pallas(q, k, v, keys, lse, layer, **options)


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
    residual: jax.Array | Scaled,
    wrap: jax.Array | None = None,
    pinned: PinnedKeys | None = None,
    valid: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array | Scaled:
    """residual [L, B, N, H, d] with residual[layer] = dense - S, written in place.

    Args:
        dense: [B, N, H, d], what attention over all keys gives.
        the others: as in column_attention.

    Raises:
        ValueError, NotImplementedError: as in column_attention.
    """
    _check(q, k, v, indices, counts, lse, group, residual)
    if dense.shape != q.shape:
        raise ValueError(f"dense {dense.shape}: expected the shape of q, {q.shape}")
    keys = Keys(indices, counts, wrap, pinned, valid)
    implementation = _choose(implementation, q, residual)
    if implementation == "reference":
        out = _reference(q, k, v, *keys.listed(layer, k.shape[1]), group, scale)
        return _with_layer(residual, layer, dense.astype(jnp.float32) - out)
    options = dict(group=group, scale=scale, residual=residual, dense=dense, implementation=implementation)
    return _pallas(q, k, v, keys, lse, layer, **options)


def pack_lists(indices: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lists [.., ceil(K / 2)], i32, two ids of 16 bits a word, the first in its lower half; and wrap [..], i32.

    Args:
        indices: [.., K], i32: the first counts entries are ascending, 0 to 131,071.
        counts: [..], i32.
    """
    halves = jnp.pad(indices & (WRAP - 1), [(0, 0)] * counts.ndim + [(0, indices.shape[-1] % 2)])
    words = halves[..., ::2] | (halves[..., 1::2] << 16)
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]
    return words, (listed & (indices < WRAP)).sum(-1, dtype=jnp.int32)


def _choose(implementation, q, residual) -> dispatch.Implementation:
    return dispatch.choose(implementation, dtype=q.dtype, head_dim=q.shape[-1], float8=isinstance(residual, Scaled))


class Keys(NamedTuple):
    """Which keys each head and group attends to; arguments of column_attention."""

    indices: jax.Array
    counts: jax.Array
    wrap: jax.Array | None
    pinned: PinnedKeys | None
    valid: jax.Array | None

    def listed(self, layer, keys: int) -> tuple[jax.Array, jax.Array]:
        """Ids [B, H, G, n], i32, of all keys of one layer's groups, and which of these entries count."""
        indices, counts = self.indices[layer], self.counts[layer][..., None]
        if self.wrap is not None:
            indices = jnp.stack([indices & (WRAP - 1), lax.shift_right_logical(indices, 16)], -1)
            indices = indices.reshape(*indices.shape[:-2], -1)
            indices += WRAP * (jnp.arange(indices.shape[-1]) >= self.wrap[layer][..., None])
        own = jnp.arange(indices.shape[-1]) < counts
        if self.pinned is None:
            return indices, own
        ids, starts = self.pinned.ids, self.pinned.starts
        places = starts[:-1, None] + jnp.arange(keys)  # [G, N]: a group has no more
        theirs = ids.at[places].get(mode="clip")
        valid = jnp.full(len(indices), keys) if self.valid is None else self.valid
        listed = (places < starts[1:, None]) & (theirs < valid[:, None, None, None])
        spread = lambda a: jnp.broadcast_to(a, (*indices.shape[:-1], keys))
        return jnp.concatenate([indices, spread(theirs)], -1), jnp.concatenate([own, spread(listed)], -1)


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
    shape = None if residual is None else jax.tree.leaves(residual)[0].shape
    if shape is not None and shape[1:] != q.shape:
        raise ValueError(f"residual {shape}: expected [L, {', '.join(map(str, q.shape))}]")


def _unscaled(residual, layer):
    """residual[layer], f32 [B, N, H, d]."""
    if not isinstance(residual, Scaled):
        return residual[layer].astype(jnp.float32)
    return residual.values[layer].astype(jnp.float32) * residual.scale[layer].swapaxes(1, 2)[..., None]


def _with_layer(residual, layer, values):
    """residual with values [B, N, H, d], f32, in its layer."""
    if not isinstance(residual, Scaled):
        return residual.at[layer].set(values.astype(residual.dtype))
    scale = jnp.abs(values).max(-1) / LARGEST_FLOAT8
    values = (values / jnp.where(scale > 0, scale, 1)[..., None]).astype(residual.values.dtype)
    return Scaled(residual.values.at[layer].set(values), residual.scale.at[layer].set(scale.swapaxes(1, 2)))


def _reference(q, k, v, indices, listed, group, scale):
    """S in float32 over the listed ones of these keys [B, H, G, n]."""
    queries = split_groups(q.swapaxes(1, 2), group)  # [B, H, G, group, d]
    safe = jnp.where(listed, indices, 0)
    gather = jax.vmap(jax.vmap(lambda rows, columns: rows[columns]))  # over B and H: [N, d], [G, n] -> [G, n, d]
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


def _pallas(q, k, v, keys: Keys, lse, layer, *, group, scale, residual, dense=None, implementation):
    """residual[layer] + S, or S, as a new array; with `dense`, the residual with dense - S in its layer, in place."""
    layer, source = jnp.asarray(layer, jnp.int32)[None], residual if dense is None else dense
    mode = "store" if dense is not None else "new" if residual is None else "add"
    outs, tree = jax.tree.flatten(jax.ShapeDtypeStruct(q.shape, q.dtype) if dense is None else residual)
    wide, narrow = tiles("column_attention", group)
    own, pinned, heavy = keys[:3], None, 0
    if keys.pinned is not None:
        pinned, heavy = _counted(keys.pinned, keys.valid, len(q)), keys.pinned.heavy * (group // wide.rows)
    # Tiles of one head run side by side and share its keys in the L2 cache.
    for part in launch.launches(q.shape[1], q.shape[2], q.shape[0], wide, narrow):
        body = functools.partial(_body, mode=mode, part=part, heavy=heavy, group=group, scale=scale)
        inputs = (q, k, v, own, pinned, lse, layer, source)
        outs = launch.run(body, f"column_attention_{mode}", inputs, outs, part, implementation)
    return tree.unflatten(outs)


def _counted(pinned: PinnedKeys, valid: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids [n]; where each group's begin [G]; how many of them are valid [B, G]."""
    ids, starts = pinned.ids, jnp.asarray(pinned.starts)
    if valid is None:
        return ids, starts[:-1], jnp.broadcast_to(starts[1:] - starts[:-1], (batch, len(starts) - 1))
    before = jnp.pad(jnp.cumsum(ids < valid[:, None], axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))[:, starts]
    return ids, starts[:-1], before[:, 1:] - before[:, :-1]


def _body(
    q_ref, k_ref, v_ref, own, pinned, lse_ref, layer_ref, source_ref, *refs, mode, part: Launch, heavy, group, scale
):
    tile, layer = part.tile.rows, layer_ref[0]
    i, h = _place(part, heavy)
    b, g = pl.program_id(2), lax.div(i * tile, group)
    rows_total, width = q_ref.shape[1], q_ref.shape[3]
    rows = i * tile + jnp.arange(tile)
    at = (b, rows[:, None], h, jnp.arange(width)[None, :])
    inside = jnp.broadcast_to((rows < rows_total)[:, None], (tile, width))
    q = plgpu.load(q_ref.at[at], mask=inside, other=0)
    shift = LOG2E * plgpu.load(lse_ref.at[layer, b, h, rows], mask=rows < rows_total, other=0)

    lists = [_own_list(*own, layer, b, h, g)] + ([] if pinned is None else [_pinned_list(*pinned, b, g)])
    # Gathered rows, 16 bytes a copy, pipelined.
    rows_of = lambda columns: (k_ref[b, columns, h, :], v_ref[b, columns, h, :])
    out, total = _attend(q, shift, rows_of, lists, scale=scale)
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


def _own_list(indices_ref, counts_ref, wrap_ref, layer, b, h, g):
    """(function, slots [n] -> columns [n]; how many there are)."""

    def load(slots):
        if wrap_ref is None:
            return plgpu.load(indices_ref.at[layer, b, h, g, slots])
        ids = (plgpu.load(indices_ref.at[layer, b, h, g, slots >> 1]) >> ((slots & 1) * 16)) & (WRAP - 1)
        return ids + jnp.where(slots < wrap_ref[layer, b, h, g], 0, WRAP)

    return load, counts_ref[layer, b, h, g]


def _pinned_list(ids_ref, starts_ref, counts_ref, b, g):
    """The same of a group's pinned keys."""
    start = starts_ref[g]
    return lambda slots: plgpu.load(ids_ref.at[start + slots]), counts_ref[b, g]


def _attend(q, shift, rows_of, lists, *, scale):
    """S [tile, d], f32, over the columns of one or two lists, and the sums of its weights [tile], none negative.

    Args:
        q: [tile, d].
        shift: [tile], f32, what is subtracted from the logits, in units of log 2.
        rows_of: function, columns [n] -> rows [n, d] of the keys, and of the values.
        lists: of (load, count), as _own_list has them.
    """

    def weigh(load, count, ragged, j, carry):
        """The carry with 64 more columns of a list."""
        acc, total = carry
        slots = j * BLOCK + jnp.arange(BLOCK)
        # The last step is filled up with the first column: a chosen one, so unchosen garbage is never read.
        k, v = rows_of(load(jnp.where(slots < count, slots, 0) if ragged else slots))
        # One fused multiply-add per logit; the scale never touches q, which would be rounded again.
        weights = jnp.exp2(plgpu.dot(q, k.T) * (scale * LOG2E) - shift[:, None])
        if ragged:
            weights = jnp.where((slots < count)[None, :], weights, 0)
        return acc + plgpu.dot(weights.astype(v.dtype), v), total + weights.sum(axis=1)

    carry = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32))
    for one in lists:
        whole, steps = lax.div(one[1], BLOCK), lax.div(one[1] + BLOCK - 1, BLOCK)
        carry = lax.fori_loop(0, whole, functools.partial(weigh, *one, False), carry)
        carry = lax.fori_loop(whole, steps, functools.partial(weigh, *one, True), carry)
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
