"""Dense samples, sparse ones and their differences, drawn beside each other with a caption each."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from chipmunk_jax.media import to_bytes

ZOOM = 3  # so that a person sees 64 pixels
GAIN = 5  # of the differences
SHOWN_FRAMES = 6  # of a video on paper
TITLES = ("dense", "sparse", f"difference x {GAIN}")


def compare_images(captions: Sequence[str], dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """A row an image: dense, sparse, difference around grey; [H, W, 3] in [0, 1], of images [B, H, W, 3]."""
    return _table(TITLES, captions, zip(*_compared(dense, sparse), strict=True))


def compare_videos(captions: Sequence[str], dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """compare_images of every frame; [T, H, W, 3] in [0, 1], of videos [B, T, H, W, 3]."""
    return np.stack([compare_images(captions, dense[:, t], sparse[:, t]) for t in range(dense.shape[1])])


def compare_frames(captions: Sequence[str], dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Three rows a video: some frames dense, sparse, and their difference; [H, W, 3] in [0, 1], of videos [B, T, H, W, 3]."""
    frames = np.linspace(0, dense.shape[1] - 1, min(SHOWN_FRAMES, dense.shape[1])).round().astype(int)
    rows = [kind[:, frames] for kind in _compared(dense, sparse)]
    lines = [line for caption in captions for line in (TITLES[0], f"{TITLES[1]}, {caption}", TITLES[2])]
    videos = range(len(captions))
    return _table([f"frame {t + 1}" for t in frames], lines, [row[i] for i in videos for row in rows])


def _compared(dense: np.ndarray, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return dense, sparse, 0.5 + GAIN * (sparse - dense)


def _table(titles: Sequence[str], captions: Sequence[str], rows) -> np.ndarray:
    """Pictures [h, w, 3] of all rows under the titles of their columns, each row over its caption."""
    rows = list(map(list, rows))
    height, width = (ZOOM * n for n in rows[0][0].shape[:2])
    gap, line = 8, 16
    size = (len(titles) * (width + gap) + gap, len(rows) * (height + line + gap) + line + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 4), title, fill="black")
    for row, (caption, pictures) in enumerate(zip(captions, rows, strict=True)):
        top = line + gap + row * (height + line + gap)
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(to_bytes(pixels)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (width + gap), top))
        draw.text((gap, top + height + 2), caption, fill="black")
    return np.asarray(sheet) / 255
