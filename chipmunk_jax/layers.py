"""The loop over stacked layers, and the one module whose weights feed kernels directly."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.delta import MlpWeights, feed_forward
from chipmunk_jax.schedule import Step

Carry = TypeVar("Carry")


class Stacked(nnx.Param):
    """A parameter that goes into every layer whole, with the layer's index: its slice in front of a kernel would be copied."""


class Mlp(nnx.Module):
    """Two linear layers around a tanh GELU. Both weights hold a neuron a row, [F, D] (W1 as PyTorch has it, W2 transposed)."""

    def __init__(self, width: int, mlp_width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.fc1 = Stacked(init(rngs.params(), (mlp_width, width), dtype))
        self.b1 = Stacked(jnp.zeros(mlp_width, dtype))
        self.fc2 = Stacked(nnx.initializers.lecun_normal()(rngs.params(), (mlp_width, width), dtype))
        self.b2 = Stacked(jnp.zeros(width, dtype))

    def __call__(self, x: jax.Array, cache: LayerCache | None, step: Step) -> tuple[jax.Array, LayerCache | None]:
        """x [B, N, D] -> [B, N, D], and the cache."""
        weights = MlpWeights(self.fc1[...], self.b1[...], self.fc2[...], self.b2[...])
        return feed_forward(x, weights, cache, step)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` equal modules as one, whose every parameter has the layers in front."""
    return nnx.split_rngs(splits=layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def run_layers(
    blocks: nnx.Module, x: Carry, cache: LayerCache | None, step: Step | None, *args, first: int = 0
) -> tuple[Carry, LayerCache | None]:
    """x after every block of the stack, and the cache.

    Args:
        blocks: of stack_layers; called as block(x, *args, cache, step) -> (x, cache).
        x: what the blocks hand on, any pytree.
        cache: of this stack, or None.
        step: of the sampler, or None for the plain dense network.
        args: the same for every layer.
        first: depth of the stack's first layer in the whole model.
    """
    graph, whole, sliced = nnx.split(blocks, Stacked, ...)
    layers = jax.tree.leaves(sliced)[0].shape[0]
    step = step or Step()

    def body(carry, inputs):
        x, cache = carry
        params, layer = inputs
        block = nnx.merge(graph, whole, params)
        return block(x, *args, cache, step.at_layer(layer, first + layer)), None

    return lax.scan(body, (x, cache), (sliced, jnp.arange(layers)))[0]
