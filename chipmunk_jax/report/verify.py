"""Dense samples, sparse ones of the same prompts and seeds, and rivals at the same cost: how near they come, in what time."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chipmunk_jax.errors import InputError, NotFiniteError
from chipmunk_jax.media import save_image, save_video
from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.quality import relative_l2
from chipmunk_jax.report.configurations import Configuration, rivals
from chipmunk_jax.report.records import machine
from chipmunk_jax.report.sheets import compare_frames, compare_images, compare_videos
from chipmunk_jax.report.steps import steps_of
from chipmunk_jax.report.ways import Drawn, Sampler, level, measured, pixels_of
from chipmunk_jax.report.work import dense_work
from chipmunk_jax.sparsity import to_dict

Timed = tuple[PipelineOutput, float]  # a batch, and the seconds of all steps but the first
OTHER = {"float32": "bfloat16", "bfloat16": "float32"}  # dtypes between which samples differ by rounding


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Samples [B, H, W, 3] or [B, T, H, W, 3] in 0..1, and numbers about them that JSON can hold."""

    samples: dict[str, np.ndarray]  # "dense", "sparse", and the rivals by name
    numbers: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)  # more numbers, for a report

    @property
    def levels(self) -> dict[str, list[float]]:
        """PSNR of each sample to the dense one, dB, by the names of all others."""
        return {"sparse": self.numbers["psnr"]} | {one["name"]: one["psnr"] for one in self.numbers["rivals"]}

    def draw(self, path: Path, fps: float | None) -> None:
        """Writes all samples and the sparse one's difference side by side; of videos to a .png some frames, else all.

        Args:
            path: of a picture or a video.
            fps: frames a second, of a video.
        """
        text, given = {"settings": self.numbers}, (self.numbers["prompts"], self.samples, self.levels)
        if self.samples["dense"].ndim == 4:
            save_image(path, compare_images(*given), text)
        elif path.suffix.lower() == ".png":
            save_image(path, compare_frames(*given), text)
        else:
            save_video(path, compare_videos(*given), fps, text)


def check_verify(pipeline: Pipeline, prompts: Sequence[str], *, sparsity: Any = "auto", **settings: Any) -> Request:
    """The request of the sparse samples of verify(); no weights are read.

    Args:
        pipeline, prompts, sparsity, settings: as of verify().

    Raises:
        InputError: what Pipeline.check() refuses; no sparsity; one step, as the first is not timed.
    """
    request = pipeline.check(prompts, sparsity=sparsity, **settings)
    if request.sparsity is None:
        raise InputError("sparsity=None: expected some, to compare with dense samples")
    if request.settings["steps"] == 1:
        raise InputError("num_inference_steps=1: expected at least 2, as the first is not timed")
    return request


def verify(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    at_once: int | None = None,
    against_rivals: bool = True,
    sparsity: Any = "auto",
    **settings: Any,
) -> Verification:
    """Samples of the same prompts and seeds, dense, sparse and by the rivals at the cost of the sparse ones, and their numbers.

    Args:
        pipeline: of the model.
        prompts: sentences, one a sample.
        at_once: samples in a batch; None: all. Where something is decided while it samples, one.
        against_rivals: whether the rivals are sampled, too.
        sparsity, settings: as a call of the pipeline takes them.

    Raises:
        InputError: see check_verify().
    """
    request = check_verify(pipeline, prompts, sparsity=sparsity, **settings)
    steps, work = request.settings["steps"], dense_work(pipeline.variant, request.settings)
    size = min(at_once or request.batch, request.at_once)
    sampler = Sampler(pipeline=pipeline, prompts=prompts, at_once=size, settings=settings)
    ways = {"dense": Configuration(sparsity=None), "sparse": Configuration(sparsity=request.sparsity)}
    dense, sparse, drift = zip(*(_pair(sampler, start, *ways.values()) for start in sampler.starts), strict=True)
    timed = {"dense": dense, "sparse": sparse}
    if against_rivals:
        share = Drawn(outs=[out for out, _ in sparse]).shares(work, steps, steps)["executed"]
        others = rivals(share, steps)
        ways |= others
        timed |= {name: [sampler.time(one, start) for start in sampler.starts] for name, one in others.items()}
    drawn = {name: Drawn(outs=[out for out, _ in batches]) for name, batches in timed.items()}
    samples = {name: one.pixels for name, one in drawn.items()}
    found = {name: measured(ways[name], one, drawn["dense"], work, steps) for name, one in drawn.items()}
    _add_seconds(found, timed, steps)
    numbers = _numbers(pipeline, request, prompts, found, samples)
    details = {
        "ways": found,
        "drift": list(itertools.chain(*drift)),
        "steps_of": steps_of(pipeline, replace(request, batch=size), sparse[0][0].steps_by_sample[0]),
        "machine": machine(),
    }
    return Verification(samples=samples, numbers=numbers, details=details)


def noise_floor(pipeline: Pipeline, dense: np.ndarray, prompt: str, **settings: Any) -> dict[str, Any]:
    """How far rounding alone moves a dense sample: "dtypes", and its "psnr", dB, to that of the other one, or None and an "error".

    Args:
        pipeline: of the model; its weights give way to those of the other dtype.
        dense: pixels of the first prompt and seed.
        prompt, settings: theirs, as a call of the pipeline takes them; dense.
    """
    here = pipeline.origin["dtype"]
    other = OTHER.get(here, "float32")
    try:
        pipeline.residents.release()
        again = Pipeline.from_pretrained(pipeline.folder.path, dtype=other, offload=pipeline.residents.offload)
        out = again(prompt, **settings, output_type="np")
    except (InputError, NotFiniteError) as error:
        return {"dtypes": [here, other], "psnr": None, "error": str(error)}
    return {"dtypes": [here, other], "psnr": level(pixels_of(out)[0], dense)}


def _pair(
    sampler: Sampler, start: int, one: Configuration, other: Configuration
) -> tuple[Timed, Timed, list[list[float]]]:
    """A batch in two ways of as many steps, and of each sample by step how far the clean tokens of one lie from the other's."""
    clean: list[np.ndarray] = []  # of one batch: those of a video of 81 frames are a gigabyte
    moved: list[list[float]] = []
    first = sampler.time(one, start, lambda x: clean.append(np.array(x)))
    compare = lambda x: moved.append([relative_l2(*pair) for pair in zip(x, clean[len(moved)], strict=True)])
    return first, sampler.time(other, start, compare), np.transpose(moved).tolist()


def _add_seconds(found: dict[str, dict], timed: Mapping[str, Sequence[Timed]], steps: int) -> None:
    """Adds the seconds of all steps; the first one, which no time was taken of, is as long as a dense one."""
    sums = {name: sum(seconds for _, seconds in batches) for name, batches in timed.items()}
    step = sums["dense"] / (steps - 1)
    for name, seconds in sums.items():
        found[name]["seconds"] = seconds + step


def _numbers(
    pipeline: Pipeline,
    request: Request,
    prompts: Sequence[str],
    found: Mapping[str, dict],
    samples: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What --json writes."""
    dense, sparse, *others = found.values()
    shown = ("method", "steps", "skipped_steps", "executed", "seconds", "psnr", "median_psnr")
    numbers = {
        "prompts": list(prompts),
        "seeds": [request.seed + i for i in range(len(prompts))],
        **pipeline.origin,
        **request.settings,
        "seed": request.seed,
        "sparsity": to_dict(request.sparsity),
        **{key: sparse[key] for key in ("density", "executed", "steps_by_sample")},
        "dense_seconds": dense["seconds"],
        "sparse_seconds": sparse["seconds"],
        "psnr": sparse["psnr"],
        "median_psnr": sparse["median_psnr"],
        "rivals": [
            {"name": name} | {key: one[key] for key in shown} for name, one in zip(list(found)[2:], others, strict=True)
        ],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if pipeline.variant.video:
        clips = zip(samples["sparse"], samples["dense"], strict=True)
        numbers["psnr_of_frames"] = [[level(*two) for two in zip(*clip, strict=True)] for clip in clips]
    return numbers
