"""How near samples of several configurations come to the dense ones of the same prompts and seeds."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from chipmunk_jax.arguments import check_seed
from chipmunk_jax.config_file import read_config
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.quality import psnr
from chipmunk_jax.report.records import machine
from chipmunk_jax.report.tables import table
from chipmunk_jax.report.verify import pixels_of
from chipmunk_jax.sparsity import Sparsity, load_sparsity, to_dict

SAME = 100.0  # dB, in place of more: samples that differ by rounding alone, or not at all


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is sampled."""

    checkpoint: str
    count: int  # of prompts
    at_once: int  # in a batch
    seed: int
    dtype: str | None
    settings: dict[str, Any]  # as a call of the pipeline takes them


@dataclass(frozen=True)
class Configuration:
    """One way to sample."""

    sparsity: Sparsity | None  # None: dense
    steps: int | None  # None: as many as the dense samples that it is compared with


def read_configurations(path: str | Path) -> dict[str, Configuration]:
    """Configurations by name, of a YAML file such as

        mini-wan: {}
        fewer keys: {attention.top_keys: 0.1}
        no attention: {preset: flux, attention: null}
        20 of 30 steps: {dense: true, steps: 20}

    Each changes the file's first one by dotted names, or where it names one, a preset; a dense one needs steps.

    Raises:
        InputError: no such file, or what load_sparsity() refuses.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    holding = "names, and for each of them settings such as {attention.top_keys: 0.1}"
    tree = read_config(path, holding)
    named = lambda x: isinstance(x, dict) and all(isinstance(name, str) for name in x)
    if not named(tree) or not all(map(named, tree.values())) or not tree:
        raise InputError(f"{path}: expected {holding}")
    found: dict[str, Configuration] = {}
    for name, changes in tree.items():
        with _telling(name):
            found[name] = _configuration(name, dict(changes), next(iter(found.values()), None))
    return found


def _configuration(name: str, changes: dict[str, Any], first: Configuration | None) -> Configuration:
    dense, steps = changes.pop("dense", False), changes.pop("steps", None)
    if dense not in (True, False) or (dense and (changes or steps is None)):
        raise InputError(f"dense={dense}: expected true with a number of steps and no other setting")
    if dense:
        return Configuration(None, steps)
    base = str(changes.pop("preset", "")) or (first.sparsity if first and first.sparsity else name)
    return Configuration(load_sparsity(base, changes), steps)


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Within, an error says of which configuration it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def judge_configurations(samples: Samples, configurations: Mapping[str, Configuration]) -> Iterator[dict[str, Any]]:
    """A record of each configuration: the PSNR of every prompt, and how it differs from the first one's in the mean.

    Raises:
        InputError: a checkpoint, setting or schedule that does not fit, before any work.
    """
    pipeline = Pipeline.from_pretrained(samples.checkpoint, dtype=samples.dtype)
    if not isinstance(pipeline, PixelPipeline):
        raise InputError(f"{samples.checkpoint}: expected a model with a table of words to draw prompts from")
    check_seed(samples.seed, samples.count)
    prompts = pipeline.random_prompts(samples.count, samples.seed)
    settings = {name: value for name, value in samples.settings.items() if value is not None}
    given = {
        name: settings | ({"num_inference_steps": c.steps} if c.steps else {}) for name, c in configurations.items()
    }
    requests = {}
    for name, one in configurations.items():
        with _telling(name):
            requests[name] = pipeline.check(prompts, **given[name], seed=samples.seed, sparsity=one.sparsity)
    first = None
    with tqdm(total=(1 + len(configurations)) * len(prompts), unit="sample", leave=False) as bar:

        def draw(name: str, settings: dict[str, Any], sparsity: Sparsity | None):
            """Pixels of all prompts, and the last portion's output."""
            bar.set_postfix_str(name)
            pixels = []
            for start in range(0, len(prompts), samples.at_once):
                some = prompts[start : start + samples.at_once]
                options = dict(sparsity=sparsity, output_type="np", progress=False)
                out = pipeline(some, **settings, seed=samples.seed + start, **options)
                pixels += [*pixels_of(out)]
                bar.update(len(some))
            return pixels, out

        dense, _ = draw("dense", settings, None)
        for name, one in configurations.items():
            pixels, out = draw(name, given[name], one.sparsity)
            levels = np.array([min(psnr(*pair), SAME) for pair in zip(pixels, dense, strict=True)])
            first = levels if first is None else first
            difference = levels - first
            yield {
                "benchmark": "quality",
                "variant": name,
                "psnr": levels.round(3).tolist(),
                "median_psnr": float(np.median(levels)),
                "mean_psnr": float(levels.mean()),
                "difference": float(difference.mean()),  # of the mean PSNR to that of the first
                "difference_error": float(difference.std(ddof=1) / len(levels) ** 0.5) if len(levels) > 1 else None,
                "density": out.density,
                "skipped_steps": len(out.skipped_steps),
                "sparsity": one.sparsity and to_dict(one.sparsity),
                "prompts": len(prompts),
                "dtype": jax.tree.leaves(pipeline.model)[0].dtype.name if samples.dtype is None else samples.dtype,
                **requests[name].settings,
                "seed": samples.seed,
                **machine(),
            }


def quality_table(entries: list[dict[str, Any]]) -> str:
    """Aligned lines under a header."""
    error = lambda e: "" if e["difference_error"] is None else f" +- {e['difference_error']:.2f}"
    columns = {
        "variant": lambda e: e["variant"],
        "steps": lambda e: f"{e['steps'] - e['skipped_steps']}",
        "keys": lambda e: f"{100 * e['density']['attention']:.1f} %",
        "neurons": lambda e: f"{100 * e['density']['mlp']:.1f} %",
        "median dB": lambda e: f"{e['median_psnr']:.2f}",
        "mean dB": lambda e: f"{e['mean_psnr']:.2f}",
        "to the first": lambda e: f"{e['difference']:+.2f}{error(e)}",
    }
    return table(entries, columns)
