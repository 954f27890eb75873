"""How a model is sampled where nobody says otherwise: the published ones as their authors do, the small ones in pixels."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideoConfig
from chipmunk_jax.models.wan import WanConfig
from chipmunk_jax.pinned_keys import check_grid
from chipmunk_jax.schedule import check_schedules
from chipmunk_jax.solvers import Euler, Solver, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
from chipmunk_jax.sparsity import PRESETS, Sparsity

SIZES = ("frames", "height", "width")  # of a video; the last two of an image
COLOURS = 3  # channels of a pixel: a model that has as many makes pixels, without a VAE

# What Wan2.1's own code guides away from (wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a sample of a model is made with where nobody says otherwise."""

    preset: str  # of sparsity
    patch: tuple[int, ...]  # pixels that a token stands for, an axis each: (rows, columns) or (frames, rows, columns)
    height: int  # pixels
    width: int
    frames: int | None = None  # None: images
    fps: int | None = None  # frames a second that a video is shown at
    lone_first: bool = False  # whether the first frame has tokens of its own, and only those after it share them
    steps: int = 50
    solver: Solver = field(default_factory=Euler)
    shift: float | None = None  # of the times; None: by the number of tokens, as in FLUX.1-dev
    guidance: float | None = None  # scale of true guidance, as sample() takes it; None: none
    distilled: float | None = None  # scale of a guidance that is a condition, cond["guidance"]
    negative_prompt: str = ""  # the other side of true guidance
    text: int  # rows of a text, at most, or in Wan always

    @property
    def video(self) -> bool:
        """Whether samples are videos, else images."""
        return self.frames is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the sides of a sample."""
        return SIZES[-len(self.patch) :]

    def complete(self, **settings: Any) -> dict[str, Any]:
        """Frames (of a video alone), height, width, steps and guidance; the defaults where those given are None or none are.

        Raises:
            InputError: frames of an image, or another name.
        """
        if not self.video and (frames := settings.pop("frames", None)) is not None:
            raise InputError(f"frames={frames}: expected none, as this model makes images")
        usual = {name: getattr(self, name) for name in (*self.axes, "steps", "guidance")}
        if unknown := settings.keys() - usual.keys():
            raise InputError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(usual)}")
        return usual | {name: value for name, value in settings.items() if value is not None}

    def grid(self, settings: dict[str, Any] | None = None) -> tuple[int, ...]:
        """Tokens along each side of a sample of such frames, height and width; None: of the usual ones.

        Raises:
            InputError: a side that tokens do not fill.
        """
        settings = self.complete() if settings is None else settings
        return tuple(self._tokens(name, side, settings[name]) for name, side in zip(self.axes, self.patch, strict=True))

    def _tokens(self, name: str, side: int, pixels: int) -> int:
        lone = int(self.lone_first and name == "frames")
        whole = isinstance(pixels, (int, np.integer)) and not isinstance(pixels, bool)
        if not whole or pixels < max(lone, 1) or (pixels - lone) % side:
            unit = "" if name == "frames" else " pixels"
            expected = f"a positive multiple of {side}{unit}" if side > 1 else "at least 1"
            expected = f"a multiple of {side}, and one" if lone else expected
            raise InputError(f"{name}={pixels}: expected {expected if whole else 'a whole number'}")
        return lone + (pixels - lone) // side

    def check_sparsity(self, sparsity: Sparsity, grid: tuple[int, ...], steps: int | None = None) -> None:
        """Raises InputError where a Sparsity does not fit grid or steps; it names the model's own preset if that one does."""
        if error := _misfit(sparsity, grid, steps):
            advice = (
                "" if _misfit(PRESETS[self.preset], grid, steps) else f"; the model's own preset, {self.preset}, fits"
            )
            raise InputError(f"{error}{advice}")

    def timesteps(self, steps: int | None = None, tokens: int | None = None) -> np.ndarray:
        """Times for sample(), f32 [steps + 1], of the usual steps and tokens where these are None.

        Raises:
            InputError: steps below 1, or absurdly many.
        """
        steps = self.steps if steps is None else steps
        if self.shift is None:
            return flux_timesteps(steps, math.prod(self.grid()) if tokens is None else tokens)
        return (wan_timesteps if isinstance(self.solver, UniPC) else shifted_timesteps)(steps, self.shift)


def _misfit(sparsity: Sparsity, grid: tuple[int, ...], steps: int | None) -> str | None:
    try:
        check_grid(sparsity, grid)
        if steps is not None:
            check_schedules(sparsity, steps)
    except InputError as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True)
class Family(Defaults):
    """A model in pixel space: how a token is packed, too."""

    channels_first: bool  # whether a token's values are (channel, row, column), else (.., row, column, channel)
    conditions: tuple[str, ...]  # of WordTable.encode, those that the network takes

    @property
    def channels(self) -> int:
        """Values of a token."""
        return COLOURS * math.prod(self.patch)

    def to_pixels(self, tokens: jax.typing.ArrayLike, grid: tuple[int, ...]) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3], f32 in [0, 1], of tokens [B, N, channels] in [-1, 1] and raster order."""
        axes = len(grid)
        inside = (COLOURS, *self.patch) if self.channels_first else (*self.patch, COLOURS)
        x = np.asarray(tokens).reshape(-1, *grid, *inside)
        if self.channels_first:
            x = np.moveaxis(x, 1 + axes, -1)
        pairs = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
        x = x.transpose(0, *pairs, 1 + 2 * axes)
        return np.clip((x.reshape(-1, *np.multiply(grid, self.patch), COLOURS) + 1) / 2, 0, 1)


TEXT_ROWS = 16  # of the small models' text: one for each attribute, then zeros
FAMILIES = {
    "flux": Family(
        preset="mini-flux",
        patch=(2, 2),
        height=64,
        width=64,
        steps=28,
        guidance=2.0,
        text=TEXT_ROWS,
        channels_first=True,
        conditions=("text", "pooled"),
    ),
    "wan": Family(
        preset="mini-wan",
        patch=(1, 4, 4),
        frames=16,
        height=64,
        width=64,
        fps=8,  # the published models' 16 would show a small model's 16 frames in a second
        steps=30,
        solver=UniPC(),
        shift=3.0,
        guidance=3.0,
        text=TEXT_ROWS,
        channels_first=False,
        conditions=("text",),
    ),
}

# A VAE halves the sides three times and the transformer's patch once more; of a video the VAE takes four frames together.
_IMAGE, _VIDEO = dict(patch=(16, 16)), dict(patch=(4, 16, 16), lone_first=True)
_WAN = dict(
    **_VIDEO, frames=81, fps=16, solver=UniPC(), shift=5.0, guidance=5.0, negative_prompt=NEGATIVE_PROMPT, text=512
)
# By the authors' own code: black-forest-labs/flux, Tencent-Hunyuan/HunyuanVideo sample_video.py and hyvideo/config.py,
# Wan-Video/Wan2.1 generate.py and wan/configs. Of FLUX.1 the size is the one of the Chipmunk paper.
PUBLISHED = {
    "flux-dev": Defaults(**_IMAGE, preset="flux", height=768, width=1280, distilled=3.5, text=512),
    "flux-schnell": Defaults(**_IMAGE, preset="flux", height=768, width=1280, steps=4, shift=1.0, text=256),
    "hunyuan-video": Defaults(
        **_VIDEO, preset="hunyuan-video", height=720, width=1280, frames=129, fps=24, shift=7.0, distilled=6.0, text=256
    ),
    # Guidance 6 and a shift of 8 to 12 are what Wan's README recommends for this one, over the 5 and 5 of its code.
    "wan-1.3b": Defaults(**_WAN | dict(shift=8.0, guidance=6.0), preset="wan-1.3b", height=480, width=832),
    "wan-14b": Defaults(**_WAN, preset="wan-14b", height=720, width=1280),
    "wan-i2v-14b": Defaults(
        **_WAN | dict(steps=40, negative_prompt=f"镜头晃动，{NEGATIVE_PROMPT}"),
        preset="wan-14b", height=720, width=1280,
    ),
}  # fmt: skip
SMALL_IMAGE, SMALL_SHIFT = 480 * 832, 3.0  # image to video at 480p, whose checkpoint has the sizes of the one for 720p


def defaults(
    config: FluxConfig | HunyuanVideoConfig | WanConfig, *, height: int | None = None, width: int | None = None
) -> Defaults:
    """How a model with this config is usually sampled, `defaults(load(folder).config)`; a Family where it makes pixels.

    Args:
        config: of any of the models, whatever its sizes: those of none published count as the nearest.
        height, width: pixels, in place of the usual ones; the shift of Wan's image to video follows them.
    """
    found = _nearest(config)
    given = {"height": height, "width": width}
    found = replace(found, **{name: size for name, size in given.items() if size is not None})
    if getattr(config, "image_dim", None) and found.height * found.width <= SMALL_IMAGE:
        found = replace(found, shift=SMALL_SHIFT)
    return found


def _nearest(config: FluxConfig | HunyuanVideoConfig | WanConfig) -> Defaults:
    match config:
        case FluxConfig():
            side = math.isqrt(config.in_channels // COLOURS)
            if config.in_channels == COLOURS * side**2:
                return replace(FAMILIES["flux"], patch=(side, side))
            return PUBLISHED["flux-dev" if config.guidance_embed else "flux-schnell"]
        case HunyuanVideoConfig():
            return PUBLISHED["hunyuan-video"]
        case WanConfig(out_dim=3):
            return replace(FAMILIES["wan"], patch=config.patch_size)
        case WanConfig(image_dim=int()):
            return PUBLISHED["wan-i2v-14b"]
        case WanConfig():
            return PUBLISHED["wan-1.3b" if config.dim <= WanConfig.dim else "wan-14b"]
    raise InputError(f"config {type(config).__name__}: expected a FluxConfig, HunyuanVideoConfig or WanConfig")
