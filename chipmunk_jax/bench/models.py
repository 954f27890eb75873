"""The models that can be timed, with random weights and inputs: speed does not depend on what the weights are."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.sampling import Condition, Model, check_room
from chipmunk_jax.solvers import flux_timesteps
from chipmunk_jax.sparsity import Sparsity


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """What a model needs to be timed."""

    network: type[nnx.Module]  # called as network(config, dtype=.., rngs=..)
    config: Any  # a dataclass
    depths: tuple[str, ...]  # its fields that count layers, one a stack
    channels: int  # of a token
    pixels: int  # on a side of a token
    text: int  # tokens
    conditions: Callable[[Any, int], dict[str, tuple[int, ...]]]  # config, text -> their shapes, without the batch
    timesteps: Callable[[int, int], np.ndarray]  # steps, tokens -> f32 [steps + 1]

    @property
    def layers(self) -> int:
        return sum(getattr(self.config, name) for name in self.depths)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image of so many pixels.

        Raises:
            ValueError: pixels that are not a multiple of a token's.
        """
        for name, size in (("height", height), ("width", width)):
            if size < self.pixels or size % self.pixels:
                raise ValueError(f"--{name} {size}: expected a positive multiple of {self.pixels}")
        return height // self.pixels, width // self.pixels

    def shortened(self, layers: int) -> "BenchModel":
        """The same with so many layers in all, shared out among its stacks as they were, at least one each.

        Raises:
            ValueError: fewer layers than stacks, or more than there are.
        """
        if not len(self.depths) <= layers <= self.layers:
            raise ValueError(f"--layers {layers}: expected {len(self.depths)} to {self.layers}")
        left, sizes = layers, {}
        for i, name in enumerate(self.depths[:-1]):
            wanted = round(layers * getattr(self.config, name) / self.layers)
            sizes[name] = min(max(1, wanted), left - (len(self.depths) - 1 - i))
            left -= sizes[name]
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **sizes, **{self.depths[-1]: left}))


def _flux(config: FluxConfig, *, text: int, pixels: int = 16) -> BenchModel:
    return BenchModel(
        network=Flux, config=config, depths=("depth", "depth_single_blocks"), channels=config.in_channels,
        pixels=pixels, text=text, conditions=_flux_conditions, timesteps=flux_timesteps,
    )  # fmt: skip


def _flux_conditions(config: FluxConfig, text: int) -> dict[str, tuple[int, ...]]:
    guidance = {"guidance": ()} if config.guidance_embed else {}
    return {"text": (text, config.context_in_dim), "pooled": (config.vec_in_dim,)} | guidance


MODELS = {
    "flux-dev": _flux(FluxConfig(), text=512),
    "flux-schnell": _flux(FluxConfig(guidance_embed=False), text=256),
    "flux-tiny": _flux(FluxConfig(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4), text=16, pixels=4),
}


def check_memory(model: BenchModel, tokens: int, batch: int, dtype: jnp.dtype, sparsity: Sparsity) -> None:
    """Raises ValueError if weights, inputs, caches and activations cannot fit the device; before any is drawn."""
    network = nnx.eval_shape(lambda: model.network(model.config, dtype=dtype, rngs=nnx.Rngs(0)))
    inputs = jax.eval_shape(lambda: random_inputs(model, batch, tokens))
    nbytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    parts = {"weights": nbytes(nnx.state(network)), "inputs": nbytes(inputs)}
    check_room(network.stacks(tokens, inputs[1]), sparsity, batch, dtype, more=parts)


def random_model(model: BenchModel, dtype: jnp.dtype) -> Model:
    """A network whose every parameter is drawn, leaf by leaf on the device: never more than one beside the network.

    All with standard deviation D ** -0.5 (0.018 for FLUX.1-dev), so that every layer moves the tokens and a wrong one shows.
    """
    make = lambda: model.network(model.config, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(state)
    scale = model.config.hidden_size**-0.5
    draw = jax.jit(lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return nnx.merge(graph, tree.unflatten(draw(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)))


def random_inputs(model: BenchModel, batch: int, tokens: int, seed: int = 1) -> tuple[jax.Array, Condition]:
    """noise [B, N, C] and the conditions [B, ..], f32, unit normal."""
    shapes = model.conditions(model.config, model.text)
    noise_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(shapes))
    cond = {
        name: jax.random.normal(key, (batch, *shape)) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    if "guidance" in cond:
        cond["guidance"] = jnp.full(batch, 3.5)
    return jax.random.normal(noise_key, (batch, tokens, model.channels)), cond
