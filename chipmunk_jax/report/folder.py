"""The folder of a report: a page that needs nothing else, and its numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_writable
from chipmunk_jax.paths import as_path
from chipmunk_jax.report.page import page
from chipmunk_jax.report.pictures import pictures_of
from chipmunk_jax.report.verify import Verification
from chipmunk_jax.whole import whole

PAGE, NUMBERS = "index.html", "report.json"


def check_folder(path: str | Path) -> Path:
    """The path, if a report can be written there; called before long work.

    Raises:
        InputError: a file, no folder around it, or one that cannot be written.
    """
    path = as_path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: a file, expected a folder for the report")
    for file in files_of(path) if path.is_dir() else (path,):
        check_writable(file)
    return path


def files_of(folder: Path) -> list[Path]:
    """The paths of the files of a report in a folder, the page first."""
    return [folder / PAGE, folder / NUMBERS]


def write_report(folder: Path, found: Verification, floor: Mapping[str, Any], fps: float | None) -> list[Path]:
    """The paths of the files of a report that it writes, each whole or not at all; other files of the folder stay.

    Args:
        folder: of check_folder(); made where there is none.
        found: of verify().
        floor: of noise_floor().
        fps: of videos.
    """
    numbers = found.numbers | found.details | {"noise_floor": dict(floor)}
    texts = page(numbers, pictures_of(found.samples, fps)), json.dumps(numbers, indent=1) + "\n"
    folder.mkdir(exist_ok=True)
    files = files_of(folder)
    for path, text in zip(files, texts, strict=True):
        with whole(path) as file:
            file.write_text(text, encoding="utf-8")
    return files
