"""Samples as pictures inside an HTML page: data URIs of WebP, which every browser shows."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from chipmunk_jax.media import to_bytes
from chipmunk_jax.report.sheets import shown_frames, with_difference

SMALL = 256  # pixels a side: up to here pictures are kept exact, and shown enlarged without smoothing
QUALITY = 92  # of larger ones, of 100: about a sixth of their bytes
FRAME = 240  # pixels, the width of a video's frames on paper


@dataclass(frozen=True)
class Picture:
    """One sample, or the difference of two, as addresses of an <img>."""

    uri: str  # of an image, or of all frames as an animation
    frames: tuple[str, ...] = ()  # of a video: some of its frames
    crisp: bool = False  # whether pixels are to be seen as they are


def pictures_of(samples: Mapping[str, np.ndarray], fps: float | None) -> list[dict[str, Picture]]:
    """For each sample its pictures by name of the way, and the difference of sparse and dense at the end.

    Args:
        samples: [B, H, W, 3] or [B, T, H, W, 3] in 0..1, "dense" and "sparse" among them.
        fps: of videos.
    """
    shown = with_difference(samples)
    return [
        {name: _picture(to_bytes(found[i]), fps) for name, found in shown.items()} for i in range(len(samples["dense"]))
    ]


def _picture(pixels: np.ndarray, fps: float | None) -> Picture:
    """Of [H, W, 3], or of [T, H, W, 3]."""
    crisp = max(pixels.shape[-3:-1]) <= SMALL
    if pixels.ndim == 3:
        return Picture(_uri([Image.fromarray(pixels)]), crisp=crisp)
    frames = [Image.fromarray(frame) for frame in pixels]
    some = [frames[t] for t in shown_frames(len(frames))]
    if not crisp:
        some = [frame.resize((FRAME, max(1, round(FRAME * frame.height / frame.width)))) for frame in some]
    return Picture(_uri(frames, fps), tuple(_uri([frame]) for frame in some), crisp)


def _uri(frames: Sequence[Image.Image], fps: float | None = None) -> str:
    first, *others = frames
    kind = dict(lossless=True) if max(first.size) <= SMALL else dict(quality=QUALITY)
    motion = dict(save_all=True, append_images=others, duration=round(1000 / fps), loop=0) if fps and others else {}
    file = io.BytesIO()
    first.save(file, format="WEBP", **kind, **motion)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
