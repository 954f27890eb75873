"""HunyuanVideo's transformer (Tencent, 2024): FLUX's blocks on [video, text] tokens, after a refiner of the text.

A token is a patch of latent pixels, 2 x 2 of one frame in the published model; its channels are in the order of the output:
channel, frame, row, column. The text stands after the video, so that what pads its end is past the last valid token.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, run_layers, stack_layers
from chipmunk_jax.model import Condition
from chipmunk_jax.models.blocks import (
    Embedder,
    Modulation,
    add_gated,
    grid_positions,
    layer_norm,
    merge_heads,
    time_embedding,
)
from chipmunk_jax.models.mmdit import MMDiT, MMDiTConfig
from chipmunk_jax.schedule import Step
from pallas_kernels import dense_attention


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig(MMDiTConfig):
    """Sizes of a HunyuanVideo transformer, named as FLUX's; the defaults are those of the published text-to-video model."""

    in_channels: int = 16  # of a latent pixel
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of a token
    depth: int = 20
    depth_single_blocks: int = 40
    refiner_depth: int = 2
    theta: float = 256.0

    def __post_init__(self):
        super().__post_init__()
        if len(self.patch_size) != 3:
            raise InputError(f"patch_size={self.patch_size}: expected frames, rows and columns of a token")

    @property
    def text_rows(self) -> tuple[int, int]:
        """Fewest and most rows of text: as many as the published model was trained with, or fewer."""
        return 1, 256

    @property
    def token_channels(self) -> int:
        """Values of a token."""
        return self.in_channels * math.prod(self.patch_size)


class HunyuanVideo(MMDiT):
    """Velocity of a noisy video, given text: dx/dt at time t, where t = 1 is noise and t = 0 the video.

    Conditions: "text" [B, T, context_in_dim]; "mask" [B, T], bool, True for the prompt and False for the padding after it,
    which is never read; "pooled" [B, vec_in_dim]; "guidance" [B], f32, the plain scale, where guidance_embed.
    """

    config_class = HunyuanVideoConfig
    prompted = ("text", "mask", "pooled")
    text_first = False

    @property
    def channels(self) -> int:
        """Values of a token."""
        return self.config.token_channels

    def text_embedder(self, **linear) -> "TokenRefiner":
        """The token refiner."""
        return TokenRefiner(self.config, **linear)

    def text_tokens(self, cond: Condition, t: jax.Array, step: Step | None) -> tuple[jax.Array, jax.Array]:
        """[B, T, D], and how many of them are the prompt's, i32 [B]."""
        return self.txt_in(cond["text"], cond["mask"], t, step), cond["mask"].sum(-1, dtype=jnp.int32)

    def positions(self, grid: tuple[int, ...]) -> np.ndarray:
        """(frame, row, column) of every token of a grid, in raster order, f32 [N, 3]."""
        return grid_positions(grid, axes=3)

    def conditions(self, tokens: int, text: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the conditions of one sample of N tokens and so many rows of text, without B; a letter is any number."""
        return super().conditions(tokens, text) | {"mask": (text,)}

    def check(self, noise: jax.Array, cond: Condition) -> None:
        """Raises InputError unless noise [B, N, C] and the conditions fit, and every mask is a prompt and then padding."""
        super().check(noise, cond)
        mask = np.asarray(cond["mask"])
        if (rows := np.flatnonzero(np.any(mask[:, 1:] & ~mask[:, :-1], axis=1))).size:
            raise InputError(
                f"condition mask: row {rows[0]} has a valid token behind padding, expected all padding at its end"
            )


class TokenRefiner(nnx.Module):
    """Text tokens [B, T, D] that have looked at one another, and know the time and their mean."""

    def __init__(self, config: HunyuanVideoConfig, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear = nnx.Linear(c.context_in_dim, c.hidden_size, **kw)
        self.time_in = Embedder(256, c.hidden_size, **kw)
        self.mean_in = Embedder(c.context_in_dim, c.hidden_size, **kw)
        self.blocks = stack_layers(lambda r: RefinerBlock(c, dtype, r), c.refiner_depth, rngs)

    def __call__(self, text: jax.Array, mask: jax.Array, t: jax.Array, step: Step | None) -> jax.Array:
        # Zeros in place of padding, once: whatever it held is in no sum, and its rows stay finite to the end.
        text = jnp.where(mask[..., None], text, 0)
        valid = jnp.maximum(mask.sum(-1, dtype=jnp.int32), 1)  # no prompt at all: one row of zeros
        mean = text.sum(1, dtype=jnp.float32) / valid[:, None]
        vec = jax.nn.silu(self.time_in(time_embedding(t)) + self.mean_in(mean))
        return run_layers(self.blocks, self.linear(text), None, vec, valid, step=step)[0]


class RefinerBlock(nnx.Module):
    """Attention among the valid text tokens, then an MLP; the time only gates them."""

    def __init__(self, config: HunyuanVideoConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, linear = config.hidden_size, partial(Linear, dtype=dtype, rngs=rngs)
        self.heads = config.num_heads
        self.modulation = Modulation(width, 2, dtype, rngs)
        self.norm1, self.norm1_bias = nnx.Param(jnp.ones(width, dtype)), nnx.Param(jnp.zeros(width, dtype))
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        self.norm2, self.norm2_bias = nnx.Param(jnp.ones(width, dtype)), nnx.Param(jnp.zeros(width, dtype))
        self.fc1, self.fc2 = linear(width, 4 * width), linear(4 * width, width)  # whatever mlp_ratio is

    @jax.named_scope("refiner_block")
    def __call__(self, x, vec, valid, cache, step):
        gates = jnp.split(self.modulation(vec), 2, axis=-1)  # [B, 1, D] each
        h = affine_norm(x, self.norm1, self.norm1_bias)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(self.qkv(h), 3, axis=-1))
        options = dict(scale=q.shape[-1] ** -0.5, implementation=step.implementation, valid=valid)
        x = add_gated(x, gates[0], self.proj(merge_heads(dense_attention(q, k, v, **options)[0])))
        h = affine_norm(x, self.norm2, self.norm2_bias)
        return add_gated(x, gates[1], self.fc2(jax.nn.silu(self.fc1(h)))), cache


def affine_norm(x: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
    """weight LayerNorm(x) + bias, computed in float32, in the dtype of x [B, T, D]."""
    return layer_norm(x, scale=weight[...].astype(jnp.float32), shift=bias[...].astype(jnp.float32))
