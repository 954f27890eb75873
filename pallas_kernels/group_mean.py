"""The mean pre-activation of every group of rows: how far each neuron's has moved, and the update of those that were chosen.

fc1 is linear, so the mean of its outputs is its output for the mean row: one row a group, and the time is that of reading fc1. The
change of it chooses neurons (Chipmunk, section 3).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.columns import Columns, covers
from pallas_kernels.groups import group_count

GROUPS, NEURONS, INNER = 64, 32, 64  # a program's tile: small, as many in flight read memory fastest
SLOTS = 1024  # of a list, that a program of store_group_mean takes


def group_mean_change(
    rows: jax.Array,
    fc1: jax.Array,
    b1: jax.Array,
    cached: jax.Array,
    layer: jax.Array | int = 0,
    *,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """mean = rows fc1[layer]^T + b1[layer], f32 [B, G, F], and |mean - cached[layer]|, in the dtype of rows.

    Args:
        rows: [B, G, D], the mean row of every group, bf16 (any float for the reference).
        fc1, b1: [L, F, D] and [L, F].
        cached: [L, B, G, F], f32.
        layer: i32 scalar, which entry of the stacked arrays to read.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    batch, groups, width = rows.shape
    neurons = fc1.shape[1]
    shape = (batch, groups, neurons)
    if fc1.shape[2:] != (width,) or b1.shape != fc1.shape[:2] or not covers(cached.shape[1:], shape):
        shapes = f"fc1 {fc1.shape}, b1 {b1.shape}, cached {cached.shape}"
        raise ValueError(f"{shapes}: expected [L, F, D], [L, F], [L, B, G, F] to fit rows {rows.shape}")
    implementation = dispatch.choose(implementation, dtype=rows.dtype)
    if implementation == "reference":
        mean = jnp.einsum("bgd,fd->bgf", rows, fc1[layer], preferred_element_type=jnp.float32)
        mean += b1[layer].astype(jnp.float32)
        return mean, jnp.abs(mean - cached[layer, :batch]).astype(rows.dtype)
    return pl.pallas_call(
        _change_body,
        grid=(group_count(neurons, NEURONS), group_count(groups, GROUPS), batch),
        name="group_mean_change",
        out_shape=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, rows.dtype)),
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=4),
    )(rows, fc1, b1, cached, jnp.asarray(layer, jnp.int32)[None])


def _change_body(rows_ref, fc1_ref, b1_ref, cached_ref, layer_ref, mean_ref, change_ref):
    b, layer = pl.program_id(2), layer_ref[0]
    neurons = pl.program_id(0) * NEURONS + jnp.arange(NEURONS)
    groups = pl.program_id(1) * GROUPS + jnp.arange(GROUPS)
    neurons_here, groups_here = neurons < fc1_ref.shape[1], groups < rows_ref.shape[1]
    width = rows_ref.shape[2]

    def multiply(t, acc):
        features = t * INNER + jnp.arange(INNER)
        known = (features < width)[None, :]
        load = lambda ref, at, mask: plgpu.load(ref.at[(*at, features[None, :])], mask=mask & known, other=0)
        weights = load(fc1_ref, (layer, neurons[:, None]), neurons_here[:, None])
        return acc + plgpu.dot(load(rows_ref, (b, groups[:, None]), groups_here[:, None]), weights.T)

    acc = lax.fori_loop(0, group_count(width, INNER), multiply, jnp.zeros((GROUPS, NEURONS), jnp.float32))
    mean = acc + plgpu.load(b1_ref.at[layer, neurons], mask=neurons_here, other=0).astype(jnp.float32)[None, :]
    at, here = (b, groups[:, None], neurons[None, :]), groups_here[:, None] & neurons_here[None, :]
    old = plgpu.load(cached_ref.at[layer, *at], mask=here, other=0)
    plgpu.store(mean_ref.at[at], mean, mask=here)
    plgpu.store(change_ref.at[at], jnp.abs(mean - old).astype(change_ref.dtype), mask=here)


def store_group_mean(
    mean: jax.Array,
    columns: Columns,
    layer: jax.Array | int,
    *,
    cached: jax.Array,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """cached [L, B, G, F], in place, with the listed entries of cached[layer] taken from mean.

    Args:
        mean: [B, G, F], f32.
        columns: lists [L, B, G, K] of neurons, not packed.
        layer: i32 scalar, which entry of the stacked arrays to use.
        cached: [L, B, G, F], f32.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    if not covers(cached.shape[1:], mean.shape):
        raise ValueError(f"cached {cached.shape}: expected [L, B, G, F] to fit mean {mean.shape}")
    columns.check(mean.shape[:-1], f"mean {mean.shape}")
    implementation = dispatch.choose(implementation, dtype=jnp.bfloat16)  # no matrix units here: any dtype goes
    if implementation == "reference":
        # Unlisted slots write past the last neuron, where a scatter drops them.
        ids, listed = columns.listed(layer, len(mean))
        where = jnp.where(listed, ids, mean.shape[-1])
        row = lambda old, new, ids: old.at[ids].set(new[jnp.minimum(ids, new.size - 1)], mode="drop")
        own = cached[layer, : len(mean)]
        return cached.at[layer, : len(mean)].set(jax.vmap(jax.vmap(row))(own, mean, where))
    return pl.pallas_call(
        _store_body,
        grid=(group_count(columns.capacity, SLOTS), mean.shape[1], mean.shape[0]),
        name="store_group_mean",
        out_shape=jax.ShapeDtypeStruct(cached.shape, cached.dtype),
        input_output_aliases={4: 0},  # cached, the fifth array: lists that are not packed are two
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=2),
    )(mean, columns, jnp.asarray(layer, jnp.int32)[None], cached)


def _store_body(mean_ref, columns, layer_ref, _, cached_ref):
    indices_ref, counts_ref, _ = columns
    g, b, layer = pl.program_id(1), pl.program_id(2), layer_ref[0]
    slots = pl.program_id(0) * SLOTS + jnp.arange(SLOTS)
    listed = slots < counts_ref[layer, b, g]
    neurons = plgpu.load(indices_ref.at[layer, b, g, jnp.minimum(slots, columns.capacity - 1)])
    # Masked lanes point past the last neuron: the interpreter scatters them too, and must not meet a written one.
    neurons = jnp.where(listed, neurons, mean_ref.shape[2] + slots)
    mean = plgpu.load(mean_ref.at[b, g, neurons], mask=listed, other=0)
    plgpu.store(cached_ref.at[layer, b, g, neurons], mean, mask=listed)
