"""Dense samples, sparse ones, their rivals and the difference of the sparse ones, drawn beside each other."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from chipmunk_jax.media import to_bytes

ZOOM = 3  # so that a person sees 64 pixels
GAIN = 5  # of the differences
SHOWN_FRAMES = 6  # of a video on paper
DIFFERENCE = f"difference x {GAIN}"
GAP, LINE = 8, 16  # pixels

Ways = Mapping[str, np.ndarray]  # samples, f32 in 0..1, by how they were made: "dense", "sparse", and rivals
Levels = Mapping[str, Sequence[float]]  # PSNR of each sample to the dense one, dB, by how it was made


def compare_images(prompts: Sequence[str], ways: Ways, levels: Levels) -> np.ndarray:
    """A sheet, f32 [H, W, 3] in [0, 1], a row an image: dense, sparse, rivals, and the sparse one's difference around grey.

    Args:
        prompts: above the rows.
        ways: images [B, H, W, 3].
        levels: beneath the pictures.
    """
    shown = with_difference(ways)
    rows = [[pictures[i] for pictures in shown.values()] for i in range(len(prompts))]
    captions = [[_decibels(levels, name, i) for name in shown] for i in range(len(prompts))]
    return _table(list(shown), prompts, captions, rows)


def compare_videos(prompts: Sequence[str], ways: Ways, levels: Levels) -> np.ndarray:
    """A sheet of every frame, f32 [T, H, W, 3] in [0, 1], as compare_images() draws it of videos [B, T, H, W, 3]."""
    frames = range(ways["dense"].shape[1])
    at = lambda t: {name: videos[:, t] for name, videos in ways.items()}
    return np.stack([compare_images(prompts, at(t), levels) for t in frames])


def compare_frames(prompts: Sequence[str], ways: Ways, levels: Levels) -> np.ndarray:
    """A sheet, f32 [H, W, 3] in [0, 1], a row a way and video, some frames of it; arguments as of compare_videos()."""
    shown = with_difference(ways)
    frames = shown_frames(ways["dense"].shape[1])
    each = [(i, name) for i in range(len(prompts)) for name in shown]
    first = next(iter(shown))
    titles = [prompts[i] if name == first else "" for i, name in each]
    captions = [[", ".join(filter(None, (name, _decibels(levels, name, i))))] for i, name in each]
    return _table([f"frame {t + 1}" for t in frames], titles, captions, [shown[name][i, frames] for i, name in each])


def with_difference(ways: Ways) -> dict[str, np.ndarray]:
    """The samples by name, and at the end GAIN times the difference of the sparse ones from the dense ones, around 0.5."""
    return {**ways, DIFFERENCE: 0.5 + GAIN * (ways["sparse"] - ways["dense"])}


def shown_frames(count: int) -> np.ndarray:
    """Numbers of the frames, of so many, that are shown on paper: at most SHOWN_FRAMES, the first and the last among them."""
    return np.linspace(0, count - 1, min(SHOWN_FRAMES, count)).round().astype(int)


def _decibels(levels: Levels, name: str, i: int) -> str:
    return f"{levels[name][i]:.1f} dB" if name in levels else ""


def _table(columns: Sequence[str], titles: Sequence[str], captions: Sequence[Sequence[str]], rows) -> np.ndarray:
    """Pictures [h, w, 3] in rows, beneath the titles of their columns; above each row its own, beneath its pictures captions."""
    rows = list(map(list, rows))
    height, width = (ZOOM * n for n in rows[0][0].shape[:2])
    left = lambda column: GAP + column * (width + GAP)
    tall = height + 2 * LINE + GAP
    sheet = Image.new("RGB", (left(len(columns)), len(rows) * tall + LINE + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((left(column), 4), title, fill="black")
    for row, (title, texts, pictures) in enumerate(zip(titles, captions, rows, strict=True)):
        top = LINE + GAP + row * tall
        draw.text((GAP, top), title, fill="black")
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(to_bytes(pixels)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left(column), top + LINE))
        for column, text in enumerate(texts):
            draw.text((left(column), top + LINE + height + 2), text, fill="black")
    return np.asarray(sheet) / 255
