"""Sums of attention weights over groups of queries: how much attention each column gets.

Keys are the rows of a tile: the sum over queries is then a sum inside four neighbouring threads, and no values are read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.exp2 import LOG2E
from pallas_kernels.groups import check_group, group_count, split_groups

# Sums are cut at this, the largest power of two in bf16 and f32: logits may drift far above an old log-sum-exp.
LARGEST_SUM = 2.0**127
KEYS, QUERIES = 128, 128  # of a tile


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    group: int,
    scale: float,
    stride: int = 1,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """sum over the queries i of each group of exp(scale q_i . k_j - lse_i): [B, H, G, N], dtype of q.

    With lse of the same q and k this is the attention mass of every column; with that of an earlier step, its estimate in one
    pass (Chipmunk, section 4). Finite whatever the drift, in bf16 and f32.

    Args:
        q, k: [B, N, H, d], bf16 (any float for the reference).
        lse: [B, H, N], f32, natural logarithm.
        group: queries summed together, a multiple of 64; G = ceil(N / group).
        scale: of the logits, that of lse.
        stride: sum over every stride-th query only, an estimate in 1 / stride of the time. Staggered: the first of the first run,
            the second of the second, so that in a patch of stride x stride tokens they lie on its diagonal.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit, or a stride that does not divide the group.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    check_group(group)
    if stride < 1 or group % stride:
        raise ValueError(f"stride={stride}: expected a divisor of group={group}")
    batch, rows, heads, width = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, heads, width):
        raise ValueError(f"q {q.shape}, k {k.shape}: expected [B, N, H, d] with equal B, H and d")
    if lse.shape != (batch, heads, rows):
        raise ValueError(f"lse {lse.shape}: expected [B, H, N] = {(batch, heads, rows)}")
    implementation = dispatch.choose(implementation, dtype=q.dtype, head_dim=width)
    if implementation == "reference":
        return _reference(q, k, lse, group, scale, stride)
    groups, sampled = group_count(rows, group), group // stride
    part = min(QUERIES, sampled & -sampled)  # the largest power of two that divides them
    return pl.pallas_call(
        functools.partial(_body, part=part, group=group, scale=scale, stride=stride),
        grid=(group_count(k.shape[1], KEYS), heads, batch),
        name="column_sums",
        out_shape=jax.ShapeDtypeStruct((batch, heads, groups, k.shape[1]), q.dtype),
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=4, num_stages=2),
    )(q, k, lse)


def _reference(q, k, lse, group, scale, stride):
    chosen = jnp.arange(q.shape[1])
    chosen = chosen % stride == chosen // stride % stride
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    mass = jnp.where(chosen[:, None], jnp.exp(logits - lse[..., None]), 0)
    return jnp.minimum(split_groups(mass, group).sum(-2), LARGEST_SUM).astype(q.dtype)


def _body(q_ref, k_ref, lse_ref, sums_ref, *, part, group, scale, stride):
    h, b = pl.program_id(1), pl.program_id(2)
    keys_total, rows_total, width = k_ref.shape[1], q_ref.shape[1], k_ref.shape[3]
    groups_total, together = sums_ref.shape[2], QUERIES // part
    features = jnp.arange(width)[None, :]
    keys = pl.program_id(0) * KEYS + jnp.arange(KEYS)
    here = keys < keys_total
    known_keys = jnp.broadcast_to(here[:, None], (KEYS, width))
    k = plgpu.load(k_ref.at[b, keys[:, None], h, features], mask=known_keys, other=0)
    member, place = jnp.arange(QUERIES) // part, jnp.arange(QUERIES) % part

    def mass(first, start):
        """Of this program's keys, over sampled queries [start, start + part) of groups from first on."""
        run = start + place
        rows = (first + member) * group + run * stride + run % stride
        inside = rows < rows_total
        q = plgpu.load(
            q_ref.at[b, rows[:, None], h, features], mask=jnp.broadcast_to(inside[:, None], (QUERIES, width)), other=0
        )
        # A row that is not there weighs exp(-inf) = 0.
        shift = LOG2E * plgpu.load(lse_ref.at[b, h, rows], mask=inside, other=jnp.inf)
        # A fused multiply-add, an exponential and an addition each, no more: there are as many as in dense attention.
        weights = jnp.exp2(plgpu.dot(k, q.T) * (scale * LOG2E) - shift[None, :])
        # Apart, as Triton would spread a middle axis of one over the threads.
        return weights.sum(axis=1)[:, None] if together == 1 else weights.reshape(KEYS, together, part).sum(axis=2)

    def some_groups(i, carry):
        total = mass(i * together, 0)
        for start in range(part, group // stride, part):
            total += mass(i * together, start)
        groups = i * together + jnp.arange(together)
        known = here[:, None] & (groups < groups_total)[None, :]
        total = jnp.minimum(total, LARGEST_SUM).astype(sums_ref.dtype)
        plgpu.store(sums_ref.at[b, h, groups[None, :], keys[:, None]], total, mask=known)
        return carry

    lax.fori_loop(0, group_count(groups_total, together), some_groups, 0)
