"""Queries, keys and values of an attention, ready for use, from one raw product: bias, RMS norm, rotation and layout in one pass.

    q = rotate(norm(x_q + b_q) * weight_q),   k likewise,   v = x_v + b_v

The norm is over each head apart or over all heads together, as the shape of its weight says. Left to XLA this is a kernel for each
norm, float32 arrays between them and the rotation, and copies that split q, k and v and join text and image: on an H100, 140 to
170 us a layer at FLUX's size, where one pass over the bytes takes 60.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch
from pallas_kernels.groups import group_count

EPSILON = 1e-6
# With 8 values of a row a thread, in loads and stores of 16 bytes, no layout goes through shared memory; two rows share a load of
# bias, norms and index. At 40 heads of 128 that is 159 registers, at 12 121, and 72 with a norm a head; four rows spill at 40.
ROWS = 2
COLUMNS = 1024  # of four warps


class Tile(NamedTuple):
    """The columns of q, of k and of v that a program reads: all that a norm needs, in pieces, as only powers of two are loaded.

    They stay in registers from the norm's sum to its product, so that memory is read once.
    """

    columns: int  # of a piece: of several heads, or a part of them
    pieces: int
    warps: int


class Projection(NamedTuple):
    """Tokens of one modality after the product with their qkv weights, and what is still to be done with them."""

    x: jax.Array  # [B, N, 3 H d]: q of all heads, then k, then v; without bias
    bias: jax.Array  # [L, 3 H d], of all layers: their slices would be copied, two microseconds each
    query_norm: jax.Array  # [L, d]: of each head; or [L, H d]: of all heads together
    key_norm: jax.Array  # as query_norm


def rotary_qkv(
    parts: Sequence[Projection],
    cos: jax.Array,
    sin: jax.Array,
    layer: jax.Array | int = 0,
    *,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v, [B, N, H, d] each, of the parts' tokens one after the other; q and k normalised and rotated.

    Computed in float32, rounded once. Differentiable, backward through the reference.

    Args:
        parts: of one modality each, bf16 (any float for the reference).
        cos, sin: [N, d], f32: with u at even and v at odd places, (u, v) becomes (u, v) cos + (v, u) sin; so the even places of
            sin are negative.
        layer: i32 scalar, which entry of biases and norms to use.
        implementation: see dispatch.choose.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    parts = tuple(parts)
    _check(parts, cos, sin)
    implementation = dispatch.choose(implementation, dtype=parts[0].x.dtype, head_dim=cos.shape[-1])
    run = _reference if implementation == "reference" else _compiled(implementation)
    return run(parts, cos, sin, jnp.asarray(layer, jnp.int32))


def _check(parts, cos, sin) -> None:
    if len({(part.x.shape[0], part.x.shape[-1], part.x.dtype, part.query_norm.shape[-1]) for part in parts}) != 1:
        found = ", ".join(f"{part.x.dtype.name} {part.x.shape}, norms {part.query_norm.shape}" for part in parts)
        raise ValueError(f"parts [{found}]: expected at least one, of equal batch, width, dtype and norms")
    tokens, width = sum(part.x.shape[1] for part in parts), cos.shape[-1]
    if cos.shape != (tokens, width) or sin.shape != cos.shape:
        raise ValueError(f"cos {cos.shape}, sin {sin.shape}: expected [N, d] with N = {tokens} tokens")
    for part in parts:
        if part.x.shape[-1] % (3 * width):
            raise ValueError(f"x {part.x.shape}: expected [B, N, 3 H d] with d = {width}")
        layers = part.bias.shape[0]
        norms = {part.query_norm.shape, part.key_norm.shape}
        fitting = [{(layers, n)} for n in (width, part.x.shape[-1] // 3)]
        if part.bias.shape != (layers, part.x.shape[-1]) or norms not in fitting:
            shapes = f"bias {part.bias.shape}, norms {part.query_norm.shape} {part.key_norm.shape}"
            raise ValueError(
                f"{shapes}: expected [L, 3 H d] and [L, d] or [L, H d] to fit x {part.x.shape}, d = {width}"
            )


def _reference(parts, cos, sin, layer):
    dtype, width = parts[0].x.dtype, cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # the same for all heads

    def normed(part: Projection):
        x = part.x.astype(jnp.float32) + part.bias[layer].astype(jnp.float32)
        q, k, v = jnp.split(x, 3, axis=-1)
        norms = part.query_norm[layer], part.key_norm[layer]
        q, k = (rms_norm(a.reshape(*a.shape[:2], -1, len(w)), w) for a, w in zip((q, k), norms, strict=True))
        return tuple(a.reshape(*x.shape[:2], -1, width) for a in (q, k, v))

    q, k, v = (jnp.concatenate(side, axis=1) for side in zip(*map(normed, parts), strict=True))
    return tuple(a.astype(dtype) for a in (rotate(q, cos, sin), rotate(k, cos, sin), v))


def rms_norm(x, weight):
    """x / rms(x) * weight over the last axis, f32."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight.astype(jnp.float32)


def rotate(x, cos, sin):
    """x [.., d], f32, with the two of every pair of its last axis turned."""
    return x * cos + x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape) * sin


def _compiled(implementation):
    run = jax.custom_vjp(functools.partial(_pallas, implementation=implementation))
    run.defvjp(
        lambda *args: (_pallas(*args, implementation=implementation), args),
        lambda args, gradients: jax.vjp(_reference, *args)[1](gradients),
    )
    return run


def _pallas(parts, cos, sin, layer, *, implementation):
    batch, _, width = parts[0].x.shape
    tokens, head_dim = cos.shape
    normed = parts[0].query_norm.shape[1]
    tile = _tile(width // 3, normed, head_dim)
    out = jax.ShapeDtypeStruct((batch, tokens, width // 3), parts[0].x.dtype)
    qkv = pl.pallas_call(
        functools.partial(_body, tile=tile, normed=normed),
        grid=(group_count(tokens, ROWS), width // (3 * tile.pieces * tile.columns), batch),
        name="rotary_qkv",
        out_shape=(out, out, out),
        interpret=implementation == "interpret",
        compiler_params=dispatch.compiler_params(num_warps=tile.warps, num_stages=1),
    )(*(array for part in parts for array in part), cos, sin, layer[None])
    return tuple(a.reshape(batch, tokens, -1, head_dim) for a in qkv)


def _tile(features: int, normed: int, head_dim: int) -> Tile:
    """The tile for norms over `normed` of all features."""
    columns = min(features & -features, max(COLUMNS, head_dim))  # the largest power of two that divides them
    return Tile(columns, max(1, normed // columns), warps=max(1, columns // 256))


def _body(*refs, tile, normed):
    *refs, cos_ref, sin_ref, layer_ref, q_ref, k_ref, v_ref = refs
    parts = [Projection(*refs[i : i + 4]) for i in range(0, len(refs), 4)]
    i, first, b = pl.program_id(0), pl.program_id(1) * tile.pieces * tile.columns, pl.program_id(2)
    layer = layer_ref[0]
    columns = jnp.arange(tile.columns)
    pieces = [first + n * tile.columns + columns for n in range(tile.pieces)]
    rows = i * ROWS + jnp.arange(ROWS)
    start = 0
    for part in parts:
        size = part.x.shape[1]

        # A tile that lies in one part alone, as almost all do, reads nothing of the others.
        @pl.when((i * ROWS < start + size) & ((i + 1) * ROWS > start))
        def _(part=part, start=start, size=size):
            inside = jnp.broadcast_to(((rows >= start) & (rows < start + size))[:, None], (ROWS, tile.columns))
            cos, sin = (
                plgpu.load(ref.at[rows[:, None], lax.rem(columns, ref.shape[1])[None, :]], mask=inside, other=0)
                for ref in (cos_ref, sin_ref)
            )

            def load(side):  # q, k, v: 0, 1, 2
                for piece in pieces:
                    place = side * q_ref.shape[2] + piece
                    x = plgpu.load(part.x.at[b, (rows - start)[:, None], place[None, :]], mask=inside, other=0)
                    yield x.astype(jnp.float32) + part.bias[layer, place].astype(jnp.float32)

            def store(ref, values):
                for piece, value in zip(pieces, values, strict=True):
                    at = ref.at[b, rows[:, None], piece[None, :]]
                    plgpu.store(at, value.astype(ref.dtype), mask=inside)

            for side, ref, norm in ((0, q_ref, part.query_norm), (1, k_ref, part.key_norm)):
                weights = (norm[layer, lax.rem(piece, normed)] for piece in pieces)
                store(ref, (_turn(x, cos, sin) for x in _normed(list(load(side)), weights, normed)))
            store(v_ref, load(2))

        start += size


def _normed(pieces, weights, normed):
    """rms_norm over every `normed` columns of the pieces side by side."""
    rows, columns = pieces[0].shape
    apart = (rows, columns // normed, normed) if columns > normed else (rows, columns)
    squares = sum(x * x for x in pieces).reshape(apart).sum(-1, keepdims=True)
    scale = lax.rsqrt(squares / normed + EPSILON)
    scaled = ((x.reshape(apart) * scale).reshape(x.shape) for x in pieces)
    return [x * weight.astype(jnp.float32) for x, weight in zip(scaled, weights, strict=True)]


def _turn(x, cos, sin):
    """rotate of a tile: a reversal does not lower here, but the other of each pair is also a sum of it and a zero."""
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2)
    odd = lax.broadcasted_iota(jnp.int32, pairs.shape, 2) == 1
    u, v = (jnp.where(place, pairs, 0).sum(-1, keepdims=True) for place in (~odd, odd))
    return x * cos + jnp.where(odd, u, v).reshape(x.shape) * sin
