"""A network of your own, in one file: a small DiT in pixels, its conversion table, its usual sample, and register().

Nothing in the package knows it. Once this module is imported, `chipmunk_jax.convert.convert`, `Pipeline.from_pretrained`, and in
the same process the command line (`chipmunk_jax.cli.main.main`) take it like any other.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax import Layout, Mlp, Network, Rule, Stack, Variant, attend, register
from chipmunk_jax.convert.naming import count_layers, linear, mlp
from chipmunk_jax.layers import Linear, each_layer, run_layers, stack_layers
from chipmunk_jax.models.blocks import (
    Embedder,
    Modulation,
    Qkv,
    add_gated,
    grid_positions,
    merge_heads,
    modulate,
    rotary_table,
    time_embedding,
)
from chipmunk_jax.pipelines.pixels import PixelPipeline
from pallas_kernels import rotary_qkv


@dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """Sizes; every field that counts is one of these."""

    channels: int = 12  # of a token: 2 x 2 pixels of 3 colours
    width: int = 64  # D
    heads: int = 2
    layers: int = 3
    text_dim: int = 64
    text_rows: tuple[int, int] = (1, 16)  # fewest and most rows of text


class Own(Network):
    """Velocity of a noisy image: blocks on its tokens, steered by the time and the mean of the text."""

    config_class, depths, prompted = OwnConfig, ("layers",), ("text",)

    def __init__(self, config: OwnConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, kw = config, dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config, self.dtype = config, dtype
        self.token_in, self.token_out = nnx.Linear(c.channels, c.width, **kw), nnx.Linear(c.width, c.channels, **kw)
        self.time_in, self.text_in = Embedder(256, c.width, **kw), nnx.Linear(c.text_dim, c.width, **kw)
        self.blocks = stack_layers(lambda r: Block(c, dtype, r), c.layers, rngs)

    @property
    def channels(self):
        return self.config.channels

    def conditions(self, tokens, text):
        return {"text": (text, self.config.text_dim)}

    def positions(self, grid):
        return grid_positions(grid, axes=2)

    def stacks(self, tokens, cond):
        c = self.config
        sizes = dict(heads=c.heads, head_dim=c.width // c.heads, width=c.width, mlp_width=4 * c.width)
        return {"blocks": Stack(layers=c.layers, tokens=tokens, mlp_tokens=tokens, **sizes)}

    def modulations(self, t, cond):
        vec = jax.nn.silu(self.time_in(time_embedding(t)) + self.text_in(cond["text"].mean(1)))
        return each_layer(self.blocks.modulation, vec, axis=t.ndim - 1)

    def embed(self, x, cond):
        return self.token_in(x.astype(self.dtype))

    def hidden(self, x, t, cond, positions, cache, step, modulations):
        half = self.config.width // self.config.heads // 2
        rope = rotary_table(positions, (half, half), 10_000)
        args = self.blocks, x, cache and cache["blocks"], rope
        x, blocks = run_layers(*args, step=step, per_layer=[modulations])
        return x, {"blocks": blocks}

    def velocity(self, hidden, modulations):
        return self.token_out(modulate(hidden, 0, 0)).astype(jnp.float32)


class Block(nnx.Module):
    """Attention, then an MLP. From the textbook it differs by the words `cache` and `step`."""

    def __init__(self, config: OwnConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.width, 6, dtype, rngs)
        self.qkv = Qkv(c.width, c.width // c.heads, dtype, rngs)
        self.proj = Linear(c.width, c.width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(c.width, 4 * c.width, dtype=dtype, rngs=rngs)

    def __call__(self, x, mod, rope, cache, step):
        mods = jnp.split(mod, 6, axis=-1)
        h = modulate(x, *mods[:2])
        qkv = rotary_qkv([self.qkv(h)], *rope, step.layer, implementation=step.implementation)
        out, cache = attend(*qkv, cache, step)
        x = add_gated(x, mods[2], self.proj(merge_heads(out)))
        out, cache = self.mlp(modulate(x, *mods[3:5]), cache, step)
        return add_gated(x, mods[5], out), cache


# How its PyTorch checkpoints name their tensors: theirs -> ours, every tensor once and every leaf once.
RULES = (
    *(rule for name in ("token_in", "token_out", "text_in") for rule in linear(name, name)),
    *linear("time_in.0", "time_in.in_layer"),
    *linear("time_in.2", "time_in.out_layer"),
    *linear("blocks.*.adaln", "blocks.modulation.linear"),
    *linear(tuple(f"blocks.*.to_{x}" for x in "qkv"), "blocks.qkv.linear"),
    *(Rule((f"blocks.*.{x}_norm.weight",), (f"blocks.qkv.{x}_norm",)) for x in ("query", "key")),
    *linear("blocks.*.proj", "blocks.proj"),
    *mlp("blocks.*.fc1", "blocks.*.fc2", "blocks.mlp"),
)


def configure(shapes, stated):
    """The config of a checkpoint, from the shapes of its tensors and its config.json."""
    width, head_dim = shapes["token_in.bias"][0], shapes["blocks.0.query_norm.weight"][0]
    return OwnConfig(
        channels=shapes["token_in.weight"][1],
        width=width,
        heads=width // head_dim,
        layers=count_layers(shapes, "blocks."),
        text_dim=shapes["text_in.weight"][1],
    )


class OwnPipeline(PixelPipeline):
    """Tokens are packed (channel, row, column)."""

    channels_first = True


usual = partial(Variant, network="own", pipeline=OwnPipeline, preset="mini-flux", patch=(2, 2), steps=8, shift=1.0)
register(
    "own",
    Own,
    layouts=[Layout(model="own", class_name="Own", name="original", marks=("blocks.0.adaln.weight",), rules=RULES,
                    configure=configure)],
    variants={"own-small": usual(config=OwnConfig(), matches=lambda config: True, height=32, width=32)},
)  # fmt: skip

if __name__ == "__main__":
    print(
        "registered the network own and its variant own-small, which a program that imports this file converts and samples"
    )
