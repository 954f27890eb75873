"""Paths that a caller gives, checked where they come in."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from chipmunk_jax.errors import InputError


def as_path(given: Any) -> Path:
    """What a caller gave as a path; there may be nothing at it.

    Raises:
        InputError: it is no path, or one that this file system cannot have or this user cannot see.
    """
    if not isinstance(given, (str, Path)):
        raise InputError(f"path {given!r}: expected a str or a pathlib.Path")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(given)
    except (OSError, ValueError) as error:  # a name that is too long; a zero byte within it
        raise InputError(f"{given}: {getattr(error, 'strerror', None) or error}") from error
    return Path(given)


def check_parent(path: Path) -> None:
    """Raises InputError where there is no folder for a file or a folder that is to be written."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: no folder {path.parent}")
