"""Images as .png, videos as .mp4, animated .webp or a .png of their frames; each file says how it was made."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from chipmunk_jax.errors import InputError
from chipmunk_jax.paths import as_path, check_parent
from chipmunk_jax.whole import is_stream, locked, whole

IMAGES = (".png",)
VIDEOS = (".mp4", ".webp", ".png")
MOST_FPS = 1000  # WebP counts milliseconds
WEBP_SIDE = 16383  # pixels, the most of the format
SHEET_COLUMNS = 8  # frames in a row of a contact sheet
IMAGE_DESCRIPTION = 0x010E  # the tag of EXIF


def save_image(path: str | Path, image: np.ndarray | Image.Image, text: Mapping[str, object] | None = None) -> None:
    """Writes a .png, whole or not at all.

    Args:
        path: of the file.
        image: [H, W, 3], floats in [0, 1]; or a PIL image.
        text: kept in the file by name, words as they are and all else as JSON.

    Raises:
        InputError: a path that check_output() refuses, something else than an image, or a full disk.
    """
    _write_png(check_output(path, video=False), _pixels(image), text or {})


def save_video(
    path: str | Path,
    frames: np.ndarray | Sequence[Image.Image],
    fps: float,
    text: Mapping[str, object] | None = None,
) -> None:
    """Writes a video, whole or not at all, in the format of the path's suffix: .mp4, animated .webp, or .png of all frames.

    Args:
        path: of the file.
        frames: [T, H, W, 3], floats in [0, 1]; or PIL images of one size. Even in height and width for an .mp4.
        fps: frames per second, up to 1000; a .png has none.
        text: kept in the file: as in save_image() in a .png, as JSON in the comment of an .mp4 or the description of a .webp.

    Raises:
        InputError: a path that check_output() refuses, frames or a rate that the file cannot hold, or a full disk.
    """
    path = check_output(path, video=True)
    check_fps(fps, usual=fps)
    pixels = _frames(frames)
    sides = f"{path}: frames of {pixels.shape[2]} x {pixels.shape[1]} pixels"
    match path.suffix.lower():
        case ".png":
            _write_png(path, contact_sheet(pixels), text or {})
        case ".webp":
            if max(pixels.shape[1:3]) > WEBP_SIDE:
                raise InputError(f"{sides}: expected at most {WEBP_SIDE} a side in a .webp")
            _write_webp(path, pixels, fps, text)
        case ".mp4":
            if pixels.shape[1] % 2 or pixels.shape[2] % 2:
                raise InputError(
                    f"{sides}: expected even sides in an .mp4, as a colour is kept for four pixels together"
                )
            _write_mp4(path, pixels, fps, text)


def check_outputs(paths: Sequence[str | Path]) -> None:
    """Raises InputError where two files that are to be written are one; called before long work."""
    places = [os.path.realpath(path) for path in paths]
    if twice := [str(path) for i, path in enumerate(paths) if places[i] in places[:i] and not is_stream(path)]:
        raise InputError(f"{twice[0]}: written twice, expected a file for each")


def check_output(path: str | Path, *, video: bool) -> Path:
    """The path, if an image or a video can be written there; called before long work.

    Raises:
        InputError: as check_writable(), or an .mp4 and no PyAV.
    """
    path = check_writable(path, VIDEOS if video else IMAGES)
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise InputError(
            f"{path}: an .mp4 needs PyAV, which is not installed (pip install 'av>=14'); .webp needs nothing"
        )
    return path


def check_writable(path: str | Path, suffixes: Sequence[str] = ()) -> Path:
    """The path, if a file can be written there; called before long work.

    Args:
        path: of the file.
        suffixes: the name needs one of them; () for any name.

    Raises:
        InputError: another suffix, no such folder, or one that cannot be written.
    """
    path = as_path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    check_parent(path)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written")
    if path.is_file() or not path.exists():  # else a device
        with locked(path):  # permissions do not tell: to root, /proc looks writable
            pass
    return path


def most_bytes(path: Path, height: int, width: int, frames: int = 1) -> int:
    """Bytes that an image or a video of this size takes in a file: at most; of an .mp4, which gives up detail, a quarter."""
    return 3 * height * width * frames // (4 if path.suffix.lower() == ".mp4" else 1)


def check_fps(fps: float | None, usual: float | None) -> float | None:
    """Frames per second of a sample; None for an image.

    Args:
        fps: the rate asked for, or None.
        usual: the rate where none is asked for; None where samples are images.

    Raises:
        InputError: a rate for images, or one that no file can hold.
    """
    if fps is None:
        return usual
    if usual is None:
        raise InputError(f"fps={fps:g}: expected none, as this model makes images")
    if not 0 < fps <= MOST_FPS:
        raise InputError(f"fps={fps:g}: expected a number above 0 and up to {MOST_FPS}")
    return fps


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 of values in [0, 1], of any shape."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def contact_sheet(frames: np.ndarray, gap: int = 2) -> np.ndarray:
    """All frames [T, H, W, 3], uint8, in rows, in the order of reading, on white: [rows, columns, 3], uint8."""
    count, height, width, _ = frames.shape
    columns = min(count, SHEET_COLUMNS)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    """[H, W, 3], uint8."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return _checked(image, "[H, W, 3]")


def _frames(frames: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    """[T, H, W, 3], uint8."""
    if not isinstance(frames, Sequence) or not all(isinstance(frame, Image.Image) for frame in frames):
        return _checked(frames, "[T, H, W, 3]")
    if len(sizes := {frame.size for frame in frames}) != 1:
        raise InputError(f"{len(frames)} frames of {len(sizes)} sizes: expected at least one, and all of one size")
    return np.stack([_pixels(frame) for frame in frames])


def _checked(pixels: np.ndarray, shape: str) -> np.ndarray:
    pixels = np.asarray(pixels)
    if (
        pixels.dtype.kind not in "fV" or pixels.ndim != shape.count(",") + 1 or pixels.shape[-1] != 3 or not pixels.size
    ):  # V: bfloat16
        raise InputError(f"pixels {pixels.dtype} {pixels.shape}: expected {shape}, floats in 0 to 1, or PIL images")
    return to_bytes(pixels)


def _write_png(path: Path, pixels: np.ndarray, text: Mapping[str, object]) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        words = value if isinstance(value, str) else json.dumps(value)
        info.add_itxt(key, words.encode(errors="backslashreplace").decode())  # a shell may give bytes that are no UTF-8
    with whole(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=info)


def _write_webp(path: Path, frames: np.ndarray, fps: float, text: Mapping[str, object] | None) -> None:
    """Without loss: small pictures show it at once."""
    exif = Image.Exif()
    if text:
        exif[IMAGE_DESCRIPTION] = json.dumps(text)
    ends = np.round(np.arange(len(frames) + 1) * 1000 / fps)  # in whole milliseconds, so that their sum is right
    first, *others = map(Image.fromarray, frames)
    options = dict(duration=np.diff(ends).astype(int).tolist(), loop=0, lossless=True, minimize_size=True, exif=exif)
    with whole(path) as partial:
        first.save(partial, format="WEBP", save_all=True, append_images=others, **options)


def _write_mp4(path: Path, frames: np.ndarray, fps: float, text: Mapping[str, object] | None) -> None:
    """H.264 in YUV 4:2:0, which every player and browser shows."""
    import av  # an extra of the package

    with whole(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        if text:
            container.metadata["comment"] = json.dumps(text)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # frames that the encoder still holds
