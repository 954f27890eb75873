"""HunyuanVideo's transformer (Tencent, 2024): FLUX's blocks on [video, text] tokens, behind a refiner of the text.

A token is a patch of latent pixels, 2 x 2 of one frame in the published model; its channels are in the order of the output:
channel, frame, row, column. The text stands behind the video, so that what pads its end is past the last valid token.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.layers import Linear, run_layers, stack_layers
from chipmunk_jax.model import Stack
from chipmunk_jax.models.flux import (
    DoubleBlock,
    Embedder,
    Flux,
    Modulation,
    Modulations,
    Network,
    SingleBlock,
    add_gated,
    check_conditions,
    check_guidance,
    check_text,
    grid_positions,
    layer_norm,
    merge_heads,
    rotary_table,
    time_embedding,
)
from chipmunk_jax.schedule import Step
from pallas_kernels import dense_attention


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig:
    """Sizes of a HunyuanVideo transformer, named as FLUX's; the defaults are those of the published text-to-video model."""

    in_channels: int = 16  # of a latent pixel
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of a token
    vec_in_dim: int = 768  # pooled text
    context_in_dim: int = 4096  # text tokens
    hidden_size: int = 3072  # D
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 20  # double-stream blocks
    depth_single_blocks: int = 40
    refiner_depth: int = 2
    axes_dim: tuple[int, ...] = (16, 56, 56)  # of a head, rotated by (frame, row, column)
    theta: float = 256.0
    guidance_embed: bool = True  # distilled guidance

    def __post_init__(self):
        for name in ("patch_size", "axes_dim"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size}: expected frames, rows and columns of a token")
        if len(self.axes_dim) != 3 or any(width < 2 or width % 2 for width in self.axes_dim):
            raise ValueError(f"axes_dim={self.axes_dim}: expected three even widths, of frame, row and column")
        if self.hidden_size != self.num_heads * self.head_dim:
            raise ValueError(
                f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, axes_dim={self.axes_dim}: "
                "expected hidden_size = num_heads * sum(axes_dim)"
            )

    @property
    def head_dim(self) -> int:
        """d."""
        return sum(self.axes_dim)

    @property
    def mlp_width(self) -> int:
        """F."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def text_rows(self) -> int:
        """Rows of text that the published model was trained with, at most."""
        return 256

    @property
    def token_channels(self) -> int:
        """Channels of a token."""
        return self.in_channels * math.prod(self.patch_size)


class HunyuanVideo(Network):
    """Velocity of a noisy video, given text: dx/dt at time t, where t = 1 is noise and t = 0 the video."""

    prompted, on_grid = ("text", "mask", "pooled"), ()  # see chipmunk_jax.model.Model

    def __init__(self, config: HunyuanVideoConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config, self.dtype, self.unroll = config, dtype, False
        self.img_in = nnx.Linear(c.token_channels, c.hidden_size, **kw)
        self.txt_in = TokenRefiner(c, **kw)
        self.time_in = Embedder(256, c.hidden_size, **kw)
        self.vector_in = Embedder(c.vec_in_dim, c.hidden_size, **kw)
        self.guidance_in = Embedder(256, c.hidden_size, **kw) if c.guidance_embed else None
        self.double_blocks = stack_layers(lambda r: DoubleBlock(c, dtype, r, text_first=False), c.depth, rngs)
        self.single_blocks = stack_layers(lambda r: SingleBlock(c, dtype, r), c.depth_single_blocks, rngs)
        self.final = Modulation(c.hidden_size, 2, dtype, rngs)
        self.img_out = nnx.Linear(c.hidden_size, c.token_channels, **kw)

    def hidden(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: dict[str, jax.Array],
        positions: jax.Array,
        cache: dict[str, LayerCache] | None,
        step: Step | None,
        mods: Modulations,
    ) -> tuple[jax.Array, dict[str, LayerCache | None]]:
        """The video's tokens behind the last block, [B, N, D], and the caches.

        Args:
            x: [B, N, token_channels], tokens in any order that positions follow.
            t: [B], f32, 1 (noise) to 0 (video).
            cond: "text" [B, T, context_in_dim]; "mask" [B, T], bool, True for the prompt and False for the padding behind it,
                which is never read; "pooled" [B, vec_in_dim]; "guidance" [B], f32, the plain scale, where guidance_embed.
            positions: [N, 3], f32 or i32: (frame, row, column) of every token.
            cache: of chipmunk_jax.cache.zeros(self.stacks(..)), or None for the dense network.
            step: what this step computes; None for the dense network.
            mods: of self.modulations(t, cond).
        """
        cache, tokens = cache or {"double": None, "single": None}, x.shape[1]
        text = self.txt_in(cond["text"], cond["mask"], t, step)
        x = self.img_in(x.astype(self.dtype))
        args = self.rotations(positions, text.shape[1]), tokens + cond["mask"].sum(-1, dtype=jnp.int32)
        run = partial(run_layers, step=step, unroll=self.unroll)
        (x, text), double = run(self.double_blocks, (x, text), cache["double"], *args, per_layer=mods["double"])
        x, first = jnp.concatenate([x, text], axis=1), self.config.depth
        x, single = run(self.single_blocks, x, cache["single"], *args, per_layer=mods["single"], first=first)
        return x[:, :tokens], {"double": double, "single": single}

    # Both networks have these layers, under these names; the text's own layers are far too few to gain from it.
    modulations, velocity = Flux.modulations, Flux.velocity

    def stacks(self, tokens: int, cond: dict[str, jax.Array]) -> dict[str, Stack]:
        """Sizes of the two stacks of layers for so many video tokens, for the caches."""
        return {
            name: stack.replace(text=(tokens, stack.tokens)) for name, stack in Flux.stacks(self, tokens, cond).items()
        }

    def rotations(self, positions: jax.Array, text_tokens: int) -> tuple[jax.Array, jax.Array]:
        """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [N + T, d] each; text is not turned."""
        return rotary_table(jnp.pad(positions, ((0, text_tokens), (0, 0))), self.config.axes_dim, self.config.theta)

    def positions(self, grid: tuple[int, int, int]) -> np.ndarray:
        """(frame, row, column) of every token of a grid, in raster order, f32 [N, 3]."""
        return grid_positions(grid, axes=3)

    def check(self, noise: jax.Array, cond: dict[str, jax.Array]) -> None:
        """Raises ValueError unless noise [B, N, C] and the conditions fit."""
        c, batch = self.config, noise.shape[0]
        if noise.shape[-1] != c.token_channels:
            raise ValueError(f"noise {noise.shape}: expected {c.token_channels} channels a token")
        shapes = {"text": (batch, "T", c.context_in_dim), "mask": (batch, "T"), "pooled": (batch, c.vec_in_dim)}
        check_conditions(cond, shapes | ({"guidance": (batch,)} if c.guidance_embed else {}))
        if cond["mask"].dtype != bool:
            raise ValueError(f"condition mask {cond['mask'].dtype}: expected bool")
        check_text(cond["text"], most=c.text_rows)
        check_guidance(cond)
        mask = np.asarray(cond["mask"])
        if (rows := np.flatnonzero(np.any(mask[:, 1:] & ~mask[:, :-1], axis=1))).size:
            raise ValueError(
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
