"""How near samples of several configurations come to the dense ones of the same prompts, seeds and guidance, and at what cost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.quality import check_window, psnr, ssim
from chipmunk_jax.report.configurations import Configuration, telling
from chipmunk_jax.report.perceptual import Weights, perceptual_distance
from chipmunk_jax.report.price import Prices
from chipmunk_jax.report.records import Entry, machine
from chipmunk_jax.report.ways import executed, pixels_of
from chipmunk_jax.report.work import Work, dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import Step
from chipmunk_jax.sparsity import to_dict

SAME = 100.0  # dB, in place of more: samples that differ by rounding alone, or not at all


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is sampled."""

    prompts: Sequence[str]
    at_once: int  # in a batch
    seed: int
    settings: dict[str, Any]  # of the dense samples, as a call of the pipeline takes them; None for the usual ones


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Configurations that fit their model, and the dense samples that they are compared with."""

    pipeline: Pipeline
    samples: Samples
    configurations: Mapping[str, Configuration]
    requests: dict[str, Request]  # of the configurations, by name
    reference: Request  # of the dense samples, but for their guidance, which is each configuration's own


def compare_configurations(
    pipeline: Pipeline, samples: Samples, configurations: Mapping[str, Configuration]
) -> Comparison:
    """What judge() goes through, checked; no weights are read.

    Raises:
        InputError: a prompt, setting or schedule that does not fit.
    """
    settings = samples.settings | {"seed": samples.seed}
    reference = pipeline.check(samples.prompts, **settings, sparsity=None)
    check_window(reference.settings["height"], reference.settings["width"])
    requests: dict[str, Request] = {}
    for name, one in configurations.items():
        with telling(name):
            requests[name] = pipeline.check(samples.prompts, **settings | one.given, sparsity=one.sparsity)
    given = dict(pipeline=pipeline, samples=samples, configurations=configurations)
    return Comparison(requests=requests, reference=reference, **given)


def judge(comparison: Comparison, *, prices: Prices | None = None, features: Weights | None = None) -> Iterator[Entry]:
    """A record of each configuration: likenesses of every prompt, how they differ from the first one's in the mean, and costs.

    Dense samples are made once for each guidance.

    Args:
        comparison: of compare_configurations().
        prices: of a published model's steps, by which its cost there is told; None: it is not.
        features: for the perceptual distance, of load_features(); None: without it.
    """
    pipeline, requests, samples = comparison.pipeline, comparison.requests, comparison.samples
    steps, work = comparison.reference.settings["steps"], dense_work(pipeline.variant, comparison.reference.settings)
    scales = {request.settings["guidance"] for request in requests.values()}
    dense: dict[float | None, Drawn] = {}
    first = None
    with tqdm(total=(len(scales) + len(requests)) * len(samples.prompts), unit="sample", leave=False) as bar:
        for name, one in comparison.configurations.items():
            request, scale = requests[name], requests[name].settings["guidance"]
            if scale not in dense:
                bar.set_postfix_str("dense")
                dense[scale] = _draw(comparison, {"guidance_scale": scale, "sparsity": None}, bar)
            bar.set_postfix_str(name)
            drawn = _draw(comparison, one.given | {"sparsity": one.sparsity}, bar)
            likeness = _likeness(drawn.pixels, dense[scale].pixels, features)
            first = first or likeness
            yield {
                "benchmark": "quality",
                "variant": name,
                "method": one.method(steps),
                **{measure: values.round(5).tolist() for measure, values in likeness.items()},
                **_statistics(likeness, first),
                **_shares(drawn, work, request.settings["steps"], steps),
                **(_cost(prices, pipeline, request, drawn, steps) if prices else {}),
                "seconds": drawn.seconds,  # a sample
                "dense_seconds": dense[scale].seconds,
                "batch": drawn.sizes[0],  # that was timed
                "sparsity": one.sparsity and to_dict(one.sparsity),
                "prompts": len(samples.prompts),
                **pipeline.origin,
                "solver": type(request.solver).__name__,
                **request.settings,
                "seed": samples.seed,
                **machine(),
            }


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples of all prompts, and how they were made."""

    pixels: list[np.ndarray]  # of each prompt
    outputs: list[PipelineOutput]  # of each batch
    sizes: list[int]  # of each batch
    seconds: float  # the transformer's, of one sample of a batch that compiled nothing, the median

    def mean(self, number: Callable[[PipelineOutput], float]) -> float:
        """A number over all samples."""
        return float(np.average([number(out) for out in self.outputs], weights=self.sizes))


def _draw(comparison: Comparison, options: Mapping[str, Any], bar: tqdm) -> Drawn:
    """Samples of all prompts, some at once; where none but the first batch has its size, that one once more, for its time."""
    samples = comparison.samples
    starts = range(0, len(samples.prompts), samples.at_once)
    batches = {start: samples.prompts[start : start + samples.at_once] for start in starts}
    given = samples.settings | options

    def call(start: int) -> PipelineOutput:
        return comparison.pipeline(batches[start], **given, seed=samples.seed + start, output_type="np", progress=False)

    outputs = []
    for start, prompts in batches.items():
        outputs.append(call(start))
        bar.update(len(prompts))
    sizes = list(map(len, batches.values()))
    timed = [out for out, size in zip(outputs[1:], sizes[1:], strict=True) if size == sizes[0]] or [call(0)]
    return Drawn(
        pixels=[one for out in outputs for one in pixels_of(out)],
        outputs=outputs,
        sizes=sizes,
        seconds=float(np.median([out.stages["transformer"].seconds for out in timed])) / sizes[0],
    )


def _likeness(
    found: Sequence[np.ndarray], dense: Sequence[np.ndarray], features: Weights | None
) -> dict[str, np.ndarray]:
    """Measures by name, each of every prompt."""
    measures = {"psnr": lambda *pair: min(psnr(*pair), SAME), "ssim": ssim}
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


def _shares(drawn: Drawn, work: Work, steps: int, dense_steps: int) -> dict[str, Any]:
    """Shares of keys and neurons that its steps compute, and of all products of the dense sample, by count."""
    return {
        "density": {part: drawn.mean(lambda out, part=part: out.density[part]) for part in ("attention", "mlp")},
        "skipped_steps": drawn.mean(lambda out: len(out.skipped_steps)),
        "one_sided_steps": drawn.mean(lambda out: len(out.one_sided_steps)),
        "reference_steps": dense_steps,
        "executed": drawn.mean(lambda out: executed(work, out, steps, dense_steps)),
    }


def _cost(prices: Prices, pipeline: Pipeline, request: Request, drawn: Drawn, dense_steps: int) -> dict[str, Any]:
    """Cost of the plan on a published model, as a share of its dense sample, and which model that is."""
    variant, settings = pipeline.variant, request.settings
    network, noise, cond = variant.shapes(settings, 1, pipeline.network.dtype)
    stacks, grid = network.stacks(noise.shape[1], cond), variant.grid(settings)
    steps, sides = settings["steps"], 2 if request.guided else 1
    plan = plan_stacks(stacks, request.sparsity, steps, grid, sides) if request.sparsity else Step()
    layers = pipeline.layers(request)
    price = lambda out: prices.cost(plan, steps, out.skipped_steps, layers) / dense_steps
    return {"cost": drawn.mean(price), "cost_of": prices.name}
