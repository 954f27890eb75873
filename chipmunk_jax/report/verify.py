"""Dense and sparse samples of the same prompts and seeds: how near they come, and in what time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.media import save_image, save_video
from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.quality import psnr
from chipmunk_jax.report.sheets import compare_frames, compare_images, compare_videos
from chipmunk_jax.sparsity import Sparsity, to_dict

SAME = 1000.0  # dB, in place of the infinity of equal samples, which JSON cannot hold


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Samples [B, H, W, 3] or [B, T, H, W, 3] in 0..1, and numbers about them that JSON can hold."""

    dense: np.ndarray
    sparse: np.ndarray
    numbers: dict[str, Any]

    def draw(self, path: Path, fps: float | None) -> None:
        """Writes dense, sparse and their difference side by side; of videos to a .png some frames, else all."""
        levels = zip(self.numbers["prompts"], self.numbers["psnr"], strict=True)
        captions, text = [f"{prompt}: {level:.1f} dB" for prompt, level in levels], {"settings": self.numbers}
        if self.dense.ndim == 4:
            save_image(path, compare_images(captions, self.dense, self.sparse), text)
        elif path.suffix.lower() == ".png":
            save_image(path, compare_frames(captions, self.dense, self.sparse), text)
        else:
            save_video(path, compare_videos(captions, self.dense, self.sparse), fps, text)


def check_verify(pipeline: Pipeline, prompts: Sequence[str], *, sparsity: Any = "auto", **settings: Any) -> Request:
    """What verify() would sample, sparse.

    Raises:
        InputError: what Pipeline.check() refuses; no sparsity; one step, as the first is not timed.
    """
    request = pipeline.check(prompts, sparsity=sparsity, **settings)
    if request.sparsity is None:
        raise InputError("sparsity=None: expected some, to compare with dense samples")
    if request.settings["steps"] == 1:
        raise InputError("num_inference_steps=1: expected at least 2, as the first is not timed")
    return request


def verify(pipeline: Pipeline, prompts: Sequence[str], *, sparsity: Any = "auto", **settings: Any) -> Verification:
    """Samples the same prompts and seeds twice, dense and sparse.

    Args:
        pipeline: of the model.
        prompts: sentences.
        sparsity, settings: as a call of the pipeline takes them.

    Raises:
        InputError: see check_verify().
    """
    request = check_verify(pipeline, prompts, sparsity=sparsity, **settings)
    dense, dense_seconds = _timed(pipeline, prompts, settings, None)
    sparse, sparse_seconds = _timed(pipeline, prompts, settings, request.sparsity)
    steps = request.settings["steps"]
    dense_seconds *= steps / (steps - 1)
    sparse_seconds += dense_seconds / steps  # its first step is full, as long as a dense one
    pairs = list(zip(pixels_of(sparse), pixels_of(dense), strict=True))
    levels = [min(psnr(*pair), SAME) for pair in pairs]
    numbers = {
        "prompts": list(prompts),
        **pipeline.origin,
        **request.settings,
        "seed": request.seed,
        "sparsity": request.sparsity and to_dict(request.sparsity),
        "density": sparse.density,
        "dense_seconds": dense_seconds,
        "sparse_seconds": sparse_seconds,
        "psnr": levels,
        "median_psnr": float(np.median(levels)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if pipeline.variant.video:
        numbers["psnr_of_frames"] = [[min(psnr(*two), SAME) for two in zip(*pair, strict=True)] for pair in pairs]
    return Verification(dense=pixels_of(dense), sparse=pixels_of(sparse), numbers=numbers)


def _timed(pipeline: Pipeline, prompts, settings, sparsity: Sparsity | None) -> tuple[PipelineOutput, float]:
    """What the pipeline gives, and seconds of all steps but the first, whose time holds the compilation."""
    ends: list[float] = []
    tick = lambda *_: ends.append(time.perf_counter())
    out = pipeline(prompts, **settings, sparsity=sparsity, output_type="np", callback_on_step_end=tick)
    return out, ends[-1] - ends[0]


def pixels_of(out: PipelineOutput) -> np.ndarray:
    """Images or videos that were asked for as arrays."""
    return out.images if out.frames is None else out.frames
