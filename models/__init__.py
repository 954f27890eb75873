"""The networks, near-textbook Flax NNX, one file each."""

from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig

__all__ = ["Flux", "FluxConfig", "HunyuanVideo", "HunyuanVideoConfig", "Wan", "WanConfig"]
