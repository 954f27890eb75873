"""The networks, text encoders and VAEs, near-textbook Flax NNX, one file each; MODELS names them as checkpoints do."""

from chipmunk_jax.models.blocks import Component, Network
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig

MODELS: dict[str, type[Component]] = {"flux": Flux, "hunyuan_video": HunyuanVideo, "wan": Wan}

__all__ = [
    "MODELS",
    "Component",
    "Flux",
    "FluxConfig",
    "HunyuanVideo",
    "HunyuanVideoConfig",
    "Network",
    "Wan",
    "WanConfig",
]
