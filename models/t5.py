"""T5's encoder, version 1.1 (Raffel et al., 2020), and UMT5's (Chung et al., 2023), which is the same but for its position bias.

Config fields are named as in transformers.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, scan_layers, stack_layers
from chipmunk_jax.models.blocks import Component, merge_heads
from pallas_kernels.rotary_qkv import rms_norm


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes of a T5 encoder; the defaults are T5-XXL v1.1's, which FLUX.1 has."""

    vocab_size: int = 32_128
    d_model: int = 4096  # D
    d_kv: int = 64  # d; heads x d need not be D
    d_ff: int = 10_240  # F
    num_layers: int = 24  # L
    num_heads: int = 64  # H
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # tokens; farther ones share the last bucket
    bias_in_every_layer: bool = False  # whether every layer has a position bias of its own, as in UMT5, or all have one

    def __post_init__(self):
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or farthest <= buckets // 4:
            raise InputError(
                f"relative_attention_num_buckets={buckets}, relative_attention_max_distance={farthest}: expected an even number "
                "of at least 4 buckets, and a distance above a quarter of it"
            )


UMT5_XXL = T5Config(vocab_size=256_384, bias_in_every_layer=True)  # of Wan


class T5Encoder(Component):
    """States of all tokens of a prompt.

    The tokens are float32 between the blocks, as their values grow into the thousands, where bf16 has steps of 8 and more. In
    float16 the MLP of the published weights overflows, so that is refused.
    """

    config_class = T5Config

    def __init__(self, config: T5Config, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        if jnp.dtype(dtype) == jnp.float16:
            raise InputError("dtype=float16: T5's activations reach beyond it; expected bfloat16 or float32")
        c, init = config, nnx.initializers.normal(1.0)
        self.config, self.dtype = config, dtype
        self.token_embedding = nnx.Param(init(rngs.params(), (c.vocab_size, c.d_model), dtype))
        self.relative_bias = None if c.bias_in_every_layer else position_bias(c, dtype, rngs)
        self.blocks = stack_layers(lambda rngs: T5Block(config, dtype, rngs), c.num_layers, rngs)
        self.final_norm = nnx.Param(jnp.ones(c.d_model, jnp.float32))

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The final states, f32 [B, T, D].

        Args:
            ids: i32 [B, T].
            mask: bool [B, T], which tokens are attended to; None: all, padding too. The states of the others are finite and mean
                nothing.
        """
        c, tokens = self.config, ids.shape[1]
        buckets = relative_buckets(tokens, c.relative_attention_num_buckets, c.relative_attention_max_distance)
        shared = None if self.relative_bias is None else bias_of(self.relative_bias, buckets)
        mask = None if mask is None else mask[:, None, None]
        x = jnp.take(self.token_embedding[...], ids, axis=0).astype(jnp.float32)
        x = scan_layers(self.blocks, x, buckets, shared, mask)
        return rms_norm(x, self.final_norm[...])


class T5Block(nnx.Module):
    """Self-attention and a gated MLP, each on the norm of the tokens [B, T, D], f32; no biases but that of positions."""

    def __init__(self, config: T5Config, dtype: jnp.dtype, rngs: nnx.Rngs):
        c, inner = config, config.num_heads * config.d_kv
        linear = partial(Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads, self.dtype = c.num_heads, dtype
        self.norm1 = nnx.Param(jnp.ones(c.d_model, jnp.float32))
        self.qkv, self.proj = linear(c.d_model, 3 * inner), linear(inner, c.d_model)
        self.relative_bias = position_bias(c, dtype, rngs) if c.bias_in_every_layer else None
        self.norm2 = nnx.Param(jnp.ones(c.d_model, jnp.float32))
        self.fc1, self.fc2 = (
            linear(c.d_model, 2 * c.d_ff),
            linear(c.d_ff, c.d_model),
        )  # fc1: the gate, then what it gates

    @jax.named_scope("t5_block")
    def __call__(self, x: jax.Array, buckets: np.ndarray, bias: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        bias = bias_of(self.relative_bias, buckets) if bias is None else bias
        h = self.qkv(rms_norm(x, self.norm1[...]).astype(self.dtype))
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(h, 3, axis=-1))
        # Scores are not divided by sqrt(d). Softmax in float32; a masked score is finite, so that a row without keys is, too.
        h = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0, implementation="xla")
        x = x + self.proj(merge_heads(h)).astype(jnp.float32)
        h = self.fc1(rms_norm(x, self.norm2[...]).astype(self.dtype)).astype(jnp.float32)
        gate, h = jnp.split(h, 2, axis=-1)
        h = jax.nn.gelu(gate, approximate=True) * h
        return x + self.fc2(h.astype(self.dtype)).astype(jnp.float32)


def position_bias(config: T5Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Param:
    """What every bucket of distances adds to the scores of a head, [buckets, H]."""
    shape = config.relative_attention_num_buckets, config.num_heads
    return nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, dtype))


def bias_of(table: nnx.Param, buckets: np.ndarray) -> jax.Array:
    """What is added to the scores, f32 [1, H, T, T], of a table [buckets, H]."""
    return jnp.moveaxis(table[...].astype(jnp.float32)[buckets], -1, 0)[None]


def relative_buckets(tokens: int, buckets: int, farthest: int) -> np.ndarray:
    """The bucket of every query and key, i32 [T, T].

    Half of the buckets are of keys after the query. Of each half, the first half is of one distance each, and the others are evenly
    spaced in the logarithm of the distance.
    """
    distance = np.arange(tokens) - np.arange(tokens)[:, None]
    half, exact = buckets // 2, buckets // 4
    logs = np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(farthest / exact)
    far = np.minimum(exact + (logs * (half - exact)).astype(int), half - 1)
    return (np.where(np.abs(distance) < exact, np.abs(distance), far) + half * (distance > 0)).astype(np.int32)
