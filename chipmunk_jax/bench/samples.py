"""Whole samples, dense and sparse in turn."""

import time

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.inputs import random_inputs, random_model
from chipmunk_jax.bench.records import Record, times
from chipmunk_jax.bench.timing import Timed, time_in_turn
from chipmunk_jax.memory import check_room
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.quality import relative_l2
from chipmunk_jax.sampling import plan_stacks, sample
from chipmunk_jax.schedule import density
from chipmunk_jax.sparsity import Sparsity, to_dict


def bench_sample(
    name: str,
    *,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int,
    batch: int,
    dtype: str,
    sparsity: Sparsity,
    repeats: int,
) -> list[Record]:
    """A record of the dense sample and one of the sparse.

    Args:
        name: of VARIANTS.
        height, width: pixels; None: the model's usual ones.
        frames: of a video, likewise.
        steps: of the sampler.
        batch: images at once.
        dtype: of weights and activations.
        sparsity: of the sparse sample.
        repeats: timed samples of each.

    Raises:
        InputError: sizes that do not fit, or no room, before any work.
    """
    variant = VARIANTS[name]
    settings = variant.complete(height=height, width=width, frames=frames, steps=steps)
    variant.check(settings, sparsity)
    grid, options = variant.grid(settings), dict(solver=variant.solver, guidance=variant.guidance)
    shapes = variant.shapes(settings, batch, jnp.dtype(dtype))
    check_room(*shapes, placed=False, steps=steps, sparsity=sparsity, **options)
    model = random_model(variant, jnp.dtype(dtype))
    noise, cond = random_inputs(variant, settings, batch)
    options |= dict(timesteps=variant.timesteps(settings), grid=grid)
    kinds = {
        kind: lambda s=s: sample(model, noise, cond, sparsity=s, **options)
        for kind, s in (("dense", None), ("sparse", sparsity))
    }
    with tqdm(total=len(kinds) * (1 + repeats), unit="sample", leave=False) as bar:
        first, outputs = _compile(kinds, bar)
        bar.set_postfix_str("timing")
        right = {kind: Timed(call) for kind, call in kinds.items() if np.isfinite(outputs[kind]).all()}
        seconds = time_in_turn(right, repeats, warm=False, report=lambda _: bar.update())
    stacks = model.stacks(noise.shape[1], cond)
    table = plan_stacks(stacks, sparsity, steps, grid)
    shape = variant.sizes(settings) | {"batch": batch, "steps": steps, "text": variant.text_rows}
    extra = {"density": density(table, sum(stack.layers for stack in stacks.values()))}
    common = dict(shape=shape, dtype=dtype, sparsity=to_dict(sparsity), model=name)
    return [_record(kind, seconds, outputs, first, common, extra, steps) for kind in kinds]


def _compile(kinds, bar: tqdm) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of the first call of each, which compiles and warms up; and what it gives."""
    first, outputs = {}, {}
    for kind, call in kinds.items():
        bar.set_postfix_str(f"compiling {kind}")
        start = time.perf_counter()
        outputs[kind] = np.asarray(call())
        first[kind] = time.perf_counter() - start
        bar.update()
    return first, outputs


def _record(kind, seconds, outputs, first, common, extra, steps) -> Record:
    fields = times(seconds.get(kind, ()), seconds.get("dense", ()))
    finite = all(np.isfinite(x).all() for x in (outputs[kind], outputs["dense"]))
    return Record(
        benchmark="sample",
        variant=kind,
        baseline="dense",
        # Of the final latents. With random weights it says nothing about quality, so it is not judged.
        rel_err=relative_l2(outputs[kind], outputs["dense"]) if finite else None,
        error=None if kind in seconds else "the result is not finite",
        extra=extra | {"ms_per_step": fields["ms"] and fields["ms"] / steps, "first_call_s": first[kind]},
        **fields,
        **common,
    )
