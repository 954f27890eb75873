"""The algorithm: attention and MLP evaluated as a stale part plus fresh columns (Chipmunk, section 3).

    full step    out = dense(x),                cache <- out - columns(x)
    delta step   out = cache + columns(x)

The columns of an attention are the chosen keys and, but for the paper's own rule, the means of blocks of the others.

`attend` and `feed_forward` are all that a model calls. Without a cache they are the textbook's; with an Observer in its place they
are too, and tell it what they computed.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from chipmunk_jax.cache import AttentionCache, LayerCache, MlpCache
from chipmunk_jax.schedule import Share, Step, by_phase
from pallas_kernels import (
    Columns,
    block_means,
    column_attention,
    column_fc1,
    column_fc2,
    column_sums,
    dense_attention,
    group_mean_change,
    move_column_fc2,
    pack_lists,
    store_activations,
    store_attention_residual,
    store_fc2_residual,
    store_group_mean,
    topk_columns,
)
from pallas_kernels.groups import group_count, split_groups


class Observer:
    """What may stand in the place of a LayerCache: a pytree that sees every layer of a stack, which is then dense."""

    def attended(
        self, q: jax.Array, k: jax.Array, lse: jax.Array, out: jax.Array, step: Step, valid: jax.Array | None
    ) -> Self:
        """This after the attention of a layer, with its log-sum-exp lse [B, H, N], f32, and its output [B, N, H, d]."""
        raise NotImplementedError

    def fed_forward(self, activations: jax.Array, out: jax.Array, step: Step) -> Self:
        """This after the MLP of a layer, with its activations after the GELU, [B, N, F], and its output [B, N, D]."""
        raise NotImplementedError


SCORES = 2e9  # bytes of keys' scores at once: all of FLUX's, those of 8 of HunyuanVideo's 24 heads


@jax.named_scope("attend")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache | Observer | None,
    step: Step,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | Observer | None]:
    """softmax(q k^T / sqrt(d)) v, exact or by its columns as the step's phase says: [B, N, H, d]; and the cache.

    Args:
        q, k, v: [B, N, H, d], position-encoded.
        cache: of the layer's whole stack, or None or an Observer for dense attention.
        step: which phase, which layer.
        valid: [B], i32: tokens from there on are padding, which no other sees; None: there is none.
    """
    if isinstance(cache, Observer):
        out, lse = _dense_with_lse(q, k, v, step, valid)
        return out, cache.attended(q, k, lse, out, step, valid)
    if cache is None or cache.attention is None:
        return _dense_with_lse(q, k, v, step, valid)[0], cache
    phases = (_dense_attention, _measure, _select, _refresh, _delta)  # in the order of AttentionPhase
    out, attention = by_phase(step.attention.phase, phases, q, k, v, cache.attention, step, valid)
    return out, cache.replace(attention=attention)


def _dense_attention(q, k, v, cache: AttentionCache, step: Step, valid):
    return _dense_with_lse(q, k, v, step, valid)[0], cache


def _measure(q, k, v, cache: AttentionCache, step: Step, valid):
    out, lse = _dense_with_lse(q, k, v, step, valid)
    return out, cache.replace(lse=cache.lse.at[step.layer].set(lse))


def _select(q, k, v, cache: AttentionCache, step: Step, valid):
    # Before the new log-sum-exp takes the place of the last one.
    columns, lse = _together((_choose_keys(q, k, cache, step, valid), cache.lse))
    out, cache = _measure(q, k, v, cache.replace(columns=columns, lse=lse), step, valid)
    return out, _store_residual(out, q, k, v, cache, step, valid)


def _refresh(q, k, v, cache: AttentionCache, step: Step, valid):
    out, cache = _measure(q, k, v, cache, step, valid)
    return out, _store_residual(out, q, k, v, cache, step, valid)


def _delta(q, k, v, cache: AttentionCache, step: Step, valid):
    out = column_attention(q, k, v, cache.columns, step.layer, **_options(q, k, v, cache, step, valid))
    return _together((out, cache))


def _dense_with_lse(q, k, v, step: Step, valid):
    return dense_attention(q, k, v, scale=q.shape[-1] ** -0.5, valid=valid, implementation=step.implementation)


def _store_residual(out, q, k, v, cache: AttentionCache, step: Step, valid) -> AttentionCache:
    if cache.residual is None:
        return cache
    options = _options(q, k, v, cache, step, valid)
    residual = store_attention_residual(out, q, k, v, cache.columns, step.layer, **options)
    residual, lse, columns = _together((residual, cache.lse, cache.columns))
    return cache.replace(residual=residual, lse=lse, columns=columns)


def _options(q, k, v, cache: AttentionCache, step: Step, valid) -> dict:
    """Keyword arguments of attention over columns."""
    share, means = step.attention, None
    common = dict(pinned=share.pinned, valid=valid, implementation=step.implementation)
    if share.block:
        means = block_means(k, v, cache.columns, step.layer, block=share.block, **common)
    shape = dict(group=share.group, scale=q.shape[-1] ** -0.5)
    return common | shape | dict(lse=cache.lse, residual=cache.residual, means=means)


def _choose_keys(q, k, cache: AttentionCache, step: Step, valid) -> Columns:
    """columns with this layer's lists of keys chosen anew, by the attention that they get, none of them padding or pinned."""
    share, lse = step.attention, cache.lse[step.layer]
    sides = step.sides if share.share_sides and valid is None else 1  # of which one may have more padding
    q, k, lse = (a[: len(a) // sides] for a in (q, k, lse))
    batch, tokens, heads, _ = q.shape
    groups = group_count(tokens, share.group)
    lucky, free = False, None
    if share.fixed_random is not None:
        lucky = jax.random.bernoulli(step.sample_key, share.fixed_random, (groups, tokens))
    if share.pinned is not None:
        ids, starts = share.pinned.ids, share.pinned.starts
        rows = jnp.searchsorted(starts[1:], jnp.arange(len(ids)), side="right")
        free = jnp.ones((1, groups, tokens), bool).at[0, rows, ids].set(False)
    if valid is not None:
        there = jnp.arange(tokens) < valid[:, None, None]
        free = jnp.broadcast_to(there, (batch, groups, tokens)) if free is None else free & there
    together = heads // head_portions(batch, heads, groups, tokens, q.dtype)

    def choose(i, columns):
        some = lambda a, axis: lax.dynamic_slice_in_dim(a, i * together, together, axis)
        options = dict(stride=share.query_stride, scale=q.shape[-1] ** -0.5, implementation=step.implementation)
        sums = column_sums(some(q, 2), some(k, 2), some(lse, 1), group=share.group, **options)
        return _choose(sums, columns, share, step, lucky, free, first=i * together, sides=sides)

    if together == heads:
        return choose(0, cache.columns)
    return lax.fori_loop(0, heads // together, choose, cache.columns)


def head_portions(batch: int, heads: int, groups: int, keys: int, dtype: jnp.dtype) -> int:
    """Number of head slices in which keys are chosen: the fewest whose scores, [B, H / slices, G, N], take at most SCORES bytes."""
    nbytes = batch * heads * groups * keys * jnp.dtype(dtype).itemsize
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (nbytes <= n * SCORES or n == heads))


class MlpWeights(NamedTuple):
    """The MLPs of all layers of a stack, a neuron a row."""

    fc1: jax.Array  # [L, F, D]
    b1: jax.Array  # [L, F]
    fc2: jax.Array  # [L, F, D]
    b2: jax.Array  # [L, D]


@jax.named_scope("feed_forward")
def feed_forward(
    x: jax.Array, mlp: MlpWeights, cache: LayerCache | Observer | None, step: Step
) -> tuple[jax.Array, LayerCache | Observer | None]:
    """gelu_tanh(x fc1^T + b1) fc2 + b2, exact or by its neurons as the step's phase says: [B, N, D]; and the cache.

    Args:
        x: [B, N, D].
        mlp: weights of the layer's whole stack.
        cache: of the layer's whole stack, or None or an Observer for a dense MLP.
        step: which phase, which layer.
    """
    if isinstance(cache, Observer):
        out, activations = _dense_with_activations(x, mlp, step)
        return out, cache.fed_forward(activations, out, step)
    if cache is None or cache.mlp is None:
        return _dense_mlp(x, mlp, None, step)[0], cache
    # In the order of MlpPhase; the neurons of a residual are chosen when it is made.
    if cache.mlp.activations is None:
        phases = (_dense_mlp, _full_residual, _delta_residual, _delta_residual)
    else:
        phases = (_dense_mlp, _full_activations, _select_delta, _delta_activations)
    out, updated = by_phase(step.mlp.phase, phases, x, mlp, cache.mlp, step)
    return out, cache.replace(mlp=updated)


def _dense_mlp(x, mlp: MlpWeights, cache: MlpCache | None, step: Step):
    return _dense_with_activations(x, mlp, step)[0], cache


def _dense_with_activations(x, mlp: MlpWeights, step: Step):
    fc1 = mlp.fc1[step.layer].T
    # Bias and GELU in the product's epilogue cost a copy of the weights, F D; apart from it a pass over the activations, B N F.
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    hidden = x @ fc1 if rows > width else product(x, fc1)
    activations = jax.nn.gelu(hidden + mlp.b1[step.layer], approximate=True)
    return product(activations, mlp.fc2[step.layer]) + mlp.b2[step.layer], activations


def _full_activations(x, mlp: MlpWeights, cache: MlpCache, step: Step):
    out, activations = _dense_with_activations(x, mlp, step)
    means = dict(layer=step.layer, implementation=step.implementation)
    mean, _ = group_mean_change(_mean_rows(x, step), mlp.fc1, mlp.b1, cache.group_mean, **means)
    cache = cache.replace(
        activations=store_activations(activations, cached=cache.activations, **means),
        out=cache.out.at[step.layer].set(out),
        group_mean=cache.group_mean.at[step.layer].set(mean),
    )
    return out, cache


def _select_delta(x, mlp: MlpWeights, cache: MlpCache, step: Step):
    means = dict(layer=step.layer, implementation=step.implementation)
    mean, change = group_mean_change(_mean_rows(x, step), mlp.fc1, mlp.b1, cache.group_mean, **means)
    columns = _choose(change, cache.columns, step.mlp, step)
    # Only the chosen neurons' means move on: what the others drift adds up until they are chosen.
    moved = store_group_mean(mean, columns, cached=cache.group_mean, **means)
    moved, columns = _together((moved, columns))
    return _delta_activations(x, mlp, cache.replace(columns=columns, group_mean=moved), step)


def _delta_activations(x, mlp: MlpWeights, cache: MlpCache, step: Step):
    tiling = _tiling(step)
    change, activations = column_fc1(x, mlp.fc1, mlp.b1, cache.columns, activations=cache.activations, **tiling)
    moved, out = move_column_fc2(change, mlp.fc2, cache.columns, out=cache.out, **tiling)
    moved, activations, columns = _together((moved, activations, cache.columns))
    return out, cache.replace(activations=activations, out=moved, columns=columns)


def _full_residual(x, mlp: MlpWeights, cache: MlpCache, step: Step):
    out, activations = _dense_with_activations(x, mlp, step)
    # A neuron matters by what it can add: the mean size of its activation times the length of its row.
    size = split_groups(jnp.abs(activations.astype(jnp.float32)), step.mlp.group).mean(-2)  # [B, G, F]
    score = size * jnp.linalg.norm(mlp.fc2[step.layer].astype(jnp.float32), axis=-1)
    columns, tiling = _choose(score.astype(x.dtype), cache.columns, step.mlp, step), _tiling(step)
    chosen, _ = column_fc1(x, mlp.fc1, mlp.b1, columns, **tiling)
    residual = store_fc2_residual(out, chosen, mlp.fc2, columns, residual=cache.out, **tiling)
    residual, columns = _together((residual, columns))
    return out, cache.replace(out=residual, columns=columns)


def _delta_residual(x, mlp: MlpWeights, cache: MlpCache, step: Step):
    tiling = _tiling(step)
    chosen, _ = column_fc1(x, mlp.fc1, mlp.b1, cache.columns, **tiling)
    return _together((column_fc2(chosen, mlp.fc2, cache.columns, residual=cache.out, **tiling), cache))


def _tiling(step: Step) -> dict:
    return dict(layer=step.layer, group=step.mlp.group, implementation=step.implementation)


def _mean_rows(x, step: Step):
    """The mean row of every group, [B, G, D]."""
    group, tokens = step.mlp.group, x.shape[1]
    rows = jnp.minimum(group, tokens - group * jnp.arange(group_count(tokens, group)))  # the last group may be ragged
    return (split_groups(x.astype(jnp.float32), group).sum(-2) / rows[:, None]).astype(x.dtype)


def _choose(scores, columns: Columns, share: Share, step: Step, lucky=False, free=None, first=0, sides=1) -> Columns:
    """columns with this layer's lists chosen anew: share.keep columns a group, random ones first, then by score [.., G, n].

    Args:
        lucky: bool [G, n], more columns that chance has picked.
        free: bool [B or 1, G, n], where only some columns may be chosen, of scores [B, H, G, n].
        first: the first head of the scores, where these are of some heads only.
        sides: of guidance, which get the same lists.
    """
    lucky |= jax.random.bernoulli(step.key, share.random, scores.shape[-2:])  # the same for all heads, and in any batch
    scores, keep = jnp.where(lucky, jnp.inf, scores), share.keep
    if free is not None:
        scores = jnp.where(free[:, None], scores, 0)
        keep = jnp.minimum(keep, free.sum(-1, dtype=jnp.int32))[:, None]
    capacity = min(columns.capacity, scores.shape[-1])  # one less, where an odd number is packed
    new = topk_columns(scores, keep, capacity=capacity, implementation=step.implementation)
    if columns.wrap is not None:
        new = pack_lists(new)
    if sides > 1:
        new = jax.tree.map(lambda a: jnp.concatenate([a] * sides), new)
    # Of neurons the third axis is the groups, and first 0.
    at = lambda stack: (step.layer, 0, first, *[0] * (stack.ndim - 3))
    return jax.tree.map(lambda stack, a: lax.dynamic_update_slice(stack, a[None], at(stack)), columns, new)


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x @ weights, [.., N, D] with a slice of a stack, and nothing else in the same call of cuBLAS.

    XLA hands cuBLAS a pointer into the stack only where the product is all there is: for a bias in its epilogue it would copy the
    slice first, 12 to 50 us at FLUX's size on an H100. Added in the kernel that reads the product next, the bias costs nothing.
    """
    return lax.optimization_barrier(x @ weights)


def _together(values):
    """Returns the values unchanged; none can be used until all are computed.

    A branch that updates one cache in place and hands on the lists that the update read must hand them on afterwards: scheduled
    the other way round, XLA copies the lists of all layers, in every branch of the switch and at every layer.
    """
    return lax.optimization_barrier(values)
