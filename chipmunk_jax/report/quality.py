"""How near samples of several configurations come to the dense ones of the same prompts, seeds and guidance, and at what cost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.quality import check_window, ssim
from chipmunk_jax.report.configurations import Configuration, telling
from chipmunk_jax.report.perceptual import Weights, perceptual_distance
from chipmunk_jax.report.price import Prices
from chipmunk_jax.report.records import Entry, machine
from chipmunk_jax.report.ways import Drawn, Sampler, level, pixels_of
from chipmunk_jax.report.work import dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import Step, Taken, as_taken
from chipmunk_jax.sparsity import to_dict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Configurations that fit their model, and the dense samples that they are compared with."""

    sampler: Sampler  # of the samples that are compared; its settings are those of the dense ones
    configurations: Mapping[str, Configuration]
    requests: dict[str, Request]  # of the configurations, by name
    reference: Request  # of the dense samples, but for their guidance, which is each configuration's own


def compare_configurations(sampler: Sampler, configurations: Mapping[str, Configuration]) -> Comparison:
    """What judge() goes through, checked; no weights are read.

    Args:
        sampler: of the prompts; its settings are those of the dense samples.
        configurations: by name, the first of which the others are compared with.

    Raises:
        InputError: a prompt, setting or schedule that does not fit.
    """
    check, settings = partial(sampler.pipeline.check, sampler.prompts), sampler.settings
    reference = check(**settings, sparsity=None)
    check_window(reference.settings["height"], reference.settings["width"])
    requests: dict[str, Request] = {}
    for name, one in configurations.items():
        with telling(name):
            requests[name] = check(**settings | one.given, sparsity=one.sparsity)
    return Comparison(sampler=sampler, configurations=configurations, requests=requests, reference=reference)


def judge(comparison: Comparison, *, prices: Prices | None = None, features: Weights | None = None) -> Iterator[Entry]:
    """A record of each configuration: likenesses of every prompt, how they differ from the first one's in the mean, and costs.

    Dense samples are made once for each guidance.

    Args:
        comparison: of compare_configurations().
        prices: of a published model's steps, by which its cost there is told; None: it is not.
        features: for the perceptual distance, of load_features(); None: without it.
    """
    sampler, requests, reference = comparison.sampler, comparison.requests, comparison.reference
    pipeline, count = sampler.pipeline, len(sampler.prompts)
    steps, work = reference.settings["steps"], dense_work(pipeline.variant, reference.settings)
    scales = {one.guidance for one in comparison.configurations.values()}
    dense: dict[float | None, tuple[Drawn, float]] = {}
    first = None
    with tqdm(total=(len(scales) + len(requests)) * count, unit="sample", leave=False) as bar:
        for name, one in comparison.configurations.items():
            request, scale = requests[name], one.guidance
            if scale not in dense:
                bar.set_postfix_str("dense")
                dense[scale] = _draw(sampler, Configuration(sparsity=None, guidance=scale), bar)
            bar.set_postfix_str(name)
            drawn, seconds = _draw(sampler, one, bar)
            against, dense_seconds = dense[scale]
            likeness = _likeness(drawn.pixels, against.pixels, features)
            first = first or likeness
            yield {
                "benchmark": "quality",
                "variant": name,
                "method": one.method(steps),
                **{measure: values.round(5).tolist() for measure, values in likeness.items()},
                **_statistics(likeness, first),
                **drawn.shares(work, request.settings["steps"], steps),
                "reference_steps": steps,
                **(_cost(prices, pipeline, request, drawn, steps) if prices else {}),
                "seconds": seconds,  # a sample
                "dense_seconds": dense_seconds,
                "batch": min(sampler.at_once, count),  # that was timed
                "sparsity": one.sparsity and to_dict(one.sparsity),
                "prompts": count,
                **pipeline.origin,
                "solver": type(request.solver).__name__,
                **request.settings,
                "seed": request.seed,
                **machine(),
            }


def _draw(sampler: Sampler, one: Configuration, bar: tqdm) -> tuple[Drawn, float]:
    """Samples of all prompts, and the seconds that the transformer took for one of a batch that compiled nothing, the median.

    Where none but the first batch has its size, that one is drawn once more, for its time.
    """
    outs = []
    for start in sampler.starts:
        outs.append(sampler.draw(one, start, progress=False))
        bar.update(len(pixels_of(outs[-1])))
    size = len(pixels_of(outs[0]))
    timed = [out for out in outs[1:] if len(pixels_of(out)) == size] or [sampler.draw(one, 0, progress=False)]
    seconds = float(np.median([out.stages["transformer"].seconds for out in timed])) / size
    return Drawn(outs=outs), seconds


def _likeness(found: np.ndarray, dense: np.ndarray, features: Weights | None) -> dict[str, np.ndarray]:
    """Measures by name, each of every prompt."""
    measures = {"psnr": level, "ssim": ssim}
    if features is not None:
        measures["perceptual"] = lambda *pair: perceptual_distance(features, *pair)
    pairs = list(zip(found, dense, strict=True))
    return {name: np.array([measure(*pair) for pair in pairs]) for name, measure in measures.items()}


def _statistics(likeness: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Means of all measures; of the PSNR median and worst, and the mean difference to the first with its standard error."""
    levels = likeness["psnr"]
    difference = levels - first["psnr"]
    return {
        **{f"mean_{name}": float(values.mean()) for name, values in likeness.items()},
        "median_psnr": float(np.median(levels)),
        "worst_psnr": float(levels.min()),
        "difference": float(difference.mean()),
        "difference_error": float(difference.std(ddof=1) / len(levels) ** 0.5) if len(levels) > 1 else None,
    }


def _cost(prices: Prices, pipeline: Pipeline, request: Request, drawn: Drawn, dense_steps: int) -> dict[str, Any]:
    """Cost of the plan on a published model, as a share of its dense sample, and which model that is."""
    variant, settings = pipeline.variant, request.settings
    stacks, grid = variant.stacks(settings), variant.grid(settings)
    steps, sides = settings["steps"], 2 if request.guided else 1
    plan = plan_stacks(stacks, request.sparsity, steps, grid, sides) if request.sparsity else Step()
    layers = pipeline.layers(request)

    def price(taken: Taken) -> float:
        return prices.cost(as_taken(plan, steps, taken), steps, layers) / dense_steps

    cost = drawn.mean(lambda out: float(np.mean([price(taken) for taken in out.steps_by_sample])))
    return {"cost": cost, "cost_of": prices.name}
