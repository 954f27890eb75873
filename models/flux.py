"""FLUX.1 transformer (Black Forest Labs, 2024): 19 double-stream and 38 single-stream blocks on [text, image] tokens.

Config fields are named as in the original. Positions are an input, so the order of the tokens is the caller's choice.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.delta import attend, product
from chipmunk_jax.layers import Linear, Mlp, Stacked, each_layer, run_layers, stack_layers
from chipmunk_jax.model import Stack
from chipmunk_jax.schedule import Step
from pallas_kernels import rotary_qkv
from pallas_kernels.rotary_qkv import Projection

Modulations = dict[str, list[jax.Array]]  # "double", "single": an array for each of a block's streams; "final": one


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of a FLUX transformer; the defaults are FLUX.1-dev."""

    in_channels: int = 64  # of a token: 16 latent channels x a 2x2 patch
    vec_in_dim: int = 768  # pooled text
    context_in_dim: int = 4096  # text tokens
    hidden_size: int = 3072  # D
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # of a head, rotated by (index, row, column)
    theta: int = 10_000
    guidance_embed: bool = True  # False: FLUX.1-schnell

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if len(self.axes_dim) != 3 or any(width < 2 or width % 2 for width in self.axes_dim):
            raise ValueError(f"axes_dim={self.axes_dim}: expected three even widths, of index, row and column")
        if self.hidden_size != self.num_heads * sum(self.axes_dim):
            raise ValueError(
                f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, axes_dim={self.axes_dim}: "
                "expected hidden_size = num_heads * sum(axes_dim)"
            )

    @property
    def mlp_width(self) -> int:
        """F."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def text_rows(self) -> int:
        """Rows of text that the published model of this kind was trained with, at most."""
        return 512 if self.guidance_embed else 256


class Network(nnx.Module):
    """A network of blocks and a final layer."""

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: dict[str, jax.Array],
        positions: jax.Array,
        cache: dict[str, LayerCache] | None = None,
        step: Step | None = None,
        modulations: Any = None,
    ) -> tuple[jax.Array, dict[str, LayerCache | None]]:
        """velocity [B, N, C], f32, and the caches; modulations are those of self.modulations(t, cond), the rest as in hidden()."""
        modulations = modulations or self.modulations(t, cond)
        hidden, cache = self.hidden(x, t, cond, positions, cache, step, modulations)
        return self.velocity(hidden, modulations), cache


class Flux(Network):
    """Velocity of a noisy image, given text: dx/dt at time t, where t = 1 is noise and t = 0 the image."""

    prompted, on_grid = ("text", "pooled"), ()  # see chipmunk_jax.model.Model

    def __init__(self, config: FluxConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.unroll = False  # True compiles every layer apart: for training, see run_layers
        self.img_in = nnx.Linear(c.in_channels, c.hidden_size, **kw)
        self.txt_in = nnx.Linear(c.context_in_dim, c.hidden_size, **kw)
        self.time_in = Embedder(256, c.hidden_size, **kw)
        self.vector_in = Embedder(c.vec_in_dim, c.hidden_size, **kw)
        self.guidance_in = Embedder(256, c.hidden_size, **kw) if c.guidance_embed else None
        self.double_blocks = stack_layers(lambda r: DoubleBlock(c, dtype, r), c.depth, rngs)
        self.single_blocks = stack_layers(lambda r: SingleBlock(c, dtype, r), c.depth_single_blocks, rngs)
        self.final = Modulation(c.hidden_size, 2, dtype, rngs)
        self.img_out = nnx.Linear(c.hidden_size, c.in_channels, **kw)

    def hidden(
        self,
        img: jax.Array,
        t: jax.Array,
        cond: dict[str, jax.Array],
        positions: jax.Array,
        cache: dict[str, LayerCache] | None,
        step: Step | None,
        mods: Modulations,
    ) -> tuple[jax.Array, dict[str, LayerCache | None]]:
        """The image's tokens behind the last block, [B, N, D], and the caches.

        Args:
            img: [B, N, in_channels], tokens in any order.
            t: [B], f32, 1 (noise) to 0 (image).
            cond: "text" [B, T, context_in_dim]; "pooled" [B, vec_in_dim]; "guidance" [B], f32, where guidance_embed.
            positions: [N, 3], f32 or i32: (index, row, column) of every image token; text stands at (0, 0, 0).
            cache: of chipmunk_jax.cache.zeros(self.stacks(..)), or None for the dense network.
            step: what this step computes; None for the dense network.
            mods: of self.modulations(t, cond).
        """
        cache = cache or {"double": None, "single": None}
        img, txt = self.img_in(img.astype(self.dtype)), self.txt_in(cond["text"].astype(self.dtype))
        args = self.rotations(positions, txt.shape[1]), None  # all of the text is valid
        run = partial(run_layers, step=step, unroll=self.unroll)
        (img, txt), double = run(self.double_blocks, (img, txt), cache["double"], *args, per_layer=mods["double"])
        x, first = jnp.concatenate([txt, img], axis=1), self.config.depth
        x, single = run(self.single_blocks, x, cache["single"], *args, per_layer=mods["single"], first=first)
        return x[:, txt.shape[1] :], {"double": double, "single": single}

    def velocity(self, hidden: jax.Array, mods: Modulations) -> jax.Array:
        """[B, N, in_channels], f32, of the tokens behind the last block."""
        return self.img_out(modulate(hidden, *jnp.split(mods["final"][0], 2, axis=-1))).astype(jnp.float32)

    def modulations(self, t: jax.Array, cond: dict[str, jax.Array]) -> Modulations:
        """Shifts, scales and gates of all layers: all that the time t [.., B] has a say in, f32 [.., L, B, 1, 6 or 3 D].

        Their weights are a quarter of the model. For all steps at once they are read once a sample, and not in every step.
        """
        vec = self.time_in(time_embedding(t)) + self.vector_in(cond["pooled"])
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(time_embedding(cond["guidance"]))
        vec = jax.nn.silu(vec)  # every modulation starts with it
        stacks = {"double": (self.double_blocks.img, self.double_blocks.txt), "single": (self.single_blocks,)}
        every = lambda stream: each_layer(stream.modulation, vec, axis=t.ndim - 1)
        return {name: [every(s) for s in streams] for name, streams in stacks.items()} | {"final": [self.final(vec)]}

    def rotations(self, positions: jax.Array, text_tokens: int) -> tuple[jax.Array, jax.Array]:
        """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [T + N, d] each."""
        return rotary_table(jnp.pad(positions, ((text_tokens, 0), (0, 0))), self.config.axes_dim, self.config.theta)

    def positions(self, grid: tuple[int, int]) -> np.ndarray:
        """(0, row, column) of every image token of a grid (rows, columns), in raster order, f32 [N, 3]."""
        return np.pad(grid_positions(grid, axes=2), ((0, 0), (1, 0)))

    def stacks(self, tokens: int, cond: dict[str, jax.Array]) -> dict[str, Stack]:
        """Sizes of the two stacks of layers for so many image tokens, for the caches."""
        c, joint = self.config, tokens + cond["text"].shape[1]
        sizes = dict(
            tokens=joint, heads=c.num_heads, head_dim=sum(c.axes_dim), width=c.hidden_size, mlp_width=c.mlp_width,
            text=(0, joint - tokens),
        )  # fmt: skip
        return {
            "double": Stack(layers=c.depth, mlp_tokens=tokens, **sizes),  # text has its own, dense MLP
            "single": Stack(layers=c.depth_single_blocks, mlp_tokens=joint, **sizes),
        }

    def check(self, noise: jax.Array, cond: dict[str, jax.Array]) -> None:
        """Raises ValueError unless noise [B, N, C] and the conditions fit."""
        c, batch = self.config, noise.shape[0]
        if noise.shape[-1] != c.in_channels:
            raise ValueError(f"noise {noise.shape}: expected {c.in_channels} channels a token")
        shapes = {"text": (batch, "T", c.context_in_dim), "pooled": (batch, c.vec_in_dim)}
        check_conditions(cond, shapes | ({"guidance": (batch,)} if c.guidance_embed else {}))
        check_text(cond["text"], most=c.text_rows)
        check_guidance(cond)


class DoubleBlock(nnx.Module):
    """Image and text with weights of their own, and one attention over both.

    Text stands before the image, or behind it where its end may be padding: `valid`, i32 [B] or None for all, counts the
    tokens that attention may look at.
    """

    def __init__(self, config: FluxConfig, dtype: jnp.dtype, rngs: nnx.Rngs, *, text_first: bool = True):
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


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on all tokens. The original's linear1 is qkv and fc1, its linear2 proj and fc2."""

    def __init__(self, config: FluxConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.hidden_size, 3, dtype, rngs)
        self.qkv = Qkv(c.hidden_size, sum(c.axes_dim), dtype, rngs)
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


class Stream(nnx.Module):
    """The weights of one modality in a double block."""

    def __init__(self, config: FluxConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.hidden_size, 6, dtype, rngs)
        self.attention = Qkv(c.hidden_size, sum(c.axes_dim), dtype, rngs)
        self.proj = Linear(c.hidden_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(c.hidden_size, c.mlp_width, dtype=dtype, rngs=rngs)


class Qkv(nnx.Module):
    """Queries, keys and values of all heads, and their norms over so many features, as `rotary_qkv` finishes them."""

    def __init__(self, width: int, normed: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.linear.bias = Stacked(jnp.zeros(3 * width, dtype))
        self.query_norm = Stacked(jnp.ones(normed, dtype))
        self.key_norm = Stacked(jnp.ones(normed, dtype))

    def __call__(self, x: jax.Array) -> Projection:
        linear = self.linear
        return Projection(product(x, linear.kernel[...]), linear.bias[...], self.query_norm[...], self.key_norm[...])


class Modulation(nnx.Module):
    """n vectors side by side, [.., 1, n D], f32, from the already activated condition [.., D]: shifts, scales and gates."""

    def __init__(self, width: int, n: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        # bf16 weights, float32 sums and result.
        self.linear = nnx.Linear(
            width, n * width, dtype=dtype, param_dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs
        )

    def __call__(self, vec: jax.Array) -> jax.Array:
        return self.linear(vec)[..., None, :].astype(jnp.float32)


class Embedder(nnx.Module):
    """Linear, SiLU, linear, in float32 [.., D]."""

    def __init__(self, in_dim: int, width: int, **linear):  # of nnx.Linear
        linear |= dict(preferred_element_type=jnp.float32)
        self.in_layer = nnx.Linear(in_dim, width, **linear)
        self.out_layer = nnx.Linear(width, width, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


def rotary_table(positions: jax.Array, axes_dim: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [N, d] each, of positions [N, axes]."""
    positions = positions.astype(jnp.float32)
    axes = [
        positions[:, axis, None] * theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        for axis, width in enumerate(axes_dim)
    ]
    angles = jnp.repeat(jnp.concatenate(axes, axis=-1), 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles) * jnp.tile(jnp.array([-1.0, 1.0]), angles.shape[-1] // 2)


def grid_positions(grid: tuple[int, ...], axes: int) -> np.ndarray:
    """Coordinates of every token of a grid, in raster order, f32 [N, axes].

    Raises:
        ValueError: a grid of another number of axes.
    """
    if len(grid) != axes:
        names = ("frames", "rows", "columns")[-axes:]
        raise ValueError(f"grid {tuple(grid)}: expected {axes} sides, {', '.join(names)}")
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, len(grid))


def time_embedding(t: jax.Array, width: int = 256) -> jax.Array:
    """[cos, sin] of 1000 t at geometric frequencies, f32 [.., width]."""
    return sinusoids(1000.0 * t.astype(jnp.float32), width)


def sinusoids(x: jax.Array, width: int) -> jax.Array:
    """[cos, sin] of x, f32, at geometric frequencies, [.., width]."""
    # Rounded once from float64: at angles of 3,500 (guidance) a device's own float32 power would show in the result.
    frequencies = (10_000.0 ** (-np.arange(width // 2) / (width // 2))).astype(np.float32)
    angles = x[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(1 + scale) LayerNorm(x) + shift, computed in float32, in the dtype of x [B, N, D]."""
    return layer_norm(x, scale=1 + scale, shift=shift)


def layer_norm(x: jax.Array, *, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """scale LayerNorm(x) + shift, computed in float32, in the dtype of x [B, N, D]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    return (scale * y + shift).astype(x.dtype)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, H, d] as [B, N, D]."""
    return x.reshape(*x.shape[:2], -1)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate * y, added in float32, in the dtype of x."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


def check_conditions(cond: dict[str, jax.Array], shapes: dict[str, tuple[int | str, ...]]) -> None:
    """Raises ValueError unless cond has arrays of these names and shapes; a letter is any size, everywhere the same."""
    if cond.keys() != shapes.keys():
        raise ValueError(f"conditions {sorted(cond)}: expected {sorted(shapes)}")
    known: dict[int | str, int] = {}
    for name, shape in shapes.items():
        found, expected = cond[name].shape, [known.get(n, n) for n in shape]
        fits = lambda size, wanted: isinstance(wanted, str) or size == wanted
        if len(found) != len(shape) or not all(map(fits, found, expected)):
            raise ValueError(f"condition {name} {found}: expected {expected}")
        known |= {n: m for m, n in zip(found, shape, strict=True) if isinstance(n, str)}


def check_text(text: jax.Array, *, most: int | None, least: int = 1) -> None:
    """Raises ValueError unless text [B, T, ..] has from `least` to `most` rows; None: any number."""
    rows = text.shape[1]
    if rows < least or (most is not None and rows > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}" if least < most else f"exactly {most}"
        raise ValueError(f"condition text of {rows} rows: expected {expected}")


def check_guidance(cond: dict[str, jax.Array]) -> None:
    """Raises ValueError where a guidance that is a condition is not finite."""
    if "guidance" in cond and not np.isfinite(scales := np.asarray(cond["guidance"], np.float32)).all():
        raise ValueError(f"condition guidance {scales.tolist()}: expected finite numbers")
