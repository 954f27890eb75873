"""What FLUX and HunyuanVideo share: double-stream and single-stream blocks on the tokens of an image or video and of its text.

Positions are an input, so the order of the tokens is the caller's choice.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.delta import attend
from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, Mlp, each_layer, run_layers, stack_layers
from chipmunk_jax.model import Condition, Stack
from chipmunk_jax.models.blocks import (
    Caches,
    Embedder,
    Modulation,
    Network,
    Qkv,
    add_gated,
    check_sizes,
    merge_heads,
    modulate,
    rotary_table,
    time_embedding,
)
from chipmunk_jax.schedule import Step
from pallas_kernels import rotary_qkv

Modulations = dict[str, list[jax.Array]]  # "double", "single": an array for each of a block's streams; "final": one


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Sizes that both networks have, named as in FLUX; the defaults are those of all published models."""

    in_channels: int
    vec_in_dim: int = 768  # pooled text
    context_in_dim: int = 4096  # text tokens
    hidden_size: int = 3072  # D
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int  # double-stream blocks
    depth_single_blocks: int
    axes_dim: tuple[int, ...] = (16, 56, 56)  # of a head, rotated by the three coordinates of a token
    theta: float
    guidance_embed: bool = True  # distilled guidance

    def __post_init__(self):
        check_sizes(self, counts=("depth", "depth_single_blocks", "refiner_depth"))
        if len(self.axes_dim) != 3 or any(width < 2 or width % 2 for width in self.axes_dim):
            raise InputError(
                f"axes_dim={self.axes_dim}: expected three even widths, one for each coordinate of a token"
            )
        if self.hidden_size != self.num_heads * self.head_dim:
            raise InputError(
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


class MMDiT(Network):
    """Double blocks on (image, text), single blocks on both as one sequence, and a final layer on the image alone.

    A network says where its text stands, how text becomes tokens (`text_embedder`, `text_tokens`), and where tokens are
    (`positions`). `img` is a video in HunyuanVideo: parameters have the names of FLUX's checkpoints.
    """

    depths = ("depth", "depth_single_blocks")
    prompted = ("text", "pooled")
    text_first: bool  # whether text stands before the image in the joint sequence, else after it

    def __init__(self, config: MMDiTConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.unroll = False  # True compiles every layer apart: for training, see run_layers
        self.img_in = nnx.Linear(self.channels, c.hidden_size, **kw)
        self.txt_in = self.text_embedder(**kw)
        self.time_in = Embedder(256, c.hidden_size, **kw)
        self.vector_in = Embedder(c.vec_in_dim, c.hidden_size, **kw)
        self.guidance_in = Embedder(256, c.hidden_size, **kw) if c.guidance_embed else None
        double = lambda r: DoubleBlock(c, dtype, r, text_first=self.text_first)
        self.double_blocks = stack_layers(double, c.depth, rngs)
        self.single_blocks = stack_layers(lambda r: SingleBlock(c, dtype, r), c.depth_single_blocks, rngs)
        self.final = Modulation(c.hidden_size, 2, dtype, rngs)
        self.img_out = nnx.Linear(c.hidden_size, self.channels, **kw)

    def text_embedder(self, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """The layers that text goes through before the blocks."""
        raise NotImplementedError

    def text_tokens(self, cond: Condition, t: jax.Array, step: Step | None) -> tuple[jax.Array, jax.Array | None]:
        """[B, T, D], and how many of them are valid, i32 [B]; None where all are, as they must be if text stands first."""
        raise NotImplementedError

    def embed(self, img: jax.Array, cond: Condition) -> jax.Array:
        """The tokens of the image or video that enter the blocks, [B, N, D], of img [B, N, channels]."""
        return self.img_in(img.astype(self.dtype))

    def signal(self, img: jax.Array, mods: Modulations) -> jax.Array:
        """The modulated tokens that the first block attends with, [B, N, D], of those of embed()."""
        return modulate(img, *jnp.split(mods["double"][0][0], 6, axis=-1)[:2])

    tea_signal = signal

    def hidden(
        self,
        img: jax.Array,
        t: jax.Array,
        cond: Condition,
        positions: jax.Array,
        cache: Caches | None,
        step: Step | None,
        mods: Modulations,
    ) -> tuple[jax.Array, Caches]:
        """The tokens of the image or video after the last block, [B, N, D], and the caches.

        Args:
            img: [B, N, D] of embed(), tokens in any order that positions follow.
            t: [B], f32, 1 (noise) to 0 (image).
            cond: of the names and shapes of self.conditions(..), B in front.
            positions: [N, 3], f32 or i32: coordinates of every token; text stands at (0, 0, 0).
            cache: of chipmunk_jax.cache.zeros(self.stacks(..)), or None for the dense network.
            step: what this step computes; None for the dense network.
            mods: of self.modulations(t, cond).
        """
        cache, tokens = cache or {"double": None, "single": None}, img.shape[1]
        txt, valid = self.text_tokens(cond, t, step)
        args = self.rotations(positions, txt.shape[1]), None if valid is None else tokens + valid
        run = partial(run_layers, step=step, unroll=self.unroll)
        (img, txt), double = run(self.double_blocks, (img, txt), cache["double"], *args, per_layer=mods["double"])
        x = jnp.concatenate([txt, img] if self.text_first else [img, txt], axis=1)
        first = self.config.depth
        x, single = run(self.single_blocks, x, cache["single"], *args, per_layer=mods["single"], first=first)
        return x[:, -tokens:] if self.text_first else x[:, :tokens], {"double": double, "single": single}

    def velocity(self, hidden: jax.Array, mods: Modulations) -> jax.Array:
        """[B, N, channels], f32, of the tokens after the last block."""
        return self.img_out(modulate(hidden, *jnp.split(mods["final"][0], 2, axis=-1))).astype(jnp.float32)

    def modulations(self, t: jax.Array, cond: Condition) -> Modulations:
        """Shifts, scales and gates of all layers, f32 [.., L, B, 1, 6 or 3 D], for times t [.., B].

        Their weights are a quarter of the model: computed for all steps at once, they are read once a sample and not in every
        step. Layers of the text itself that depend on the time are too few to gain from it.
        """
        vec = self.time_in(time_embedding(t)) + self.vector_in(cond["pooled"])
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(time_embedding(cond["guidance"]))
        vec = jax.nn.silu(vec)  # every modulation starts with it
        stacks = {"double": (self.double_blocks.img, self.double_blocks.txt), "single": (self.single_blocks,)}
        every = lambda stream: each_layer(stream.modulation, vec, axis=t.ndim - 1)
        return {name: [every(s) for s in streams] for name, streams in stacks.items()} | {"final": [self.final(vec)]}

    def rotations(self, positions: jax.Array, text_tokens: int) -> tuple[jax.Array, jax.Array]:
        """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [N + T, d] each; text is not turned."""
        rows = (text_tokens, 0) if self.text_first else (0, text_tokens)
        return rotary_table(jnp.pad(positions, (rows, (0, 0))), self.config.axes_dim, self.config.theta)

    def stacks(self, tokens: int, cond: Condition) -> dict[str, Stack]:
        """Sizes of the two stacks of layers for so many tokens of the image or video, for the caches."""
        c, joint = self.config, tokens + cond["text"].shape[1]
        sizes = dict(
            tokens=joint, heads=c.num_heads, head_dim=c.head_dim, width=c.hidden_size, mlp_width=c.mlp_width,
            text=(0, joint - tokens) if self.text_first else (tokens, joint),
        )  # fmt: skip
        return {
            "double": Stack(layers=c.depth, mlp_tokens=tokens, **sizes),  # text has its own, dense MLP
            "single": Stack(layers=c.depth_single_blocks, mlp_tokens=joint, **sizes),
        }

    def conditions(self, tokens: int, text: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the conditions of one sample of N tokens and so many rows of text, without B; a letter is any number."""
        shapes = {"text": (text, self.config.context_in_dim), "pooled": (self.config.vec_in_dim,)}
        return shapes | ({"guidance": ()} if self.config.guidance_embed else {})


class DoubleBlock(nnx.Module):
    """Image and text with weights of their own, and one attention over both.

    Text stands before the image, or after it where its end may be padding: `valid`, i32 [B] or None for all, counts the
    tokens that attention may look at.
    """

    def __init__(self, config: MMDiTConfig, dtype: jnp.dtype, rngs: nnx.Rngs, *, text_first: bool):
        self.img = Stream(config, dtype, rngs)
        self.txt = Stream(config, dtype, rngs)
        self.text_first = text_first

    @jax.named_scope("double_block")
    def __call__(self, tokens, img_mod, txt_mod, rope, valid, cache, step):
        img, txt = tokens
        img_mod, txt_mod = (jnp.split(mod, 6, axis=-1) for mod in (img_mod, txt_mod))  # [B, 1, D] each
        order = slice(None, None, 1 if self.text_first else -1)  # of (text, image)
        parts = self.txt.attention(modulate(txt, *txt_mod[:2])), self.img.attention(modulate(img, *img_mod[:2]))
        parts = parts[order]
        qkv = rotary_qkv(parts, *rope, step.layer, implementation=step.implementation)
        out, cache = attend(*qkv, cache, step, valid)  # [B, T + N, H, d]
        txt_out, img_out = jnp.split(out, [parts[0].x.shape[1]], axis=1)[order]
        img = add_gated(img, img_mod[2], self.img.proj(merge_heads(img_out)))
        txt = add_gated(txt, txt_mod[2], self.txt.proj(merge_heads(txt_out)))
        img_out, cache = self.img.mlp(modulate(img, *img_mod[3:5]), cache, step)
        txt_out, _ = self.txt.mlp(modulate(txt, *txt_mod[3:5]), None, step)
        return (add_gated(img, img_mod[5], img_out), add_gated(txt, txt_mod[5], txt_out)), cache


class Stream(nnx.Module):
    """The weights of one modality in a double block."""

    def __init__(self, config: MMDiTConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.hidden_size, 6, dtype, rngs)
        self.attention = Qkv(c.hidden_size, c.head_dim, dtype, rngs)
        self.proj = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(c.hidden_size, c.mlp_width, dtype=dtype, rngs=rngs)


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on all tokens. The original's linear1 is qkv and fc1, its linear2 proj and fc2."""

    def __init__(self, config: MMDiTConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.hidden_size, 3, dtype, rngs)
        self.qkv = Qkv(c.hidden_size, c.head_dim, dtype, rngs)
        # linear2's one bias is the MLP's b2.
        self.proj = Linear(c.hidden_size, c.hidden_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(c.hidden_size, c.mlp_width, dtype=dtype, rngs=rngs)

    @jax.named_scope("single_block")
    def __call__(self, x, mod, rope, valid, cache, step):
        shift, scale, gate = jnp.split(mod, 3, axis=-1)  # [B, 1, D] each
        h = modulate(x, shift, scale)
        qkv = rotary_qkv([self.qkv(h)], *rope, step.layer, implementation=step.implementation)
        attn_out, cache = attend(*qkv, cache, step, valid)
        mlp_out, cache = self.mlp(h, cache, step)
        return add_gated(x, gate, self.proj(merge_heads(attn_out)) + mlp_out), cache
