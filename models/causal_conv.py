"""Convolutions that look back in time and never ahead; and how a video goes through a network of them in chunks and in tiles.

A video [B, T, H, W, C] goes through in one pass or in chunks of frames: each convolution keeps the last frames that it saw (Past),
so the result is the same. Tiles of rows and columns are computed apart and blended: the result is nearly the same, in less memory.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class Past:
    """The frames before a chunk that each convolution of a network looks back on, in the order in which they are called.

    Attributes:
        first: whether the chunk is the first, with zeros before it.
        after: the same for the next chunk, complete once all convolutions were called.
    """

    def __init__(self, before: Sequence[jax.Array] | None = None):
        self.first, self.after = before is None, []
        self._before = iter(before or ())

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """x [B, T, ..] behind so many frames of the past, [B, frames + T, ..]."""
        shape = (x.shape[0], frames, *x.shape[2:])
        before = jnp.zeros(shape, x.dtype) if self.first else next(self._before)
        last = jnp.concatenate([before, x[:, -frames:]], axis=1)[:, -frames:]
        # Else XLA takes the last frames when the chunk is done, and keeps the inputs of all convolutions until then: of Wan2.1's
        # decoder with 8 frames of 720 x 1280 at once 24.8 GB, where 15.4 are enough (compiled for an H100).
        x, last = lax.optimization_barrier((x, last))
        self.after.append(last)
        return jnp.concatenate([before, x], axis=1)


class CausalConv(nnx.Module):
    """A convolution over time and space, [B, T, H, W, C] to [B, T, H, W, O], with zeros around each frame and the past before them.

    With a stride it gives one frame for so many.
    """

    def __init__(
        self,
        into: int,
        width: int,
        window: tuple[int, int, int],
        *,
        stride: int = 1,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*window, into, width), dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        kernel = self.kernel[...]
        return self.convolved(past.extend(x.astype(kernel.dtype), len(kernel) - self.stride))

    def convolved(self, x: jax.Array) -> jax.Array:
        """The same of x that has its past in front."""
        kernel = self.kernel[...]
        return convolve(x.astype(kernel.dtype), kernel, self.stride) + self.bias[...]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The convolution of x [B, T, H, W, C] and a kernel [t, rows, columns, C, O]: of every t frames, with zeros around each.

    It is one of images whose channels are those of t frames. XLA gives cuDNN 3-D convolutions with channels first, transposing
    before and after each; 2-D ones of bf16 with channels last, as they are here.
    """
    taps, height, width, into, out = kernel.shape
    batch, frames, rows, columns, _ = x.shape
    frames = (frames - taps) // stride + 1
    x = jnp.concatenate([x[:, tap::stride][:, :frames] for tap in range(taps)], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(height, width, taps * into, out)
    y = lax.conv_general_dilated(
        x.reshape(batch * frames, rows, columns, taps * into),
        kernel,
        window_strides=(1, 1),
        padding=((height // 2, height // 2), (width // 2, width // 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(batch, frames, rows, columns, out)


def in_chunks(function: Callable[[jax.Array, Past], jax.Array], x: jax.Array, frames: int) -> jax.Array:
    """function(x, past) of x [B, T, ..] in chunks of so many frames, joined along time.

    The first chunk takes what the others leave, 1 frame at least and `frames` at most. The others are one loop: compiled once.
    """
    start = 1 + (x.shape[1] - 1) % frames
    past = Past()
    first = function(x[:, :start], past)
    if start == x.shape[1]:
        return first

    def run_chunk(before, chunk):
        past = Past(before)
        y = function(chunk, past)
        return past.after, y

    chunks = jnp.moveaxis(x[:, start:].reshape(x.shape[0], -1, frames, *x.shape[2:]), 1, 0)
    _, rest = lax.scan(run_chunk, past.after, chunks)
    rest = jnp.moveaxis(rest, 0, 1)
    return jnp.concatenate([first, rest.reshape(x.shape[0], -1, *rest.shape[3:])], axis=1)


def in_tiles(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, tile: tuple[int, int], overlap: int, scale: int
) -> jax.Array:
    """function(x) of x [B, T, H, W, C] in tiles that overlap, blended linearly where they do: [B, F, scale H, scale W, O], f32.

    All tiles are equally large, so that they are one loop, compiled once; the last ones end at the border and overlap more.

    Args:
        function: of a tile [B, T, rows, columns, C] to [B, F, scale rows, scale columns, O].
        x: the whole.
        tile: its rows and columns in x, at most those of x.
        overlap: rows and columns of x that neighbours share, less than the tile's.
        scale: rows of the result for one of x.
    """
    tile = tuple(map(min, tile, x.shape[2:4]))
    rows, columns = (ramps(side, part, overlap, scale) for side, part in zip(x.shape[2:4], tile, strict=True))
    corners = [(top, left) for top in range(len(rows)) for left in range(len(columns))]
    starts = np.array([(rows[i][0], columns[j][0]) for i, j in corners], np.int32)
    weights = np.stack([rows[i][1][:, None] * columns[j][1] for i, j in corners])[..., None].astype(np.float32)

    def run_tile(start, weight):
        part = lax.dynamic_slice(x, (0, 0, start[0], start[1], 0), (*x.shape[:2], *tile, x.shape[-1]))
        return function(part).astype(jnp.float32) * weight

    def add_tile(whole, inputs):
        start, weight = inputs
        y = run_tile(start, weight)
        corner = (0, 0, scale * start[0], scale * start[1], 0)
        y = y + lax.dynamic_slice(whole, corner, y.shape)
        return lax.dynamic_update_slice(whole, y, corner), None

    shape = jax.eval_shape(run_tile, starts[0], weights[0]).shape
    whole = jnp.zeros((*shape[:2], scale * x.shape[2], scale * x.shape[3], shape[-1]), jnp.float32)
    return lax.scan(add_tile, whole, (starts, weights))[0]


def ramps(side: int, tile: int, overlap: int, scale: int) -> list[tuple[int, np.ndarray]]:
    """(start, weights [scale tile], f64) of the tiles along one side: at every pixel those of all tiles sum to 1.

    Two tiles share their overlap in linear ramps.
    """
    starts = [*range(0, side - tile, tile - overlap), side - tile]
    pixels = scale * tile
    # From its ends inwards a tile's share grows, but for those ends where the whole ends too.
    ramp = np.minimum(1, (np.arange(pixels) + 0.5) / max(1, scale * overlap))
    shares = [
        np.minimum(1 if start == 0 else ramp, 1 if start == side - tile else ramp[::-1]) * np.ones(pixels)
        for start in starts
    ]
    total = np.zeros(scale * side)
    for start, share in zip(starts, shares, strict=True):
        total[scale * start : scale * start + pixels] += share
    return [
        (start, share / total[scale * start : scale * start + pixels])
        for start, share in zip(starts, shares, strict=True)
    ]
