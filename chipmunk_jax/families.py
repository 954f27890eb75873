"""What differs between the small models that make pixels: how a token is packed, how a sample is made, what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from chipmunk_jax.solvers import Euler, Solver, UniPC, flux_timesteps, wan_timesteps

SIZES = ("frames", "height", "width")  # of a video; the last two of an image


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture in pixel space."""

    patch: tuple[int, ...]  # pixels on the sides of a token, an axis each: (rows, columns) or (frames, rows, columns)
    channels_first: bool  # whether a token's values are (channel, row, column), else (.., row, column, channel)
    conditions: tuple[str, ...]  # of WordTable.encode, those that the network takes
    solver: Solver
    timesteps: Callable[[int, int], np.ndarray]  # steps, tokens -> f32 [steps + 1]
    defaults: dict[str, Any]  # of a sample: its sizes, steps and guidance
    fps: int | None = None  # frames a second that a video is shown at; None: images

    @property
    def video(self) -> bool:
        """Whether samples are videos, else images."""
        return self.fps is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the sides of a sample."""
        return SIZES[-len(self.patch) :]

    def complete(self, **settings: Any) -> dict[str, Any]:
        """Frames (of a video alone), height, width, steps and guidance; the defaults where those given are None or none are.

        Raises:
            ValueError: frames of an image, or another name.
        """
        if not self.video and (frames := settings.pop("frames", None)) is not None:
            raise ValueError(f"frames={frames}: expected none, as this model makes images")
        if unknown := settings.keys() - self.defaults.keys():
            raise ValueError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(self.defaults)}")
        return self.defaults | {name: value for name, value in settings.items() if value is not None}

    def grid(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """Tokens along each side of a sample of such frames, height and width.

        Raises:
            ValueError: a side that is no positive multiple of a token's.
        """
        for name, side in zip(self.axes, self.patch, strict=True):
            if settings[name] < side or settings[name] % side:
                expected = f"a positive multiple of {side} pixels" if side > 1 else "at least 1"
                raise ValueError(f"{name}={settings[name]}: expected {expected}")
        return tuple(settings[name] // side for name, side in zip(self.axes, self.patch, strict=True))

    @property
    def channels(self) -> int:
        """Values of a token."""
        return 3 * int(np.prod(self.patch))

    def to_pixels(self, tokens: jax.typing.ArrayLike, grid: tuple[int, ...]) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3], f32 in [0, 1], of tokens [B, N, channels] in [-1, 1] and raster order."""
        axes = len(grid)
        inside = (3, *self.patch) if self.channels_first else (*self.patch, 3)
        x = np.asarray(tokens).reshape(-1, *grid, *inside)
        if self.channels_first:
            x = np.moveaxis(x, 1 + axes, -1)
        pairs = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
        x = x.transpose(0, *pairs, 1 + 2 * axes)
        return np.clip((x.reshape(-1, *np.multiply(grid, self.patch), 3) + 1) / 2, 0, 1)


FAMILIES = {
    "flux": Family(
        patch=(2, 2),
        channels_first=True,
        conditions=("text", "pooled"),
        solver=Euler(),
        timesteps=flux_timesteps,
        defaults=dict(height=64, width=64, steps=28, guidance=2.0),
    ),
    "wan": Family(
        patch=(1, 4, 4),
        channels_first=False,
        conditions=("text",),
        solver=UniPC(),
        timesteps=lambda steps, tokens: wan_timesteps(steps, shift=3.0),
        defaults=dict(frames=16, height=64, width=64, steps=30, guidance=3.0),
        fps=8,  # the published models' 16 would show a small model's 16 frames in a second
    ),
}
