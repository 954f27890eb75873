"""Wan2.1 and Wan2.2 transformer (Alibaba, 2025): blocks of self-attention over a video's tokens, attention to the text, and an MLP.

A token is a patch of latent pixels, 2 x 2 of one frame in the published models; its channels are in the order of the output: frame,
row, column, channel.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.delta import attend
from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, Mlp, run_layers, stack_layers
from chipmunk_jax.model import Condition, Stack
from chipmunk_jax.models.blocks import (
    Caches,
    Embedder,
    Network,
    Qkv,
    add_gated,
    check_sizes,
    grid_positions,
    layer_norm,
    merge_heads,
    modulate,
    rotary_table,
    sinusoids,
)
from chipmunk_jax.schedule import Step
from pallas_kernels import dense_attention, rotary_qkv
from pallas_kernels.rotary_qkv import rms_norm

CLIP_TOKENS = 257  # of an image, by CLIP's ViT-H/14: 16 x 16 patches and one
UMT5_WIDTH = 4096  # of the text encoder of all published models


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of a Wan transformer, named as in the original; the defaults are those of the 1.3 B text-to-video model."""

    dim: int = 1536  # D
    ffn_dim: int = 8960  # F
    freq_dim: int = 256
    in_dim: int = 16  # latent channels, with those of the image conditions
    out_dim: int = 16  # latent channels
    text_dim: int = 4096
    num_heads: int = 12
    num_layers: int = 30
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of a token
    image_dim: int | None = None  # of CLIP's image tokens; None: text to video, or Wan2.2's image to video
    theta: float = 10_000.0

    def __post_init__(self):
        check_sizes(self, counts=("num_layers",))
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise InputError(f"dim={self.dim}, num_heads={self.num_heads}: expected even heads of 6 or more")
        if self.in_dim < self.out_dim:
            raise InputError(f"in_dim={self.in_dim}, out_dim={self.out_dim}: expected at least as many in as out")

    @property
    def head_dim(self) -> int:
        """d."""
        return self.dim // self.num_heads

    @property
    def text_rows(self) -> tuple[int, int | None]:
        """Fewest and most rows of text: exactly 512 in all published models, zeros after the prompt, as zeros too are attended to.

        None, any number, in a model without UMT5: neither its config nor its weights say how many it was trained with.
        """
        return (512, 512) if self.text_dim == UMT5_WIDTH else (1, None)

    @property
    def patch(self) -> int:
        """Latent pixels of a token."""
        return math.prod(self.patch_size)

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Widths of a head that are rotated by (frame, row, column)."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


class Wan(Network):
    """Velocity of a noisy video, given text: dx/dt at time t, where t = 1 is noise and t = 0 the video."""

    config_class, depths = WanConfig, ("num_layers",)
    prompted, on_grid = ("text",), ("latents",)

    def __init__(self, config: WanConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        # What the original keeps in float32; a GPU would multiply in TF32.
        exact = dict(dtype=jnp.float32, param_dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, rngs=rngs)
        self.config, self.dtype, self.unroll = config, dtype, False
        self.patch_in = nnx.Linear(c.patch * c.in_dim, c.dim, **kw)
        self.text_in = nnx.Linear(c.text_dim, c.dim, **kw)
        self.text_out = nnx.Linear(c.dim, c.dim, **kw)
        self.image_in = ImageEmbedder(c, **kw) if c.image_dim else None
        self.time_in = Embedder(c.freq_dim, c.dim, **exact)
        self.time_projection = nnx.Linear(c.dim, 6 * c.dim, **exact)
        self.blocks = stack_layers(lambda rngs: Block(config, dtype, rngs), c.num_layers, rngs)
        self.final = nnx.Param(jnp.zeros((2, c.dim), jnp.float32))  # shift, scale
        self.head = nnx.Linear(c.dim, c.patch * c.out_dim, **kw)

    @property
    def channels(self) -> int:
        """Values of a token."""
        return self.config.patch * self.config.out_dim

    def embed(self, x: jax.Array, cond: Condition) -> jax.Array:
        """The tokens that enter the blocks, [B, N, D], of x [B, N, patch out_dim] and of the latents of an image."""
        if "latents" in cond:
            parts = (a.reshape(*a.shape[:2], self.config.patch, -1) for a in (x, cond["latents"]))
            x = jnp.concatenate(list(parts), axis=-1).reshape(*x.shape[:2], -1)
        return self.patch_in(x.astype(self.dtype))

    def signal(self, x: jax.Array, mods: dict[str, jax.Array]) -> jax.Array:
        """The modulated tokens that the first block attends with, [B, N, D], of those of embed()."""
        return modulate(x, *jnp.split(self.blocks.modulation[...][0] + mods["blocks"], 6, axis=-2)[:2])

    def tea_signal(self, x: jax.Array, mods: dict[str, jax.Array]) -> jax.Array:
        """The embedding of the time, f32 [B, 1, D], as TeaCache's polynomials of Wan take it."""
        return mods["final"]

    def hidden(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Condition,
        positions: jax.Array,
        cache: Caches | None,
        step: Step | None,
        mods: dict[str, jax.Array],
    ) -> tuple[jax.Array, Caches]:
        """The tokens after the last block, [B, N, D], and the caches.

        Args:
            x: [B, N, D] of embed(), tokens in any order that positions follow.
            t: [B], f32, 1 for noise and 0 for the video.
            cond: "text" [B, T, text_dim], all of whose rows are attended to (512 in the published models, zeros
                after the prompt); with image_dim also "image" [B, M, image_dim], tokens of CLIP; where in_dim is above
                out_dim also "latents" [B, N, patch (in_dim - out_dim)], mask and image in the order of x.
            positions: [N, 3], f32 or i32: (frame, row, column) of every token.
            cache: of chipmunk_jax.cache.zeros(self.stacks(..)), or None for the dense network.
            step: what this step computes; None for the dense network.
            mods: of self.modulations(t, cond).
        """
        text = self.text_out(jax.nn.gelu(self.text_in(cond["text"].astype(self.dtype)), approximate=True))
        image = self.image_in(cond["image"].astype(self.dtype)) if self.image_in else None
        args = (mods["blocks"], text, image, self.rotations(positions))
        x, blocks = run_layers(self.blocks, x, cache and cache["blocks"], *args, step=step, unroll=self.unroll)
        return x, {"blocks": blocks}

    def velocity(self, hidden: jax.Array, mods: dict[str, jax.Array]) -> jax.Array:
        """[B, N, patch out_dim], f32, of the tokens after the last block."""
        shift, scale = jnp.split(self.final[...] + mods["final"], 2, axis=-2)
        return self.head(modulate(hidden, shift, scale)).astype(jnp.float32)

    def modulations(self, t: jax.Array, cond: Condition) -> dict[str, jax.Array]:
        """What every block and the last layer add to their shifts, scales and gates, f32: [.., B, 6, D] and [.., B, 1, D]."""
        e = self.time_in(sinusoids(1000 * t.astype(jnp.float32), self.config.freq_dim))
        return {"blocks": self.time_projection(jax.nn.silu(e)).reshape(*e.shape[:-1], 6, -1), "final": e[..., None, :]}

    def rotations(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [N, d] each."""
        return rotary_table(positions, self.config.axes_dim, self.config.theta)

    def positions(self, grid: tuple[int, ...]) -> np.ndarray:
        """(frame, row, column) of every token of a grid, in raster order, f32 [N, 3]."""
        return grid_positions(grid, axes=3)

    def stacks(self, tokens: int, cond: Condition) -> dict[str, Stack]:
        """Sizes of the stack of layers for so many tokens, for the caches."""
        c = self.config
        sizes = dict(heads=c.num_heads, head_dim=c.head_dim, width=c.dim, mlp_width=c.ffn_dim)
        return {"blocks": Stack(layers=c.num_layers, tokens=tokens, mlp_tokens=tokens, **sizes)}

    def conditions(self, tokens: int, text: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the conditions of one sample of N tokens and so many rows of text, without B.

        Where text is a letter, any number of rows, so is the image's: the published models take one image or two.
        """
        c, shapes = self.config, {"text": (text, self.config.text_dim)}
        if c.image_dim:
            shapes |= {"image": ("M" if isinstance(text, str) else CLIP_TOKENS, c.image_dim)}
        if c.in_dim > c.out_dim:
            shapes |= {"latents": (tokens, c.patch * (c.in_dim - c.out_dim))}
        return shapes


class Block(nnx.Module):
    """Self-attention, cross-attention to text and image, MLP."""

    def __init__(self, config: WanConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, linear = config, partial(Linear, dtype=dtype, rngs=rngs)
        ones = lambda: nnx.Param(jnp.ones(c.dim, dtype))
        self.heads = c.num_heads
        self.modulation = nnx.Param(
            jnp.zeros((6, c.dim), jnp.float32)
        )  # shift, scale, gate of attention, then of the MLP
        self.qkv, self.proj = Qkv(c.dim, c.dim, dtype, rngs), linear(c.dim, c.dim)
        self.cross_norm = nnx.Param(jnp.ones(c.dim, jnp.float32))
        self.cross_norm_bias = nnx.Param(jnp.zeros(c.dim, jnp.float32))
        self.cross_q, self.cross_kv, self.cross_proj = (
            linear(c.dim, c.dim),
            linear(c.dim, 2 * c.dim),
            linear(c.dim, c.dim),
        )
        self.cross_query_norm, self.cross_key_norm = ones(), ones()
        self.image_kv = linear(c.dim, 2 * c.dim) if c.image_dim else None
        self.image_key_norm = ones() if c.image_dim else None
        self.mlp = Mlp(c.dim, c.ffn_dim, dtype=dtype, rngs=rngs)

    @jax.named_scope("block")
    def __call__(self, x, e, text, image, rope, cache, step):
        mods = jnp.split(self.modulation[...] + e, 6, axis=-2)  # [B, 1, D] each
        h = modulate(x, *mods[:2])
        qkv = rotary_qkv([self.qkv(h)], *rope, step.layer, implementation=step.implementation)
        out, cache = attend(*qkv, cache, step)
        x = add_gated(x, mods[2], self.proj(merge_heads(out)))
        h = layer_norm(x, scale=self.cross_norm[...], shift=self.cross_norm_bias[...])
        q = self.split(normed(self.cross_q(h), self.cross_query_norm))
        out = self.look(q, self.cross_kv(text), self.cross_key_norm, step)
        if self.image_kv is not None:
            out = out + self.look(q, self.image_kv(image), self.image_key_norm, step)
        x = x + self.cross_proj(merge_heads(out))
        out, cache = self.mlp(modulate(x, *mods[3:5]), cache, step)
        return add_gated(x, mods[5], out), cache

    def look(self, q, kv, key_norm, step):
        """Attention of all queries to a few keys, dense."""
        k, v = jnp.split(kv, 2, axis=-1)
        options = dict(scale=q.shape[-1] ** -0.5, implementation=step.implementation)
        return dense_attention(q, self.split(normed(k, key_norm)), self.split(v), **options)[0]

    def split(self, x):
        """[B, N, D] as [B, N, H, d]."""
        return x.reshape(*x.shape[:2], self.heads, -1)


class ImageEmbedder(nnx.Module):
    """CLIP's image tokens as tokens to attend to: norm, linear, GELU, linear, norm."""

    def __init__(self, config: WanConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        exact = dict(epsilon=1e-5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.norm_in = nnx.LayerNorm(config.image_dim, **exact)
        self.fc1 = nnx.Linear(config.image_dim, config.image_dim, **kw)
        self.fc2 = nnx.Linear(config.image_dim, config.dim, **kw)
        self.norm_out = nnx.LayerNorm(config.dim, **exact)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm_out(self.fc2(jax.nn.gelu(self.fc1(self.norm_in(x)), approximate=False))).astype(x.dtype)


def normed(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x / rms(x) * weight over all heads, computed in float32, in the dtype of x [B, N, D]."""
    # Else XLA would hand on float32, twice the memory, to what comes next.
    return jax.lax.optimization_barrier(rms_norm(x.astype(jnp.float32), weight[...]).astype(x.dtype))
