"""The networks, near-textbook Flax NNX, one file each; MODELS names them as checkpoints do."""

from chipmunk_jax.models.blocks import Network
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig

MODELS: dict[str, type[Network]] = {"flux": Flux, "hunyuan_video": HunyuanVideo, "wan": Wan}

__all__ = ["MODELS", "Flux", "FluxConfig", "HunyuanVideo", "HunyuanVideoConfig", "Network", "Wan", "WanConfig"]
