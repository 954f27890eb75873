"""Ways to sample the same prompts and seeds: what each computes, in what time, and how near it comes to the dense samples."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.quality import TAPS, psnr, ssim
from chipmunk_jax.report.configurations import Configuration
from chipmunk_jax.report.work import Work

SAME = 100.0  # dB, in place of more: samples that differ by rounding alone, or not at all
Watch = Callable[[np.ndarray], None]  # what the clean tokens [B, N, C] of a step are shown to


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The same prompts and seeds for every way to sample."""

    pipeline: Pipeline
    prompts: Sequence[str]
    at_once: int  # prompts in a batch
    settings: dict[str, Any]  # as a call of the pipeline takes them

    @property
    def starts(self) -> range:
        """The number of the first sample of every batch."""
        return range(0, len(self.prompts), self.at_once)

    def draw(self, one: Configuration, start: int, **options: Any) -> PipelineOutput:
        """A batch as a call of the pipeline gives it, in arrays.

        Args:
            one: the way.
            start: the number of the batch's first sample.
            options: of the call, beside the settings.

        Raises:
            InputError, NotFiniteError: of the call.
        """
        settings = self.settings | one.given | {"seed": self.settings.get("seed", 0) + start} | options
        prompts = self.prompts[start : start + self.at_once]
        return self.pipeline(prompts, **settings, sparsity=one.sparsity, output_type="np")

    def time(self, one: Configuration, start: int, watch: Watch = lambda clean: None) -> tuple[PipelineOutput, float]:
        """A batch, and the seconds of all steps but the first, whose time holds the compilation; else as draw()."""
        ends: list[float] = []

        def tick(step: int, t: float, latents: np.ndarray, clean: np.ndarray) -> None:
            ends.append(time.perf_counter())
            watch(clean)

        out = self.draw(one, start, callback_on_step_end=tick)
        return out, ends[-1] - ends[0]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of all prompts by one way."""

    outs: Sequence[PipelineOutput]  # of each batch

    @cached_property
    def pixels(self) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3] of all batches, f32 in 0..1."""
        return np.concatenate([pixels_of(out) for out in self.outs])

    def mean(self, number: Callable[[PipelineOutput], float]) -> float:
        """The mean over all samples of a number of their batch."""
        return float(np.average([number(out) for out in self.outs], weights=[len(pixels_of(out)) for out in self.outs]))

    def shares(self, work: Work, steps: int, dense_steps: int) -> dict[str, Any]:
        """What its samples compute: "density" of keys and neurons, "full_steps", .., and the share "executed" of the dense work.

        Args:
            work: of a dense step.
            steps: of a sample.
            dense_steps: of a dense sample.
        """
        density = {part: self.mean(lambda out, part=part: out.density[part]) for part in ("attention", "mlp")}
        count = lambda name: self.mean(
            lambda out: float(np.mean([len(getattr(taken, name)) for taken in out.steps_by_sample]))
        )
        full, skipped, one_sided = map(count, ("full", "skipped", "one_sided"))
        return {
            "density": density,
            "full_steps": full,
            "skipped_steps": skipped,
            "one_sided_steps": one_sided,
            "executed": work.executed(density, 1 - (skipped + one_sided / 2) / steps) * steps / dense_steps,
        }


def measured(one: Configuration, drawn: Drawn, dense: Drawn, work: Work, dense_steps: int) -> dict[str, Any]:
    """Numbers by name of what a way to sample computes and of how near it comes, as JSON can hold them.

    Args:
        one: the way.
        drawn, dense: samples of the same prompts and seeds.
        work: of a dense step.
        dense_steps: of a dense sample.
    """
    steps = one.steps or dense_steps
    pairs = list(zip(drawn.pixels, dense.pixels, strict=True))
    levels = [level(*pair) for pair in pairs]
    return {
        "method": one.method(dense_steps),
        "steps": steps,
        **drawn.shares(work, steps, dense_steps),
        "steps_by_sample": [asdict(taken) for out in drawn.outs for taken in out.steps_by_sample],
        "psnr": levels,
        "median_psnr": float(np.median(levels)),
        "ssim": [ssim(*pair) for pair in pairs] if min(dense.pixels.shape[-3:-1]) >= TAPS else None,
        "stages": _stages(drawn.outs),
    }


def level(sample: np.ndarray, dense: np.ndarray) -> float:
    """PSNR of two samples with values in 0..1, dB, at most SAME."""
    return min(psnr(sample, dense), SAME)


def _stages(outs: Sequence[PipelineOutput]) -> dict[str, Any]:
    """Seconds of all batches, compilation included, and the highest peak of memory, by stage."""
    found = {}
    for name in outs[0].stages:
        parts = [asdict(out.stages[name]) for out in outs]
        peaks = [part["peak_bytes"] for part in parts if part["peak_bytes"] is not None]
        found[name] = {"seconds": sum(part["seconds"] for part in parts), "peak_bytes": max(peaks, default=None)}
    return found


def pixels_of(out: PipelineOutput) -> np.ndarray:
    """Images [B, H, W, 3] or videos [B, T, H, W, 3], of a call that gives arrays."""
    return out.images if out.frames is None else out.frames
