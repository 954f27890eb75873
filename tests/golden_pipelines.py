"""Whole pipelines of golden data: real folders out of what they share, and what diffusers made with them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = ("flux_dev_pipeline", "flux_schnell_pipeline", "wan21_pipeline", "wan22_pipeline")
PIXEL_LEVELS = 65_535  # pixels are stored in 16 bits


@dataclass(frozen=True)
class Case:
    """A call of a diffusers pipeline, and what it gave, f32."""

    settings: dict[str, Any]  # its arguments, prompts among them, as diffusers names them
    arrays: dict[str, np.ndarray]  # by name, see golden/README.md


def assemble(name: str, folder: Path) -> Path:
    """Writes the pipeline, in the layout that diffusers saves and reads, into `folder`, which it returns.

    A part that the golden folder lacks is that of another folder, which its shared.json names.
    """
    source = GOLDEN / name
    shared = json.loads((source / "shared.json").read_text())
    index = json.loads((source / "model_index.json").read_text())
    parts = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model_index.json", folder)
    for part in parts:
        shutil.copytree(GOLDEN / shared[part] if part in shared else source / part, folder / part)
    return folder


def cases(name: str) -> dict[str, Case]:
    """The calls of a pipeline by name."""
    from safetensors import safe_open

    with safe_open(GOLDEN / f"{name}.safetensors", "numpy") as file:
        found = {case: Case(settings, {}) for case, settings in json.loads(file.metadata()["cases"]).items()}
        for key in file.keys():  # noqa: SIM118, no dict
            case, _, what = key.partition(".")
            array = file.get_tensor(key)
            pixels = what == "pixels"
            found[case].arrays[what] = (array / PIXEL_LEVELS if pixels else array).astype(np.float32)
    return found
