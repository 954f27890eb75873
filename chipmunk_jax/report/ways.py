"""One way to sample: the same prompts and seeds for all, what is computed, in what time, and how near it comes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.quality import TAPS, psnr, ssim
from chipmunk_jax.report.configurations import Configuration
from chipmunk_jax.report.work import Work

SAME = 1000.0  # dB, in place of the infinity of equal samples, which JSON cannot hold
Watch = Callable[[np.ndarray], None]  # what the clean tokens [B, N, C] of a step are shown to
Drawn = tuple[PipelineOutput, float]  # a batch, and the seconds of all steps but the first


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The same prompts and seeds for every way to sample."""

    pipeline: Pipeline
    batches: dict[int, Sequence[str]]  # prompts, by the number of their first sample
    settings: dict[str, Any]  # as a call of the pipeline takes them

    def draw(self, one: Configuration, start: int, watch: Watch = lambda clean: None) -> Drawn:
        """A batch, and the seconds of all steps but the first, whose time holds the compilation."""
        ends: list[float] = []

        def tick(step: int, t: float, latents: np.ndarray, clean: np.ndarray) -> None:
            ends.append(time.perf_counter())
            watch(clean)

        settings = self.settings | one.given | {"seed": self.settings.get("seed", 0) + start}
        prompts = self.batches[start]
        out = self.pipeline(prompts, **settings, sparsity=one.sparsity, output_type="np", callback_on_step_end=tick)
        return out, ends[-1] - ends[0]

    def draw_all(self, one: Configuration) -> list[Drawn]:
        """All batches."""
        return [self.draw(one, start) for start in self.batches]


def measured(
    one: Configuration,
    drawn: Sequence[Drawn],
    samples: Mapping[str, np.ndarray],
    name: str,
    work: Work,
    dense_steps: int,
) -> dict[str, Any]:
    """What a way to sample computes, and how near it comes."""
    outs, steps = [out for out, _ in drawn], one.steps or dense_steps
    mean = lambda number: float(
        np.average([number(out) for out in outs], weights=[len(pixels_of(out)) for out in outs])
    )
    pairs = list(zip(samples[name], samples["dense"], strict=True))
    large = min(samples["dense"].shape[-3:-1]) >= TAPS
    levels = [min(psnr(*pair), SAME) for pair in pairs]
    return {
        "method": one.method(dense_steps),
        "steps": steps,
        "skipped_steps": mean(lambda out: len(out.skipped_steps)),
        "one_sided_steps": mean(lambda out: len(out.one_sided_steps)),
        "executed": mean(lambda out: executed(work, out, steps, dense_steps)),
        "density": {part: mean(lambda out, part=part: out.density[part]) for part in outs[0].density},
        "psnr": levels,
        "median_psnr": float(np.median(levels)),
        "ssim": [ssim(*pair) for pair in pairs] if large else None,
        "stages": _stages(outs),
    }


def _stages(outs: Sequence[PipelineOutput]) -> dict[str, Any]:
    """Seconds of all batches, compilation included, and the highest peak of memory, by stage."""
    found = {}
    for name in outs[0].stages:
        parts = [asdict(out.stages[name]) for out in outs]
        peaks = [part["peak_bytes"] for part in parts if part["peak_bytes"] is not None]
        found[name] = {"seconds": sum(part["seconds"] for part in parts), "peak_bytes": max(peaks, default=None)}
    return found


def executed(work: Work, out: PipelineOutput, steps: int, dense_steps: int) -> float:
    """Share of the work of a dense sample that a sample of so many steps computes, by count."""
    run = 1 - (len(out.skipped_steps) + len(out.one_sided_steps) / 2) / steps
    return work.executed(out.density, run) * steps / dense_steps


def pixels_of(out: PipelineOutput) -> np.ndarray:
    """Images or videos that were asked for as arrays."""
    return out.images if out.frames is None else out.frames
