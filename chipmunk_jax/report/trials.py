"""What tune() judges by: samples of a pipeline, one at a time, and what each of them costs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.report.configurations import Configuration
from chipmunk_jax.report.space import Candidate, Space
from chipmunk_jax.report.ways import Sampler, level, pixels_of

DENSE = Configuration(sparsity=None)


class Trials:
    """The judge of a Search: sample i is that of prompt i and of a seed of its own, and its dense twin is made once."""

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], settings: dict[str, Any], space: Space) -> None:
        """Args:
        pipeline: of the model.
        prompts: sentences.
        settings: of the dense samples, as a call of the pipeline takes them.
        space: of the ways to sample, whose prices, where it has some, are the costs.
        """
        given = dict(at_once=1, settings=settings | {"progress": False})
        self.sampler = Sampler(pipeline=pipeline, prompts=prompts, **given)
        self.space = space
        self.timed = space.prices is None and jax.default_backend() != "cpu"
        self.dense: dict[int, np.ndarray] = {}
        self.seconds: list[float] = []  # of dense samples, all steps but the first

    @property
    def costs(self) -> str:
        """What costs are shares of."""
        if self.space.prices:
            return f"the dense sample's time by the steps of {self.space.prices.name}"
        device = jax.devices()[0].device_kind
        return f"the dense sample's time on {device}" if self.timed else "the dense sample's matrix products, by count"

    def draw_dense(self, number: int) -> np.ndarray:
        """The dense sample of prompt `number`, from 0: [H, W, 3] or [T, H, W, 3] in 0..1."""
        if number not in self.dense:
            out, seconds = self.sampler.time(DENSE, number)
            self.dense[number] = pixels_of(out)[0]
            self.seconds.append(seconds)
        return self.dense[number]

    def __call__(self, candidate: Candidate, number: int) -> tuple[float, float]:
        """dB of a sample to the dense one, and its cost as a share of that one's."""
        dense = self.draw_dense(number)
        out, seconds = self.sampler.time(candidate.configuration, number)
        cost = self._share(seconds) if self.timed else self.space.cost(candidate.configuration, *out.steps_by_sample)
        return level(pixels_of(out)[0], dense), cost

    def _share(self, seconds: float) -> float:
        """Of the time of a dense sample; the first step, which no time was taken of, is as long as a dense one."""
        dense, steps = float(np.median(self.seconds)), self.space.steps
        step = dense / (steps - 1)
        return (seconds + step) / (dense + step)
