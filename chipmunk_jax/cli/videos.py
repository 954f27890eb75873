"""Clips as .mp4, animated .webp or a .png of their frames, that say how they were made."""

import importlib.util
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from chipmunk_jax.cli.images import check_writable, to_bytes, whole, write_png
from chipmunk_jax.families import Family

SUFFIXES = (".mp4", ".webp", ".png")
MOST_FPS = 1000  # WebP counts milliseconds
SHEET_COLUMNS = 8  # frames in a row of a contact sheet
IMAGE_DESCRIPTION = 0x010E  # the tag of EXIF


def check_output(path: str | Path, family: Family) -> Path:
    """The path, if a sample of the family can be written there; called before long work.

    Raises:
        ValueError: as check_writable, or an .mp4 and no PyAV.
    """
    path = check_writable(path, SUFFIXES if family.video else (".png",))
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise ValueError(
            f"{path}: an .mp4 needs PyAV, which is not installed (pip install 'av>=14'); .webp needs nothing"
        )
    return path


def check_fps(fps: float | None, family: Family) -> float | None:
    """Frames a second that samples of the family are shown at: the family's own where None is given, None for images.

    Raises:
        ValueError: some for images, or a number that no file can hold.
    """
    if fps is None:
        return family.fps
    if not family.video:
        raise ValueError(f"--fps {fps:g}: expected none, as this model makes images")
    if not 0 < fps <= MOST_FPS:
        raise ValueError(f"--fps {fps:g}: expected a number above 0 and up to {MOST_FPS}")
    return fps


def write_video(path: Path, frames: np.ndarray, fps: float, text: Mapping[str, object]) -> None:
    """Writes frames [T, H, W, 3] with values in [0, 1], whole or not at all, in the format of the path's suffix.

    Args:
        path: checked by check_output.
        frames: even in height and width for an .mp4.
        fps: frames a second; not in a .png.
        text: kept in the file: as text of a .png, as JSON in the comment of an .mp4 or the description of a .webp.
    """
    match path.suffix.lower():
        case ".png":
            write_png(path, contact_sheet(frames), text)
        case ".webp":
            _write_webp(path, to_bytes(frames), fps, text)
        case ".mp4":
            _write_mp4(path, to_bytes(frames), fps, text)


def contact_sheet(frames: np.ndarray, gap: int = 2) -> np.ndarray:
    """All frames [T, H, W, 3] in rows, in the order of reading, on white."""
    count, height, width, _ = frames.shape
    columns = min(count, SHEET_COLUMNS)
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), frames.dtype)
    for i, frame in enumerate(frames):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _write_webp(path: Path, frames: np.ndarray, fps: float, text: Mapping[str, object]) -> None:
    """Without loss: small pictures show it at once."""
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = json.dumps(text)
    ends = np.round(np.arange(len(frames) + 1) * 1000 / fps)  # in whole milliseconds, so that their sum is right
    first, *others = map(Image.fromarray, frames)
    options = dict(duration=np.diff(ends).astype(int).tolist(), loop=0, lossless=True, minimize_size=True, exif=exif)
    with whole(path) as partial:
        first.save(partial, format="WEBP", save_all=True, append_images=others, **options)


def _write_mp4(path: Path, frames: np.ndarray, fps: float, text: Mapping[str, object]) -> None:
    """H.264 in YUV 4:2:0, which every player and browser shows."""
    import av

    with whole(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(text)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # what it held back
