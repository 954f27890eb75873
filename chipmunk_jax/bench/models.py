"""The models that can be timed, with random weights and inputs: speed does not depend on what the weights are."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chipmunk_jax import memory
from chipmunk_jax.errors import InputError
from chipmunk_jax.families import Defaults, defaults
from chipmunk_jax.model import Condition, Model
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import CLIP_TOKENS, Wan, WanConfig
from chipmunk_jax.sparsity import Sparsity
from pallas_kernels import Implementation


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """What a model needs to be timed."""

    network: type[nnx.Module]  # called as network(config, dtype=.., rngs=..)
    config: Any  # a dataclass
    depths: tuple[str, ...]  # its fields that count layers, one a stack
    width: int  # D
    channels: int  # of a token
    conditions: Callable[[Any, int, int], dict[str, tuple[int, ...]]]  # config, text, tokens -> shapes of an entry
    defaults: Defaults

    @property
    def layers(self) -> int:
        return sum(getattr(self.config, name) for name in self.depths)

    def rows(self, batch: int) -> int:
        """Entries of the batch that the network sees."""
        return batch if self.defaults.guidance is None else 2 * batch

    def sizes(self, height: int | None, width: int | None, frames: int | None) -> dict[str, int]:
        """Height, width and, of a video, frames: those given, and the usual ones for the others.

        Raises:
            InputError: sizes that tokens do not fill, or frames of an image.
        """
        complete = self.defaults.complete(height=height, width=width, frames=frames)
        self.grid(complete)
        return {name: complete[name] for name in ("height", "width", "frames") if name in complete}

    def grid(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Tokens on each axis: rows and columns, and of a video frames before them."""
        return self.defaults.grid(sizes)

    def shortened(self, layers: int) -> "BenchModel":
        """The same with so many layers in all, shared out among its stacks as they were, at least one each.

        Raises:
            InputError: fewer layers than stacks, or more than there are.
        """
        if not len(self.depths) <= layers <= self.layers:
            raise InputError(f"--layers {layers}: expected {len(self.depths)} to {self.layers}")
        left, sizes = layers, {}
        for i, name in enumerate(self.depths[:-1]):
            wanted = round(layers * getattr(self.config, name) / self.layers)
            sizes[name] = min(max(1, wanted), left - (len(self.depths) - 1 - i))
            left -= sizes[name]
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **sizes, **{self.depths[-1]: left}))


def _joint(config: FluxConfig | HunyuanVideoConfig, **usual: Any) -> BenchModel:
    video = isinstance(config, HunyuanVideoConfig)
    return BenchModel(
        network=HunyuanVideo if video else Flux, config=config, depths=("depth", "depth_single_blocks"),
        width=config.hidden_size, channels=config.token_channels if video else config.in_channels,
        conditions=_joint_conditions, defaults=dataclasses.replace(defaults(config), **usual),
    )  # fmt: skip


def _joint_conditions(config: FluxConfig | HunyuanVideoConfig, text: int, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes = {"text": (text, config.context_in_dim), "pooled": (config.vec_in_dim,)}
    shapes |= {"guidance": ()} if config.guidance_embed else {}
    return shapes | ({"mask": (text,)} if isinstance(config, HunyuanVideoConfig) else {})


def _wan(config: WanConfig, **usual: Any) -> BenchModel:
    return BenchModel(
        network=Wan, config=config, depths=("num_layers",), width=config.dim, channels=config.patch * config.out_dim,
        conditions=_wan_conditions, defaults=dataclasses.replace(defaults(config), **usual),
    )  # fmt: skip


def _wan_conditions(config: WanConfig, text: int, tokens: int) -> dict[str, tuple[int, ...]]:
    shapes = {"text": (text, config.text_dim)}
    if config.image_dim:
        latents = (tokens, config.patch * (config.in_dim - config.out_dim))
        shapes |= {"image": (CLIP_TOKENS, config.image_dim), "latents": latents}
    return shapes


_WAN_14B = dict(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)
_TINY = dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4)
MODELS = {
    "flux-dev": _joint(FluxConfig()),
    "flux-schnell": _joint(FluxConfig(guidance_embed=False)),
    "hunyuan-video": _joint(HunyuanVideoConfig()),
    "wan-14b": _wan(WanConfig(**_WAN_14B)),
    "wan-1.3b": _wan(WanConfig()),
    "wan-i2v-14b": _wan(WanConfig(**_WAN_14B, in_dim=36, image_dim=1280)),
    "flux-tiny": _joint(FluxConfig(**_TINY), text=16, patch=(4, 4)),
    "hunyuan-tiny": _joint(HunyuanVideoConfig(**_TINY), text=16, patch=(4, 4, 4)),
    "wan-tiny": _wan(
        WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=256),
        text=16, patch=(4, 4, 4), frames=17, height=64, width=64,
    ),
}  # fmt: skip


def model_of(config: FluxConfig | HunyuanVideoConfig | WanConfig) -> BenchModel:
    """The entry of a converted checkpoint: that of MODELS with its config, or one like it with its sizes."""
    known = next((model for model in MODELS.values() if model.config == config), None)
    return known or (_wan if isinstance(config, WanConfig) else _joint)(config)


def plan_memory(
    model: BenchModel,
    sizes: dict[str, int],
    batch: int,
    *,
    steps: int,
    dtype: jnp.dtype,
    sparsity: Sparsity | None,
    implementation: Implementation | None = None,
) -> memory.Parts:
    """Bytes by name of all that a sample of a model of these sizes holds on its device; nothing is drawn or compiled.

    Args:
        model: of MODELS.
        sizes: of model.sizes().
        batch: images or videos at once.
        steps: of the sampler.
        dtype: of weights and activations.
        sparsity: None for dense.
        implementation: of the kernels, see pallas_kernels.dispatch.choose.
    """
    usual = model.defaults
    options = dict(steps=steps, sparsity=sparsity, guidance=usual.guidance, solver=usual.solver)
    return memory.plan(*shapes(model, sizes, batch, dtype), **options, implementation=implementation)


def shapes(model: BenchModel, sizes: dict[str, int], batch: int, dtype: jnp.dtype):
    """The network, noise and conditions of a sample of these sizes, shapes in place of arrays."""
    network = nnx.eval_shape(lambda: model.network(model.config, dtype=dtype, rngs=nnx.Rngs(0)))
    return network, *jax.eval_shape(lambda: random_inputs(model, batch, math.prod(model.grid(sizes))))


def random_model(model: BenchModel, dtype: jnp.dtype) -> Model:
    """A network whose every parameter is drawn, leaf by leaf on the device: never more than one beside the network.

    All with standard deviation D ** -0.5 (0.018 for FLUX.1-dev), so that every layer moves the tokens and a wrong one shows.
    """
    make = lambda: model.network(model.config, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(state)
    scale = model.width**-0.5
    draw = jax.jit(lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return nnx.merge(graph, tree.unflatten(draw(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)))


def random_inputs(model: BenchModel, batch: int, tokens: int, seed: int = 1) -> tuple[jax.Array, Condition]:
    """noise [B, N, C] and the conditions [B, ..], f32, unit normal."""
    shapes = model.conditions(model.config, model.defaults.text, tokens)
    noise_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(shapes))
    cond = {
        name: jax.random.normal(key, (batch, *shape)) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    if "guidance" in cond:
        cond["guidance"] = jnp.full(batch, model.defaults.distilled or 0.0)
    if "mask" in cond:
        cond["mask"] = jnp.ones((batch, model.defaults.text), bool)  # the longest prompt
    return jax.random.normal(noise_key, (batch, tokens, model.channels)), cond
