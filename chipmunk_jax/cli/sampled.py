"""What `chipmunk sample` tells of its samples: in each file, as a summary, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import jax

from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.denoising import together
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.sparsity import to_dict

# What is said of each file, and the list of all of these in the JSON.
LISTS = {
    "path": "paths",
    "prompt": "prompts",
    "prompt_2": "prompts_2",
    "negative_prompt": "negative_prompts",
    "seed": "seeds",
}


def how(pipeline: Pipeline, request: Request, out: PipelineOutput) -> dict[str, Any]:
    """What a sample depends on beside its prompts, by name."""
    made = pipeline.origin | out.settings | {"solver": type(request.solver).__name__}
    length = {} if request.length is None else {"max_sequence_length": request.length}
    return made | length | {"sparsity": request.sparsity and to_dict(request.sparsity)}


def said(pipeline: Pipeline, request: Request, i: int) -> dict[str, str]:
    """The prompts of sample i by name: those that it was made with."""
    prompt, second = request.wanted.prompts[i], request.wanted.prompts_2[i]
    found = {"prompt": prompt} | ({} if second == prompt else {"prompt_2": second})
    other = pipeline.unwanted(request) if request.guided else None
    return found | ({} if other is None else {"negative_prompt": other.prompts[i]})


def total(outs: Sequence[PipelineOutput]) -> PipelineOutput:
    """The first of several results with the seconds of all, the highest peaks and what of all was computed."""
    stages = {}
    for name in outs[0].stages:
        parts = [out.stages[name] for out in outs]
        peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
        stages[name] = replace(
            parts[0], seconds=sum(part.seconds for part in parts), peak_bytes=max(peaks, default=None)
        )
    seconds = sum(out.seconds for out in outs)
    return replace(outs[0], seconds=seconds, stages=stages, **together([vars(out) for out in outs]))


def numbers(out: PipelineOutput, files: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """What --json prints: lists have an entry for each file, null where it has none of that."""
    return {
        **{name: [file.get(key) for file in files] for key, name in LISTS.items()},
        "settings": settings,
        "seconds": out.seconds,
        "stages": {name: asdict(stage) for name, stage in out.stages.items()},
        "density": out.density,
        "full_steps": out.full_steps,
        "skipped_steps": out.skipped_steps,
        "one_sided_steps": out.one_sided_steps,
        "steps_by_sample": [asdict(taken) for taken in out.steps_by_sample],
    }


def summary(out: PipelineOutput, count: int, kind: str) -> str:
    """Seconds, shares computed, and which steps were full, skipped or one-sided."""
    device = " on cpu" if jax.default_backend() == "cpu" else ""  # where the kernels are plain references, and slow
    stages = ", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in out.stages.items())
    first = f"{count} {kind}{'s' * (count > 1)} in {out.seconds:.1f} s{device}, compilation included, "
    if set(out.density.values()) == {1.0}:
        return f"{first}dense\n{stages}"
    steps = out.settings["num_inference_steps"]
    shares = f"{100 * out.density['attention']:.1f} % of the keys, {100 * out.density['mlp']:.1f} % of the neurons"
    named = {"full": out.full_steps, "skipped": out.skipped_steps, "one-sided": out.one_sided_steps}
    kinds = [f"{name} {_listed(numbers)}" for name, numbers in named.items() if numbers]
    if len(set(out.steps_by_sample)) > 1:
        count = lambda name: sum(len(getattr(taken, name)) for taken in out.steps_by_sample) / len(out.steps_by_sample)
        means = {name: count(name.replace("-", "_")) for name in named}
        kinds = [f"in the mean {mean:.3g} {name}" for name, mean in means.items() if mean] + ["as was decided for each"]
    return f"{first}sparse: {shares}\nof {steps} steps (0 to {steps - 1}) {', '.join(kinds)}\n{stages}"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
