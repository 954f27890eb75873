"""The networks, text encoders and VAEs, near-textbook Flax NNX, one file each; MODELS names them as checkpoints do."""

from chipmunk_jax.models.blocks import Component, Network
from chipmunk_jax.models.clip import ClipText, ClipTextConfig
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.flux_vae import FluxVae, FluxVaeConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.t5 import UMT5_XXL, T5Config, T5Encoder
from chipmunk_jax.models.wan import Wan, WanConfig
from chipmunk_jax.models.wan_vae import WanVae, WanVaeConfig

MODELS: dict[str, type[Component]] = {
    "flux": Flux,
    "hunyuan_video": HunyuanVideo,
    "wan": Wan,
    "clip_text": ClipText,
    "t5": T5Encoder,
    "flux_vae": FluxVae,
    "wan_vae": WanVae,
}

__all__ = [
    "MODELS",
    "UMT5_XXL",
    "ClipText",
    "ClipTextConfig",
    "Component",
    "Flux",
    "FluxConfig",
    "FluxVae",
    "FluxVaeConfig",
    "HunyuanVideo",
    "HunyuanVideoConfig",
    "Network",
    "T5Config",
    "T5Encoder",
    "Wan",
    "WanConfig",
    "WanVae",
    "WanVaeConfig",
]
