"""How near samples of several configurations come to the dense ones of the same prompts, seeds and guidance, and at what cost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from chipmunk_jax.arguments import check_seed
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.quality import check_window, psnr, ssim
from chipmunk_jax.report.configurations import Configuration, telling
from chipmunk_jax.report.perceptual import Weights, perceptual_distance
from chipmunk_jax.report.price import Prices
from chipmunk_jax.report.records import Entry, machine
from chipmunk_jax.report.verify import pixels_of
from chipmunk_jax.report.work import Work, dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import Step
from chipmunk_jax.sparsity import Sparsity, to_dict

SAME = 100.0  # dB, in place of more: samples that differ by rounding alone, or not at all


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is sampled."""

    checkpoint: str
    count: int  # of prompts
    at_once: int  # in a batch
    seed: int
    dtype: str | None
    settings: dict[str, Any]  # of the dense samples, as a call of the pipeline takes them


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


def judge_configurations(
    samples: Samples,
    configurations: Mapping[str, Configuration],
    *,
    prices: Prices | None = None,
    features: Weights | None = None,
) -> Iterator[Entry]:
    """A record of each configuration: likenesses of every prompt, how they differ from the first one's in the mean, and costs.

    The dense samples that a configuration is compared with have its guidance, and all else as samples.settings say or as is usual.

    Args:
        samples: what is sampled.
        configurations: by name.
        prices: of a published model's steps, by which its cost there is told; None: it is not.
        features: for the perceptual distance, of load_features(); None: without it.

    Raises:
        InputError: a checkpoint, setting or schedule that does not fit, before any work.
    """
    pipeline = Pipeline.from_pretrained(samples.checkpoint, dtype=samples.dtype)
    if not isinstance(pipeline, PixelPipeline):
        raise InputError(f"{samples.checkpoint}: expected a model with a table of words to draw prompts from")
    check_seed(samples.seed, samples.count)
    prompts = pipeline.random_prompts(samples.count, samples.seed)
    usual = {name: value for name, value in samples.settings.items() if value is not None}
    reference = pipeline.check(prompts, **usual, seed=samples.seed, sparsity=None)
    check_window(reference.settings["height"], reference.settings["width"])
    requests: dict[str, Request] = {}
    for name, one in configurations.items():
        with telling(name):
            requests[name] = pipeline.check(prompts, **usual | one.given, seed=samples.seed, sparsity=one.sparsity)
    work = dense_work(pipeline.variant, reference.settings)
    scales = {request.settings["guidance"] for request in requests.values()}
    with tqdm(total=(len(scales) + len(requests)) * len(prompts), unit="sample", leave=False) as bar:

        def draw(name: str, settings: Mapping[str, Any], sparsity: Sparsity | None) -> Drawn:
            bar.set_postfix_str(name)
            return _draw(pipeline, prompts, samples, dict(settings) | {"sparsity": sparsity}, bar)

        dense: dict[float | None, Drawn] = {}
        first = None
        for name, one in configurations.items():
            request, steps = requests[name], reference.settings["steps"]
            scale = request.settings["guidance"]
            if scale not in dense:
                dense[scale] = draw("dense", usual | {"guidance_scale": scale}, None)
            drawn = draw(name, usual | one.given, one.sparsity)
            likeness = _likeness(drawn.pixels, dense[scale].pixels, features)
            first = first or likeness
            yield {
                "benchmark": "quality",
                "variant": name,
                "method": one.method(steps),
                **{measure: values.round(5).tolist() for measure, values in likeness.items()},
                **_statistics(likeness, first),
                **_shares(drawn, work, steps),
                **(_cost(prices, pipeline, request, drawn, steps) if prices else {}),
                "seconds": drawn.seconds,  # a sample
                "dense_seconds": dense[scale].seconds,
                "batch": drawn.sizes[0],  # that was timed
                "sparsity": one.sparsity and to_dict(one.sparsity),
                "prompts": len(prompts),
                **pipeline.origin,
                "solver": type(request.solver).__name__,
                **drawn.outputs[-1].settings,
                "seed": samples.seed,
                **machine(),
            }


def _draw(pipeline: Pipeline, prompts: Sequence[str], samples: Samples, options: dict[str, Any], bar: tqdm) -> Drawn:
    """Samples of all prompts, some at once; where none but the first batch has its size, that one once more, for its time."""
    starts = range(0, len(prompts), samples.at_once)
    some = [prompts[start : start + samples.at_once] for start in starts]

    def call(batch: int) -> PipelineOutput:
        return pipeline(some[batch], seed=samples.seed + starts[batch], output_type="np", progress=False, **options)

    outputs = []
    for batch, of_batch in enumerate(some):
        outputs.append(call(batch))
        bar.update(len(of_batch))
    timed = [out for out, of_batch in zip(outputs[1:], some[1:], strict=True) if len(of_batch) == len(some[0])]
    seconds = [out.stages["transformer"].seconds for out in timed or [call(0)]]
    return Drawn(
        pixels=[one for out in outputs for one in pixels_of(out)],
        outputs=outputs,
        sizes=list(map(len, some)),
        seconds=float(np.median(seconds)) / len(some[0]),
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


def _shares(drawn: Drawn, work: Work, dense_steps: int) -> dict[str, Any]:
    """Shares of keys and neurons that its steps compute, and of all products of the dense sample, by count."""

    def executed(out: PipelineOutput) -> float:
        steps = out.settings["steps"]
        return work.executed(out.density, 1 - len(out.skipped_steps) / steps) * steps / dense_steps

    return {
        "density": {part: drawn.mean(lambda out, part=part: out.density[part]) for part in ("attention", "mlp")},
        "skipped_steps": drawn.mean(lambda out: len(out.skipped_steps)),
        "reference_steps": dense_steps,
        "executed": drawn.mean(executed),
    }


def _cost(prices: Prices, pipeline: Pipeline, request: Request, drawn: Drawn, dense_steps: int) -> dict[str, Any]:
    """Cost of the plan on a published model, as a share of its dense sample, and which model that is."""
    variant, settings = pipeline.variant, request.settings
    network, noise, cond = variant.shapes(settings, 1, pipeline.network.dtype)
    stacks, grid = network.stacks(noise.shape[1], cond), variant.grid(settings)
    plan = plan_stacks(stacks, request.sparsity, settings["steps"], grid) if request.sparsity else Step()
    layers = pipeline.layers(request)
    price = lambda out: prices.cost(plan, settings["steps"], out.skipped_steps, layers) / dense_steps
    return {"cost": drawn.mean(price), "cost_of": prices.name}
