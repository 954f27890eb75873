"""The networks, near-textbook Flax NNX, one file each."""

from chipmunk_jax.models.flux import Flux, FluxConfig

__all__ = ["Flux", "FluxConfig"]
