"""The loop over stacked layers, and the one module whose weights feed kernels directly."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.delta import MlpWeights, feed_forward, product
from chipmunk_jax.schedule import Step

Carry = TypeVar("Carry")


class Stacked(nnx.Param):
    """A parameter that goes into every layer whole, with the layer's index: its slice in front of a kernel would be copied."""


class Linear(nnx.Module):
    """x kernel + bias, for x [.., N, in_features] and a kernel [in_features, out_features] that is a slice of a stack."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


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


def each_layer(module: nnx.Module, x: jax.Array, axis: int = 0) -> Any:
    """module(x) of every layer of a stack, the layers at `axis` of each result."""
    graph, params = nnx.split(module)
    results = lax.map(lambda own: nnx.merge(graph, own)(x), params)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, axis), results)


def scan_layers(blocks: nnx.Module, x: jax.Array, *args) -> jax.Array:
    """x after every block of a stack, each called as block(x, *args): of a network that runs once a sample, without caches."""
    graph, params = nnx.split(blocks)
    return lax.scan(lambda x, own: (nnx.merge(graph, own)(x, *args), None), x, params)[0]


def run_layers(
    blocks: nnx.Module,
    x: Carry,
    cache: LayerCache | None,
    *args,
    step: Step | None = None,
    per_layer: Sequence = (),
    first: int = 0,
    unroll: bool = False,
) -> tuple[Carry, LayerCache | None]:
    """x after every block of the stack, and the cache.

    Args:
        blocks: of stack_layers; called as block(x, *per_layer, *args, cache, step) -> (x, cache).
        x: what the blocks hand on, any pytree.
        cache: of this stack, or None.
        args: the same for every layer.
        step: of the sampler, or None for the plain dense network.
        per_layer: pytrees with the layers in front, of which each block gets its own entry.
        first: depth of the stack's first layer in the whole model.
        unroll: compile every layer apart instead of one for all. For training: the gradient of a loop adds to those of all
            layers at every layer.
    """
    graph, whole, sliced = nnx.split(blocks, Stacked, ...)
    layers = jax.tree.leaves(sliced)[0].shape[0]
    step = step or Step()

    def run_layer(step, layer, carry):
        x, cache = carry
        # Slices at the loop's own index: XLA then hands cuBLAS a pointer into the stack, and copies nothing.
        params, own = jax.tree.map(lambda stack: stack[layer], (sliced, tuple(per_layer)))
        block = nnx.merge(graph, whole, params)
        return block(x, *own, *args, cache, step.at_layer(layer, first + layer))

    carry = x, cache
    for start, stop, alike in step.runs(first, layers):
        body = functools.partial(run_layer, alike)
        if unroll:
            carry = functools.reduce(lambda carry, layer, body=body: body(layer, carry), range(start, stop), carry)
        else:
            carry = lax.fori_loop(start, stop, body, carry)
    return carry
