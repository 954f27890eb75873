"""The networks, text encoders and VAEs, near-textbook Flax NNX, one file each; MODELS names them as checkpoints do."""

from chipmunk_jax.models.blocks import Component, Network
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.flux_vae import FluxVae, FluxVaeConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig
from chipmunk_jax.models.wan_vae import WanVae, WanVaeConfig

MODELS: dict[str, type[Component]] = {
    "flux": Flux,
    "hunyuan_video": HunyuanVideo,
    "wan": Wan,
    "flux_vae": FluxVae,
    "wan_vae": WanVae,
}

__all__ = [
    "MODELS",
    "Component",
    "Flux",
    "FluxConfig",
    "FluxVae",
    "FluxVaeConfig",
    "HunyuanVideo",
    "HunyuanVideoConfig",
    "Network",
    "Wan",
    "WanConfig",
    "WanVae",
    "WanVaeConfig",
]
