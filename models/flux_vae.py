"""FLUX.1's VAE (Black Forest Labs, 2024): a convolutional autoencoder, 8 x 8 pixels to one latent pixel of 16 channels.

Arrays are channels last, in the model's dtype; norms and softmax are in float32. In bf16 decoding 1024 x 1024 pixels takes 1.4 GB
beside weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.models.blocks import Component, GroupNorm, attend_pixels


@dataclass(frozen=True, kw_only=True)
class FluxVaeConfig:
    """Sizes of the VAE, named as diffusers' AutoencoderKL does; the defaults are FLUX.1's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # widths, from pixels to latents
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        sizes = (self.in_channels, self.out_channels, self.layers_per_block, self.latent_channels, self.norm_num_groups)
        if not self.block_out_channels or min(*sizes, *self.block_out_channels) < 1:
            raise InputError("a size below 1: expected at least 1 of every field")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise InputError(
                f"block_out_channels={self.block_out_channels}: expected multiples of norm_num_groups={self.norm_num_groups}"
            )
        if not self.scaling_factor > 0:
            raise InputError(f"scaling_factor={self.scaling_factor}: expected a number above 0")
        if not 0 <= self.shift_factor <= 1:  # of unit deviation, the latents of any VAE of this kind have means near 0
            raise InputError(f"shift_factor={self.shift_factor}: expected a number from 0 to 1")

    @property
    def compression(self) -> int:
        """Pixels a latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class FluxVae(Component):
    """Images as latents and back."""

    config_class = FluxVaeConfig

    def __init__(self, config: FluxVaeConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype, rngs)
        self.decoder = Decoder(config, dtype, rngs)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """The mean of the latents, normalised, [B, H / 8, W / 8, C], f32, of pixels [B, H, W, 3] from -1 to 1.

        Raises:
            InputError: another shape, or sides that are no multiples of 8.
        """
        c = self.config
        if (
            pixels.ndim != 4
            or pixels.shape[-1] != c.in_channels
            or any(n % c.compression or not n for n in pixels.shape[1:3])
        ):
            raise InputError(
                f"pixels {pixels.shape}: expected [B, H, W, {c.in_channels}], H and W multiples of {c.compression}"
            )
        mean, _ = jnp.split(self.encoder(pixels.astype(self.dtype)).astype(jnp.float32), 2, axis=-1)
        return (mean - c.shift_factor) * c.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pixels [B, 8 h, 8 w, 3], f32, mostly from -1 to 1, not clamped, of normalised latents [B, h, w, C].

        Raises:
            InputError: another shape.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[-1] != c.latent_channels:
            raise InputError(f"latents {latents.shape}: expected [B, h, w, {c.latent_channels}]")
        mean = latents.astype(jnp.float32) / c.scaling_factor + c.shift_factor
        return self.decoder(mean.astype(self.dtype)).astype(jnp.float32)


class Encoder(nnx.Module):
    """Pixels [B, H, W, 3] to means and log variances, [B, h, w, 2 C]."""

    def __init__(self, config: FluxVaeConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels
        self.conv_in = convolution(c.in_channels, widths[0], dtype, rngs)
        self.levels = nnx.List([])
        for i, (into, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            last = i == len(widths) - 1
            resample = None if last else Downsample(width, dtype, rngs)
            self.levels.append(Level([into] + [width] * c.layers_per_block, c.norm_num_groups, resample, dtype, rngs))
        self.mid = Mid(widths[-1], c.norm_num_groups, dtype, rngs)
        self.norm_out = GroupNorm(widths[-1], c.norm_num_groups)
        self.conv_out = convolution(widths[-1], 2 * c.latent_channels, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, C] to pixels [B, H, W, 3]."""

    def __init__(self, config: FluxVaeConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, widths = config, config.block_out_channels[::-1]
        self.conv_in = convolution(c.latent_channels, widths[0], dtype, rngs)
        self.mid = Mid(widths[0], c.norm_num_groups, dtype, rngs)
        self.levels = nnx.List([])
        for i, (into, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            last = i == len(widths) - 1
            resample = None if last else Upsample(width, dtype, rngs)
            self.levels.append(
                Level([into] + [width] * (c.layers_per_block + 1), c.norm_num_groups, resample, dtype, rngs)
            )
        self.norm_out = GroupNorm(widths[-1], c.norm_num_groups)
        self.conv_out = convolution(widths[-1], c.out_channels, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, and the way to the next."""

    def __init__(
        self, widths: Sequence[int], groups: int, resample: nnx.Module | None, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        pairs = pairwise(widths)
        self.blocks = nnx.List([ResBlock(into, width, groups, dtype, rngs) for into, width in pairs])
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Mid(nnx.Module):
    """Residual block, attention of all pixels, residual block."""

    def __init__(self, width: int, groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.block_1 = ResBlock(width, width, groups, dtype, rngs)
        self.attention = Attention(width, groups, dtype, rngs)
        self.block_2 = ResBlock(width, width, groups, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x)))


class ResBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, beside the input."""

    def __init__(self, into: int, width: int, groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(into, groups), convolution(into, width, dtype, rngs)
        self.norm2, self.conv2 = GroupNorm(width, groups), convolution(width, width, dtype, rngs)
        linear = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.shortcut = None if into == width else nnx.Linear(into, width, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Attention of every pixel to all, one head, beside the input [B, h, w, C]."""

    def __init__(self, width: int, groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(width, groups)
        self.qkv, self.proj = nnx.Linear(width, 3 * width, **linear), nnx.Linear(width, width, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        out = attend_pixels(*jnp.split(self.qkv(tokens), 3, axis=-1))
        return x + self.proj(out).reshape(x.shape)


class Downsample(nnx.Module):
    """Half the rows and columns, by a convolution that looks to the right and below."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = convolution(width, width, dtype, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the rows and columns, each doubled, then a convolution."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = convolution(width, width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def convolution(into: int, width: int, dtype: jnp.dtype, rngs: nnx.Rngs, **options) -> nnx.Conv:
    """3 x 3, of the same size unless options say otherwise."""
    return nnx.Conv(into, width, (3, 3), **{"padding": 1} | options, dtype=dtype, param_dtype=dtype, rngs=rngs)
