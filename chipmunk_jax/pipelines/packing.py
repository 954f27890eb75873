"""Tokens and what they are patches of: latents, or the pixels of the small models."""

import math
from collections.abc import Sequence

import numpy as np


def unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels from -1 to 1 as 0 to 1."""
    return np.clip((pixels + 1) / 2, 0, 1)


def pack(latents: np.ndarray, patch: Sequence[int], *, channels_first: bool) -> np.ndarray:
    """Tokens [B, N, C] in raster order, of latents [B, .., c] with as many sides as a patch.

    Args:
        latents: channels last.
        patch: latent pixels of a token, along each side.
        channels_first: whether a token's values are (channel, row, column), else (.., row, column, channel).
    """
    axes = len(patch)
    grid = [size // side for size, side in zip(latents.shape[1:-1], patch, strict=True)]
    x = latents.reshape(len(latents), *(n for pair in zip(grid, patch, strict=True) for n in pair), latents.shape[-1])
    outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    last = [2 * axes + 1]
    x = x.transpose(0, *outer, *(last + list(inner) if channels_first else list(inner) + last))
    return x.reshape(len(latents), math.prod(grid), -1)


def unpack(tokens: np.ndarray, grid: Sequence[int], patch: Sequence[int], *, channels_first: bool) -> np.ndarray:
    """The inverse of pack()."""
    axes, channels = len(patch), tokens.shape[-1] // math.prod(patch)
    inside = (channels, *patch) if channels_first else (*patch, channels)
    x = tokens.reshape(len(tokens), *grid, *inside)
    if channels_first:
        x = np.moveaxis(x, 1 + axes, -1)
    pairs = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
    x = x.transpose(0, *pairs, 1 + 2 * axes)
    return x.reshape(len(tokens), *(n * side for n, side in zip(grid, patch, strict=True)), channels)
