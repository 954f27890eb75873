"""PNG files that say how they were made."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin


def check_writable(path: str | Path, suffixes: Sequence[str] = (".png",)) -> Path:
    """The path, if a file can be written there; called before long work.

    Args:
        path: of the file.
        suffixes: of which its name needs one; () for any.

    Raises:
        ValueError: another suffix, no such folder, or one that cannot be written.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path}: cannot be written")
    try:  # permissions do not tell: to root, /proc looks writable
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def write_png(path: Path, image: np.ndarray, text: Mapping[str, object]) -> None:
    """Writes an image [H, W, 3] with values in [0, 1], and what to keep in its metadata, words or JSON, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with whole(path) as partial:
        Image.fromarray(to_bytes(image)).save(partial, format="PNG", pnginfo=info)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, and is gone after an error."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def to_bytes(image: np.ndarray) -> np.ndarray:
    """[0, 1] as uint8."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
