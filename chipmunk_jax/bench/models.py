"""The models that can be timed, with random weights and inputs: speed does not depend on what the weights are."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax import memory, sampling
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig
from chipmunk_jax.sampling import Condition, Model
from chipmunk_jax.solvers import Solver, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
from chipmunk_jax.sparsity import Sparsity
from pallas_kernels import Implementation

FRAMES = 4  # of a video that one latent frame holds; the first stands for itself


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """What a model needs to be timed."""

    network: type[nnx.Module]  # called as network(config, dtype=.., rngs=..)
    config: Any  # a dataclass
    depths: tuple[str, ...]  # its fields that count layers, one a stack
    width: int  # D
    channels: int  # of a token
    pixels: int  # on a side of a token
    size: tuple[int, ...]  # height and width of what it usually makes, in pixels, and of a video its frames
    text: int  # tokens
    conditions: Callable[[Any, int], dict[str, tuple[int, ...]]]  # config, text -> their shapes, without the batch
    timesteps: Callable[[int, int], np.ndarray]  # steps, tokens -> f32 [steps + 1]
    preset: str  # of sparsity
    stride: int = FRAMES  # frames of a latent frame
    solver: Solver | None = None  # None: Euler
    guidance: float | None = None  # scale of true guidance, which doubles the batch
    distilled: float = 0.0  # scale of a guidance that is a condition

    @property
    def layers(self) -> int:
        return sum(getattr(self.config, name) for name in self.depths)

    def rows(self, batch: int) -> int:
        """Entries of the batch that the network sees."""
        return batch if self.guidance is None else 2 * batch

    def sizes(self, height: int | None, width: int | None, frames: int | None) -> dict[str, int]:
        """Height, width and, of a video, frames: those given, and the usual ones for the others.

        Raises:
            ValueError: pixels that are not a multiple of a token's, frames of an image, or frames that no latent frame ends with.
        """
        if frames is not None and len(self.size) == 2:
            raise ValueError(f"--frames {frames}: expected none, as this model makes images")
        given = dict(zip(("height", "width", "frames"), (height, width, frames), strict=True))
        usual = dict(zip(given, self.size, strict=False))  # of an image, no frames
        sizes = {name: usual[name] if given[name] is None else given[name] for name in usual}
        for name in ("height", "width"):
            if sizes[name] < self.pixels or sizes[name] % self.pixels:
                raise ValueError(f"--{name} {sizes[name]}: expected a positive multiple of {self.pixels}")
        if (sizes.get("frames", 1) - 1) % self.stride or sizes.get("frames", 1) < 1:
            raise ValueError(f"--frames {frames}: expected a multiple of {self.stride}, and one")
        return sizes

    def grid(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Tokens on each axis: rows and columns, and of a video frames before them."""
        frames = (1 + (sizes["frames"] - 1) // self.stride,) if "frames" in sizes else ()
        return *frames, sizes["height"] // self.pixels, sizes["width"] // self.pixels

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
        network=Flux, config=config, depths=("depth", "depth_single_blocks"), width=config.hidden_size,
        channels=config.in_channels, pixels=pixels, size=(768, 1280), text=text, conditions=_flux_conditions,
        timesteps=flux_timesteps, preset="flux", distilled=3.5,
    )  # fmt: skip


def _flux_conditions(config: FluxConfig | HunyuanVideoConfig, text: int) -> dict[str, tuple[int, ...]]:
    guidance = {"guidance": ()} if config.guidance_embed else {}
    return {"text": (text, config.context_in_dim), "pooled": (config.vec_in_dim,)} | guidance


def _hunyuan_video(config: HunyuanVideoConfig, *, text: int, pixels: int = 16) -> BenchModel:
    return BenchModel(
        network=HunyuanVideo, config=config, depths=("depth", "depth_single_blocks"), width=config.hidden_size,
        channels=config.token_channels, pixels=pixels, size=(720, 1280, 129), text=text,
        conditions=lambda config, text: _flux_conditions(config, text) | {"mask": (text,)},
        timesteps=lambda steps, _: shifted_timesteps(steps, 7.0), preset="hunyuan-video", distilled=6.0,
    )  # fmt: skip


def _wan(
    config: WanConfig,
    preset: str,
    *,
    size: tuple[int, int, int],
    text: int = 512,
    pixels: int = 16,
    stride: int = FRAMES,
) -> BenchModel:
    return BenchModel(
        network=Wan, config=config, depths=("num_layers",), width=config.dim, channels=config.patch * config.out_dim,
        pixels=pixels, size=size, text=text, conditions=lambda config, text: {"text": (text, config.text_dim)},
        timesteps=lambda steps, _: wan_timesteps(steps, 5.0), preset=preset, solver=UniPC(), guidance=5.0, stride=stride,
    )  # fmt: skip


_TINY = dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4)
MODELS = {
    "flux-dev": _flux(FluxConfig(), text=512),
    "flux-schnell": _flux(FluxConfig(guidance_embed=False), text=256),
    "hunyuan-video": _hunyuan_video(HunyuanVideoConfig(), text=256),
    "wan-14b": _wan(WanConfig(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40), "wan-14b", size=(720, 1280, 81)),
    "wan-1.3b": _wan(WanConfig(), "wan-1.3b", size=(480, 832, 81)),
    "flux-tiny": _flux(FluxConfig(**_TINY), text=16, pixels=4),
    "hunyuan-tiny": _hunyuan_video(HunyuanVideoConfig(**_TINY), text=16, pixels=4),
    "wan-tiny": _wan(
        WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=4), "wan-1.3b", size=(64, 64, 17), text=16, pixels=4
    ),
}


COLOURS, WORDS = 3, 16  # channels of a pixel; rows of text of the small models, which have no latents


def model_of(config: FluxConfig | HunyuanVideoConfig | WanConfig) -> BenchModel:
    """The entry of a converted checkpoint: that of MODELS with its config, or one like it with its sizes."""
    for model in MODELS.values():
        if model.config == config:
            return model
    if isinstance(config, HunyuanVideoConfig):
        return _hunyuan_video(config, text=256)
    if isinstance(config, FluxConfig):
        side = math.isqrt(config.in_channels // COLOURS)
        if config.in_channels != COLOURS * side**2:
            return _flux(config, text=512)
        pixels = _flux(config, text=WORDS, pixels=side)
        return dataclasses.replace(pixels, size=(64, 64), guidance=2.0)  # as `chipmunk sample` has them
    if config.out_dim != COLOURS:
        return _wan(config, "wan-14b", size=(720, 1280, 81))
    side = config.patch_size[-1]
    return _wan(config, "wan-14b", size=(64, 64, 16), text=WORDS, pixels=side, stride=config.patch_size[0])


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
    network = nnx.eval_shape(lambda: model.network(model.config, dtype=dtype, rngs=nnx.Rngs(0)))
    noise, cond = jax.eval_shape(lambda: random_inputs(model, batch, math.prod(model.grid(sizes))))
    options = dict(steps=steps, sparsity=sparsity, guidance=model.guidance, solver=model.solver)
    return sampling.plan_memory(network, noise, cond, **options, implementation=implementation)


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
    shapes = model.conditions(model.config, model.text)
    noise_key, *keys = jax.random.split(jax.random.key(seed), 1 + len(shapes))
    cond = {
        name: jax.random.normal(key, (batch, *shape)) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    if "guidance" in cond:
        cond["guidance"] = jnp.full(batch, model.distilled)
    if "mask" in cond:
        cond["mask"] = jnp.ones((batch, model.text), bool)  # the longest prompt
    return jax.random.normal(noise_key, (batch, tokens, model.channels)), cond
