"""FLUX.1 transformer (Black Forest Labs, 2024): 19 double-stream and 38 single-stream blocks on [text, image] tokens.

Config fields are named as in the original. A token is a 2x2 patch of 16 latent channels, in the order channel, row, column.
"""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from chipmunk_jax.model import Condition
from chipmunk_jax.models.blocks import grid_positions
from chipmunk_jax.models.mmdit import MMDiT, MMDiTConfig
from chipmunk_jax.schedule import Step


@dataclass(frozen=True, kw_only=True)
class FluxConfig(MMDiTConfig):
    """Sizes of a FLUX transformer; the defaults are FLUX.1-dev, guidance_embed=False is FLUX.1-schnell."""

    in_channels: int = 64  # of a token: 16 latent channels x a 2x2 patch
    depth: int = 19
    depth_single_blocks: int = 38
    theta: int = 10_000

    @property
    def text_rows(self) -> tuple[int, int]:
        """Fewest and most rows of text: as many as the published model of this kind was trained with, or fewer."""
        return 1, 512 if self.guidance_embed else 256


class Flux(MMDiT):
    """Velocity of a noisy image, given text: dx/dt at time t, where t = 1 is noise and t = 0 the image.

    Conditions: "text" [B, T, context_in_dim]; "pooled" [B, vec_in_dim]; "guidance" [B], f32, the plain scale, where
    guidance_embed.
    """

    config_class = FluxConfig
    text_first = True

    @property
    def channels(self) -> int:
        """Values of a token."""
        return self.config.in_channels

    def text_embedder(self, **linear) -> nnx.Linear:
        """A linear layer."""
        return nnx.Linear(self.config.context_in_dim, self.config.hidden_size, **linear)

    def text_tokens(self, cond: Condition, t: jax.Array, step: Step | None) -> tuple[jax.Array, None]:
        """[B, T, D], all of them valid."""
        return self.txt_in(cond["text"].astype(self.dtype)), None

    def positions(self, grid: tuple[int, ...]) -> np.ndarray:
        """(0, row, column) of every image token of a grid (rows, columns), in raster order, f32 [N, 3]."""
        return np.pad(grid_positions(grid, axes=2), ((0, 0), (1, 0)))
