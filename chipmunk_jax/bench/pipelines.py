"""Whole pipelines at full size, from prompts to pixels: seconds and memory of each stage, of a first prompt and of a second."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.inputs import random_weights
from chipmunk_jax.bench.record import Record, times
from chipmunk_jax.convert.folder import ROLES, Folder
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import MODELS, UMT5_XXL, Component
from chipmunk_jax.pipelines import Pipeline, PipelineOutput, Variant
from chipmunk_jax.pipelines.residents import Offload
from chipmunk_jax.pipelines.text import Tokens
from chipmunk_jax.sparsity import Sparsity, to_dict

# Of a published model's components, where they are not their class's usual ones.
CONFIGS = {("wan", "text_encoder"): UMT5_XXL}


class RandomTokenizer:
    """Ids by chance, as many as there is room for: encoders take as long for any."""

    def __init__(self, rows: int):
        self.rows = rows

    def __call__(self, prompts: Sequence[str], length: int) -> Tokens:
        draw = lambda prompt: np.random.default_rng(len(prompt)).integers(self.rows, size=length, dtype=np.int32)
        ids = np.stack([draw(prompt) for prompt in prompts])
        return Tokens(ids, np.ones(ids.shape, bool), [""] * len(ids))


def random_pipeline(variant: Variant, dtype: str, offload: Offload) -> Pipeline:
    """The pipeline of a variant with components of the published sizes, whose weights are drawn when they are placed.

    Raises:
        InputError: the variant has no pipeline from prompts.
    """
    if variant.pipeline is None or variant.network not in ROLES:
        raise InputError(f"{variant.name}: no pipeline from prompts to pixels yet")
    roles = ROLES[variant.network]
    if variant.boundary is None:
        roles = {role: name for role, name in roles.items() if role != "transformer_2"}
    configs = {
        role: CONFIGS.get((variant.network, role)) or MODELS[name].config_class() for role, name in roles.items()
    }
    configs |= {role: variant.config for role in roles if role.startswith("transformer")}

    class Random(variant.pipeline):
        @cached_property
        def tokenizers(self) -> dict[str, RandomTokenizer]:
            return {role: RandomTokenizer(configs[role].vocab_size) for role in roles if role.startswith("text")}

        def kind(self, role: str) -> tuple[str, Any, str]:
            return roles[role], configs[role], dtype

        def load(self, role: str) -> Component:
            return random_weights(self.residents.shapes[role])

    places = dict.fromkeys(roles, Path())
    folder = Folder(
        Path(variant.name),
        variant.network,
        places,
        dict.fromkeys(("tokenizer", "tokenizer_2"), Path()),
        variant.boundary,
    )
    return Random(folder, variant, dtype, offload, configs)


def bench_pipeline(
    variant: Variant, settings: dict[str, Any], *, dtype: str, offload: Offload, sparsity: Sparsity | None, repeats: int
) -> Iterator[list[Record]]:
    """Two records of dense samples, then two of sparse ones: of the first prompt, and of the median of later ones.

    Args:
        variant: a row of VARIANTS.
        settings: sizes and steps, as a call of a pipeline takes them.
        dtype: of all components.
        offload: see Pipeline.from_pretrained.
        sparsity: of the sparse samples; None: dense ones alone.
        repeats: prompts after the first.
    """
    pipeline = random_pipeline(variant, dtype, offload)
    kinds = {"dense": None} | ({"sparse": sparsity} if sparsity else {})
    with tqdm(total=len(kinds) * (1 + repeats), unit="sample", leave=False) as bar:
        for kind, given in kinds.items():
            outs = []
            for count in range(1 + repeats):
                bar.set_postfix_str(f"{kind}, prompt {count + 1}")
                prompt = f"{kind} {count}"  # another one, so that its text is not remembered
                outs.append(pipeline(prompt, **settings, sparsity=given, seed=count, output_type="np", progress=False))
                bar.update()
            later = sorted(outs[1:], key=lambda out: out.seconds)
            record = partial(_record, variant, dtype=dtype, offload=offload, sparsity=given)
            yield [
                record(f"{kind}, first prompt", outs[0], [outs[0].seconds]),
                record(f"{kind}, later prompts", later[len(later) // 2], [out.seconds for out in later]),
            ]


def _record(
    variant: Variant,
    name: str,
    out: PipelineOutput,
    seconds: list[float],
    *,
    dtype: str,
    offload: Offload,
    sparsity: Sparsity | None,
) -> Record:
    names = {name: Pipeline.names.get(name, name) for name in (*variant.axes, "steps")}
    sizes = {name: out.settings[theirs] for name, theirs in names.items()}
    stages = {stage: {"seconds": taken.seconds, "peak_bytes": taken.peak_bytes} for stage, taken in out.stages.items()}
    pixels = out.images if out.frames is None else out.frames
    return Record(
        benchmark="pipeline",
        variant=name,
        shape=sizes | {"batch": len(pixels)},
        sparsity=sparsity and to_dict(sparsity),
        dtype=dtype,
        **times(seconds, ()),
        model=variant.name,
        error=None if np.isfinite(pixels).all() else "pixels that are not finite",
        extra={"stages": stages, "offload": offload, "density": out.density},
    )
