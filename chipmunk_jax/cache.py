"""The caches kept from one step to the next: one pytree for each stack of layers, with the layers in front."""

import jax
import jax.numpy as jnp
from flax import struct

from chipmunk_jax.model import Stack
from chipmunk_jax.sparsity import Sparsity
from pallas_kernels import Columns, Scaled
from pallas_kernels.groups import group_count

# Sequence lengths whose key lists are packed to 16 bits: shorter ones have small lists, longer ones ids of more than 17 bits.
PACKED_LENGTHS = range(32_769, 131_073)


@struct.dataclass
class AttentionCache:
    """Cache of the attention of L layers."""

    columns: Columns  # [L, B, H, G, K]: keys, a list for each head and query group
    # bf16 [L, B, N, H, d], or 8 bits: dense output minus attention over the columns, at the last full step; None: it is not kept.
    residual: jax.Array | Scaled | None
    lse: jax.Array  # f32 [L, B, H, N]: log-sum-exp of the scaled logits, natural logarithm, at the last measured step


@struct.dataclass
class MlpCache:
    """Cache of the MLPs of L layers. With `activations`, out moves with every step; without, it is the residual of a full step."""

    columns: Columns  # [L, B, G, K]: neurons, a list for each row group
    out: jax.Array  # bf16 [L, B, N, D]: the output as it stands, or dense output minus that of the chosen neurons
    activations: jax.Array | None  # bf16 [L, B, F, N]: post-GELU, transposed
    group_mean: jax.Array | None  # f32 [L, B, G, F]: of the pre-activations, when a neuron was last chosen


@struct.dataclass
class LayerCache:
    """Caches of one stack of layers; None where a part is always dense."""

    attention: AttentionCache | None
    mlp: MlpCache | None


def zeros(stacks: dict[str, Stack], sparsity: Sparsity, batch: int, dtype: jnp.dtype) -> dict[str, LayerCache]:
    """Empty caches of every stack. The first steps of a plan write each entry before any reads it."""
    return {name: _stack_zeros(stack, sparsity, batch, dtype) for name, stack in stacks.items()}


def _stack_zeros(stack: Stack, sparsity: Sparsity, batch: int, dtype: jnp.dtype) -> LayerCache:
    attention = mlp = None
    lead = (stack.layers, batch)
    if config := sparsity.attention:
        heads, values = (*lead, stack.heads), (*lead, stack.tokens, stack.heads, stack.head_dim)
        residuals = {0: lambda: None, 8: lambda: Scaled.zeros(values), 16: lambda: jnp.zeros(values, dtype)}
        attention = AttentionCache(
            columns=Columns.empty(
                (*heads, group_count(stack.tokens, config.group)),
                config.capacity(stack.tokens),
                packed=stack.tokens in PACKED_LENGTHS,
            ),
            residual=residuals[config.residual_bits](),
            lse=jnp.zeros((*heads, stack.tokens), jnp.float32),
        )
    if config := sparsity.mlp:
        groups = group_count(stack.mlp_tokens, config.group)
        keep_all = config.cache == "activations"
        mlp = MlpCache(
            columns=Columns.empty((*lead, groups), config.capacity(stack.mlp_width)),
            out=jnp.zeros((*lead, stack.mlp_tokens, stack.width), dtype),
            activations=jnp.zeros((*lead, stack.mlp_width, stack.mlp_tokens), dtype) if keep_all else None,
            group_mean=jnp.zeros((*lead, groups, stack.mlp_width), jnp.float32) if keep_all else None,
        )
    return LayerCache(attention, mlp)


def nbytes(stacks: dict[str, Stack], sparsity: Sparsity | None, batch: int, dtype: jnp.dtype) -> dict[str, int]:
    """Bytes of each part of the caches, {"double.attention.residual": ...}, without allocating any."""
    if sparsity is None:
        return {}
    shapes = jax.eval_shape(lambda: zeros(stacks, sparsity, batch, dtype))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="."): a.size * a.dtype.itemsize for path, a in leaves}
