"""Whole samples, dense and sparse in turn."""

import time
from functools import partial

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.inputs import Workload, random_inputs, random_model
from chipmunk_jax.bench.record import Record, times
from chipmunk_jax.bench.timing import Timed, time_in_turn
from chipmunk_jax.quality import relative_l2
from chipmunk_jax.sampling import plan_stacks, sample
from chipmunk_jax.schedule import density


def bench_sample(work: Workload, *, repeats: int) -> list[Record]:
    """A record of the dense sample and one of the sparse.

    Args:
        work: what is sampled.
        repeats: timed samples of each.

    Raises:
        InputError: sizes that do not fit, or no room, before any work.
    """
    variant, steps, grid = work.variant, work.settings["steps"], work.variant.grid(work.settings)
    variant.check(work.settings, work.sparsity)
    work.check_room(steps, work.fitted)
    model = random_model(variant, jnp.dtype(work.dtype))
    noise, cond = random_inputs(variant, work.settings, work.batch)
    usual = dict(timesteps=variant.timesteps(work.settings), solver=variant.solver, guidance=variant.guidance)
    draw = partial(sample, model, noise, cond, grid=grid, **usual)
    calls = {"dense": draw, "sparse": partial(draw, sparsity=work.fitted)}
    first, outputs = {}, {}  # seconds of the first call of each, which compiles and warms up; and what it gives
    with tqdm(total=len(calls) * (1 + repeats), unit="sample", leave=False) as bar:
        for kind, call in calls.items():
            bar.set_postfix_str(f"compiling {kind}")
            start = time.perf_counter()
            outputs[kind] = np.asarray(call())
            first[kind] = time.perf_counter() - start
            bar.update()
        bar.set_postfix_str("timing")
        right = {kind: Timed(call) for kind, call in calls.items() if np.isfinite(outputs[kind]).all()}
        seconds = time_in_turn(right, repeats, warm=False, report=lambda _: bar.update())
    # Of a gate that decides in the sample as if it skipped nothing, which sample() does not tell.
    table = plan_stacks(work.stacks, work.fitted, steps, grid, 1 if variant.guidance is None else 2)
    decides = work.fitted.step_cache and work.fitted.step_cache.decides
    shares = density(table.replace(skip=None) if decides else table, work.layers)

    record = partial(work.record, seconds=seconds, sizes={"steps": steps}, benchmark="sample")

    def judged(kind: str) -> Record:
        ms = times(seconds.get(kind, ()), ())["ms"]
        extra = {"density": shares, "ms_per_step": ms and ms / steps, "first_call_s": first[kind]}
        # Of the final latents. With random weights it says nothing about quality, so it is not judged.
        rel_err = relative_l2(outputs[kind], outputs["dense"]) if {kind, "dense"} <= right.keys() else None
        return record(kind, error=None if kind in right else "the result is not finite", rel_err=rel_err, extra=extra)

    return [judged(kind) for kind in calls]
