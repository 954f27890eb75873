"""How near sparse samples come to the dense ones of the same prompts and seeds, for several configurations."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from tqdm import tqdm

from chipmunk_jax.bench.records import align, machine
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipeline import Pipeline, WordTable, check_request, family_of
from chipmunk_jax.quality import psnr
from chipmunk_jax.sampling import check_seed
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
    settings: dict[str, Any]  # frames, height, width, steps and guidance; None for the model's own

    def prompts(self, words: WordTable) -> list[str]:
        """A word of each attribute by chance, the same for every configuration."""
        rng = np.random.default_rng(self.seed)
        return [" ".join(rng.choice(choice) for choice in words.words) for _ in range(self.count)]


def read_variants(path: str | Path) -> dict[str, Sparsity]:
    """Configurations by name, of a YAML file such as

        mini-wan: {}
        fewer keys: {attention.top_keys: 0.1}
        no attention: {preset: flux, attention: null}

    Each changes the file's first one by dotted names, or where it names one, a preset.

    Raises:
        InputError: no such file, or what load_sparsity() refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    named = lambda x: isinstance(x, dict) and all(isinstance(name, str) for name in x)
    if not named(tree) or not all(map(named, tree.values())) or not tree:
        raise InputError(f"{path}: expected names, and for each of them settings such as {{attention.top_keys: 0.1}}")
    variants: dict[str, Sparsity] = {}
    for name, changes in tree.items():
        changes = dict(changes)
        base = str(changes.pop("preset", "")) or next(iter(variants.values()), name)
        with _telling(name):
            variants[name] = load_sparsity(base, changes)
    return variants


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Within, an error says of which configuration it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def bench_quality(samples: Samples, variants: Mapping[str, Sparsity]) -> Iterator[dict[str, Any]]:
    """A record of each configuration: the PSNR of every prompt, and how it differs from the first one's in the mean.

    Raises:
        InputError: a checkpoint, setting or schedule that does not fit, before any work.
    """
    family, words = family_of(samples.checkpoint), WordTable.load(samples.checkpoint)
    settings = family.complete(**samples.settings)
    check_seed(samples.seed, samples.count)
    prompts = samples.prompts(words)
    for name, sparsity in variants.items():
        with _telling(name):
            check_request(family, words, prompts, **settings, seed=samples.seed, sparsity=sparsity)
    pipeline = Pipeline.load(samples.checkpoint, samples.dtype)
    first = None
    with tqdm(total=(1 + len(variants)) * len(prompts), unit="sample", leave=False) as bar:

        def draw(name: str, sparsity: Sparsity | None) -> list[np.ndarray]:
            bar.set_postfix_str(name)
            drawn = []
            for start in range(0, len(prompts), samples.at_once):
                some = prompts[start : start + samples.at_once]
                drawn += [*pipeline(some, **settings, seed=samples.seed + start, sparsity=sparsity)]
                bar.update(len(some))
            return drawn

        dense = draw("dense", None)
        for name, sparsity in variants.items():
            levels = np.array([min(psnr(*pair), SAME) for pair in zip(draw(name, sparsity), dense, strict=True)])
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
                "density": pipeline.density(sparsity, **settings),
                "sparsity": to_dict(sparsity),
                "prompts": len(prompts),
                "seed": samples.seed,
                "dtype": jax.tree.leaves(pipeline.model)[0].dtype.name if samples.dtype is None else samples.dtype,
                **settings,
                **machine(),
            }


def quality_table(entries: list[dict[str, Any]]) -> str:
    """Aligned lines under a header."""
    error = lambda e: "" if e["difference_error"] is None else f" +- {e['difference_error']:.2f}"
    columns = {
        "variant": [e["variant"] for e in entries],
        "keys": [f"{100 * e['density']['attention']:.1f} %" for e in entries],
        "neurons": [f"{100 * e['density']['mlp']:.1f} %" for e in entries],
        "median dB": [f"{e['median_psnr']:.2f}" for e in entries],
        "mean dB": [f"{e['mean_psnr']:.2f}" for e in entries],
        "to the first": [f"{e['difference']:+.2f}{error(e)}" for e in entries],
    }
    return align(columns, [None] * len(entries))
