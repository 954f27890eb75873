"""The VAE of Wan2.1 and Wan2.2-A14B (Alibaba, 2025): 4 frames of 8 x 8 pixels to one latent pixel of 16 channels.

The first frame has a latent frame of its own: F = 4 (T - 1) + 1. Every convolution over time is causal, so a video may go through
in chunks of frames. Arrays are channels last, in the model's dtype; norms and softmax are in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.models.blocks import Component, attend_pixels
from chipmunk_jax.models.causal_conv import CausalConv, Past, in_chunks, in_tiles

CHANNELS = 3  # of a pixel
WINDOW = (3, 3, 3)  # frames, rows and columns that a convolution sees
UNITS = (25, 30)  # see WanVae.decoding_bytes
FILLING = (
    90 * 160
)  # latent pixels that should fill a GPU, an estimate: a frame of 720 x 1280, each level a multiple of it


@dataclass(frozen=True, kw_only=True)
class WanVaeConfig:
    """Sizes of the VAE, named as diffusers' AutoencoderKLWan does; the defaults are Wan2.1's."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # widths from pixels to latents, in base_dim
    num_res_blocks: int = 2  # of a level of the encoder; the decoder has one more
    temperal_downsample: tuple[bool, ...] = (
        False,
        True,
        True,
    )  # whether time is halved too, after each level but the last
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self):
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.dim_mult or min(self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult) < 1:
            raise InputError("a size below 1: expected at least 1 of every field")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise InputError(
                f"temperal_downsample={self.temperal_downsample}: expected one value less than dim_mult={self.dim_mult}"
            )
        if any(width % 2 for width in self.widths[1:]):
            raise InputError(f"base_dim={self.base_dim}, dim_mult={self.dim_mult}: expected even widths")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise InputError(f"{name} of {len(getattr(self, name))} values: expected z_dim={self.z_dim}")
        if min(self.latents_std) <= 0:
            raise InputError(f"latents_std={self.latents_std}: expected numbers above 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, from pixels to latents."""
        return tuple(self.base_dim * n for n in self.dim_mult)

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels of a side) for one of the latents."""
        return 2 ** sum(self.temperal_downsample), 2 ** len(self.temperal_downsample)


class WanVae(Component):
    """Videos as latents and back."""

    config_class = WanVaeConfig

    def __init__(self, config: WanVaeConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype, rngs)
        self.decoder = Decoder(config, dtype, rngs)

    def encode(self, video: jax.Array, *, frames: int | None = 1) -> jax.Array:
        """The mean of the latents, normalised, [B, T, H / 8, W / 8, C], f32, of a video [B, F, H, W, 3] from -1 to 1.

        Args:
            video: whole; F = 4 (T - 1) + 1.
            frames: latent frames that are computed at once; None: all. The result is the same.

        Raises:
            InputError: another shape.
        """
        c, (time, side) = self.config, self.config.compression
        shape = video.shape
        if (
            len(shape) != 5
            or shape[-1] != CHANNELS
            or shape[1] % time != 1 % time
            or any(n % side or not n for n in shape[2:4])
        ):
            raise InputError(
                f"video {shape}: expected [B, F, H, W, {CHANNELS}], F a multiple of {time} and one, H and W multiples of {side}"
            )
        size = shape[1] if frames is None else time * check_frames(frames)
        mean = in_chunks(self.encoder, video.astype(self.dtype), size).astype(jnp.float32)[..., : c.z_dim]
        return (mean - np.float32(c.latents_mean)) / np.float32(c.latents_std)

    def decode(
        self, latents: jax.Array, *, frames: int | None = 1, tile: tuple[int, int] | None = None, overlap: int = 8
    ) -> jax.Array:
        """The video [B, F, 8 h, 8 w, 3], f32, clamped to [-1, 1], of normalised latents [B, T, h, w, C].

        Tiles change what comes out, as a pixel is attended to from all over its frame. Of random weights of Wan2.1's size (one
        frame of 24 x 32 latent pixels in tiles of 16 x 16, relative to the deviation of pixels) the root mean square of the
        change is 6 % with an overlap of 8, 8 % with one of 4, and 25 % with none.

        Args:
            latents: whole; F = 4 (T - 1) + 1.
            frames: latent frames that are computed at once, each 4 frames of the video; None: all. The result is the same.
            tile: rows and columns of latents that are computed at once, apart from the others; None: all.
            overlap: rows and columns that tiles share. portions() chooses all three.

        Raises:
            InputError: another shape, or tiles that do not fit.
        """
        c = self.config
        if latents.ndim != 5 or latents.shape[-1] != c.z_dim:
            raise InputError(f"latents {latents.shape}: expected [B, T, h, w, {c.z_dim}]")
        size = latents.shape[1] if frames is None else check_frames(frames)
        mean = latents.astype(jnp.float32) * np.float32(c.latents_std) + np.float32(c.latents_mean)
        decode = lambda z: jnp.clip(in_chunks(self.decoder, z, size).astype(jnp.float32), -1, 1)
        if tile is None:
            return decode(mean.astype(self.dtype))
        if not 0 <= overlap < min(tile):
            raise InputError(f"tile={tile}, overlap={overlap}: expected rows and columns above the overlap")
        return in_tiles(decode, mean.astype(self.dtype), tile, overlap, c.compression[1])

    def portions(self, shape: Sequence[int], room: float, *, overlap: int = 8) -> dict[str, Any]:
        """The arguments with which decode() takes no more than `room` bytes beside weights: chunks first, tiles if need be.

        Args:
            shape: of the latents, [B, T, h, w, C].
            room: bytes.
            overlap: rows and columns that tiles share, if any.

        Raises:
            InputError: there is no room even for small tiles.
        """
        _, length, *sides, _ = shape
        need = lambda frames, tile: self.decoding_bytes(shape, frames=frames, tile=tile)
        # Fewer pixels at once do not fill a GPU.
        most = max(1, min(length, FILLING // (sides[0] * sides[1])))
        if chunks := [n for n in range(most, 0, -1) if need(n, None) <= room]:
            return dict(frames=chunks[0], tile=None, overlap=overlap)
        cuts, tile = [1, 1], tuple(sides)
        while max(tile) > 2 * overlap:
            cuts[tile[1] >= tile[0]] += 1
            tile = tuple(-(-(side + (n - 1) * overlap) // n) for side, n in zip(sides, cuts, strict=True))
            if need(1, tile) <= room:
                return dict(frames=1, tile=tile, overlap=overlap)
        raise InputError(
            f"no room to decode {tuple(shape)} latents: this needs {need(1, tile) / 1e9:.1f} GB in the smallest tiles, where "
            f"{room / 1e9:.1f} GB are free"
        )

    def decoding_bytes(self, shape: Sequence[int], *, frames: int = 1, tile: tuple[int, int] | None = None) -> int:
        """Bytes that decode() takes at its peak beside weights and latents, what it returns included.

        The last level's activations are most of it: UNITS arrays as large as one frame with base_dim channels, for each
        convolution's past and for each latent frame at once. Compiled for an H100, Wan2.1's decoder takes from 93 to 99 % of it.
        """
        batch, length, *sides, _ = shape
        time, side = self.config.compression
        pixels = batch * side**2
        out = 4 * CHANNELS * (1 + time * (length - 1)) * pixels  # f32
        part = math.prod(tile or sides)
        past, each = UNITS
        arrays = (past + each * min(frames, length)) * self.config.base_dim * pixels * part
        kernels = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.decoder)))  # as cuDNN has them
        itemsize = jnp.dtype(self.dtype).itemsize
        tiles = out * part if tile else 0
        return out * math.prod(sides) + tiles + itemsize * (arrays + kernels) + out * part * itemsize // 4


class Encoder(nnx.Module):
    """A video [B, F, H, W, 3] to means and log variances, [B, T, h, w, 2 C]."""

    def __init__(self, config: WanVaeConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, widths, kw = config, config.widths, dict(dtype=dtype, rngs=rngs)
        self.conv_in = CausalConv(CHANNELS, c.base_dim, WINDOW, **kw)
        self.levels = nnx.List([])
        into = c.base_dim
        for width, time in zip(widths, (*c.temperal_downsample, None), strict=True):
            resample = None if time is None else Downsample(width, time, **kw)
            self.levels.append(Level([into] + [width] * c.num_res_blocks, resample, **kw))
            into = width
        self.mid = Mid(widths[-1], **kw)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * c.z_dim, WINDOW, **kw)
        self.quant = linear(2 * c.z_dim, 2 * c.z_dim, **kw)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.conv_in(x, past)
        for level in self.levels:
            x = level(x, past)
        x = self.mid(x, past)
        return self.quant(self.conv_out(jax.nn.silu(self.norm_out(x)), past))


class Decoder(nnx.Module):
    """Latents [B, T, h, w, C] to a video [B, F, H, W, 3]."""

    def __init__(self, config: WanVaeConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, widths, kw = config, config.widths[::-1], dict(dtype=dtype, rngs=rngs)
        self.quant = linear(c.z_dim, c.z_dim, **kw)
        self.conv_in = CausalConv(c.z_dim, widths[0], WINDOW, **kw)
        self.mid = Mid(widths[0], **kw)
        self.levels = nnx.List([])
        into = widths[0]
        for width, time in zip(widths, (*c.temperal_downsample[::-1], None), strict=True):
            resample = None if time is None else Upsample(width, time, **kw)
            self.levels.append(Level([into] + [width] * (c.num_res_blocks + 1), resample, **kw))
            into = width // 2
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], CHANNELS, WINDOW, **kw)

    def __call__(self, z: jax.Array, past: Past) -> jax.Array:
        x = self.mid(self.conv_in(self.quant(z), past), past)
        for level in self.levels:
            x = level(x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class Level(nnx.Module):
    """Residual blocks at one resolution, and the way to the next."""

    def __init__(self, widths: Sequence[int], resample: nnx.Module | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        pairs = pairwise(widths)
        self.blocks = nnx.List([ResBlock(into, width, dtype=dtype, rngs=rngs) for into, width in pairs])
        self.resample = resample

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        for block in self.blocks:
            x = block(x, past)
        return x if self.resample is None else self.resample(x, past)


class Mid(nnx.Module):
    """Residual block, attention within each frame, residual block."""

    def __init__(self, width: int, **kw: Any):
        self.block_1 = ResBlock(width, width, **kw)
        self.attention = Attention(width, **kw)
        self.block_2 = ResBlock(width, width, **kw)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x, past)), past)


class ResBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, beside the input."""

    def __init__(self, into: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, rngs=rngs)
        self.norm1, self.conv1 = Norm(into), CausalConv(into, width, WINDOW, **kw)
        self.norm2, self.conv2 = Norm(width), CausalConv(width, width, WINDOW, **kw)
        self.shortcut = None if into == width else linear(into, width, **kw)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)), past)
        h = self.conv2(jax.nn.silu(self.norm2(h)), past)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Attention of every pixel to all of its frame, one head, beside the input [B, T, h, w, C]."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = Norm(width)
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.norm(x).reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])
        out = attend_pixels(*jnp.split(self.qkv(tokens), 3, axis=-1))
        return x + self.proj(out).reshape(x.shape)


class Norm(nnx.Module):
    """scale x sqrt(C) / |x| for x [.., C], computed in and as float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        length = jnp.sqrt((y * y).sum(-1, keepdims=True))
        return y / jnp.maximum(length, 1e-12) * (self.scale[...] * y.shape[-1] ** 0.5)


class Downsample(nnx.Module):
    """Half the rows and columns, by a convolution that looks to the right and below; with `time`, then half the frames."""

    def __init__(self, width: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options = dict(strides=2, padding=((0, 1), (0, 1)))
        self.conv = nnx.Conv(width, width, (3, 3), **options, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv(width, width, (3, 1, 1), stride=2, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = each_frame(self.conv, x)
        return x if self.time_conv is None else self.halve(x, past)

    def halve(self, x: jax.Array, past: Past) -> jax.Array:
        """The first frame of the video as it is, then one of every two, which sees the frame before them, too."""
        x = past.extend(x, 1)
        if not past.first:
            return self.time_conv.convolved(x)
        x = x[:, 1:]
        return jnp.concatenate([x[:, :1], self.time_conv.convolved(x)], axis=1)


class Upsample(nnx.Module):
    """With `time`, twice the frames; then twice the rows and columns, each doubled, and a convolution to half the channels."""

    def __init__(self, width: int, time: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.time_conv = CausalConv(width, 2 * width, (3, 1, 1), dtype=dtype, rngs=rngs) if time else None
        self.conv = nnx.Conv(width, width // 2, (3, 3), padding=1, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        if self.time_conv is not None:
            x = self.double(x, past)
        return each_frame(self.conv, jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))

    def double(self, x: jax.Array, past: Past) -> jax.Array:
        """The first frame of the video as it is, then two of each one, which see zeros where the first would be."""
        alone = int(past.first)
        pairs = self.time_conv(x[:, alone:], past)
        pairs = pairs.reshape(*pairs.shape[:-1], 2, x.shape[-1])  # the channels of both, side by side
        pairs = jnp.moveaxis(pairs, -2, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return jnp.concatenate([x[:, :alone], pairs], axis=1)


def each_frame(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """A convolution of images, of every frame of a video [B, T, H, W, C]."""
    y = conv(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def linear(into: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A convolution of one pixel."""
    return nnx.Linear(into, width, dtype=dtype, param_dtype=dtype, rngs=rngs)


def check_frames(frames: int) -> int:
    """The latent frames at once.

    Raises:
        InputError: none.
    """
    if frames < 1:
        raise InputError(f"frames={frames}: expected at least 1")
    return frames
