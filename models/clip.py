"""CLIP's text encoder (Radford et al., 2021): a causal transformer, whose state at the end token stands for the whole prompt.

Config fields are named as in transformers.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, scan_layers, stack_layers
from chipmunk_jax.models.blocks import Component, layer_norm, merge_heads

EPSILON = 1e-5  # of all norms
LARGEST_ID = 2  # as eos_token_id, with which CLIP-L was published: the end token is the largest id of a row


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's, which FLUX.1 and HunyuanVideo have."""

    vocab_size: int = 49_408
    hidden_size: int = 768  # D
    intermediate_size: int = 3072  # F
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 12  # H
    max_position_embeddings: int = 77  # the most tokens of a prompt
    eos_token_id: int = LARGEST_ID  # of the end token, whose first occurrence counts

    def __post_init__(self):
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}: expected a multiple of the heads"
            )
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise InputError(f"eos_token_id={self.eos_token_id}: expected one of {self.vocab_size} tokens")


class ClipText(Component):
    """States of all tokens of a prompt, and of the end token."""

    config_class = ClipTextConfig

    def __init__(self, config: ClipTextConfig, *, dtype: jnp.dtype = jnp.bfloat16, rngs: nnx.Rngs):
        c, init = config, nnx.initializers.normal(0.02)
        self.config, self.dtype = config, dtype
        self.token_embedding = nnx.Param(init(rngs.params(), (c.vocab_size, c.hidden_size), dtype))
        self.position_embedding = nnx.Param(init(rngs.params(), (c.max_position_embeddings, c.hidden_size), dtype))
        self.blocks = stack_layers(lambda rngs: ClipBlock(config, dtype, rngs), c.num_hidden_layers, rngs)
        self.final_norm = nnx.Param(jnp.ones(c.hidden_size, jnp.float32))
        self.final_norm_bias = nnx.Param(jnp.zeros(c.hidden_size, jnp.float32))

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The final states [B, T, D] and those of the end tokens [B, D], both f32.

        Args:
            ids: i32 [B, T], each row a prompt, its end token, and any padding: no token looks at one after it.

        Raises:
            InputError: more tokens than the encoder has positions.
        """
        c, tokens = self.config, ids.shape[1]
        if tokens > c.max_position_embeddings:
            raise InputError(f"{tokens} tokens: expected at most {c.max_position_embeddings}")
        embedded = jnp.take(self.token_embedding[...], ids, axis=0).astype(jnp.float32)
        x = scan_layers(self.blocks, embedded + self.position_embedding[:tokens].astype(jnp.float32))
        hidden = normed(x, self.final_norm, self.final_norm_bias)
        ends = jnp.argmax(ids if c.eos_token_id == LARGEST_ID else ids == c.eos_token_id, axis=1)
        return hidden, jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]


class ClipBlock(nnx.Module):
    """Causal self-attention and an MLP, each on the norm of the tokens [B, T, D], f32."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, linear = config.hidden_size, partial(Linear, dtype=dtype, rngs=rngs)
        ones, zeros = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
        self.heads, self.dtype = config.num_attention_heads, dtype
        self.norm1, self.norm1_bias = nnx.Param(ones), nnx.Param(zeros)
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        self.norm2, self.norm2_bias = nnx.Param(ones), nnx.Param(zeros)
        self.fc1, self.fc2 = linear(width, config.intermediate_size), linear(config.intermediate_size, width)

    @jax.named_scope("clip_block")
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.qkv(normed(x, self.norm1, self.norm1_bias).astype(self.dtype))
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(h, 3, axis=-1))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")  # softmax in float32
        x = x + self.proj(merge_heads(h)).astype(jnp.float32)
        h = self.fc1(normed(x, self.norm2, self.norm2_bias).astype(self.dtype)).astype(jnp.float32)
        h = h * jax.nn.sigmoid(1.702 * h)  # "quick_gelu"
        return x + self.fc2(h.astype(self.dtype)).astype(jnp.float32)


def normed(x: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
    """weight LayerNorm(x) + bias, f32 [B, T, D]."""
    return layer_norm(x, scale=weight[...], shift=bias[...], epsilon=EPSILON)
