"""Whole samples, dense and sparse in turn."""

import time
from functools import partial

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.inputs import Workload, random_inputs, random_model
from chipmunk_jax.bench.record import Record, times
from chipmunk_jax.bench.timing import Timed, time_in_turn
from chipmunk_jax.progress import Reporter
from chipmunk_jax.quality import relative_l2
from chipmunk_jax.sampling import SampleState, plan, run
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
    ways = {"dense": None, "sparse": work.fitted}
    tables = {kind: plan(model, noise[:1], cond, grid=grid, sparsity=way, **usual) for kind, way in ways.items()}

    def draw(kind: str) -> list[SampleState]:
        """As sample() does, which does not tell what a gate skipped."""
        with Reporter(steps, "", False, None) as reporter:
            given = dict(sparsity=ways[kind], apart=kind == "sparse" and work.fitted.decides)
            return run(model, noise, cond, tables[kind], reporter, **given)

    calls = {kind: partial(draw, kind) for kind in ways}
    first, outputs = {}, {}  # seconds of the first call of each, which compiles and warms up; and what it gives
    with tqdm(total=len(calls) * (1 + repeats), unit="sample", leave=False) as bar:
        for kind, call in calls.items():
            bar.set_postfix_str(f"compiling {kind}")
            start = time.perf_counter()
            states = call()
            outputs[kind] = np.concatenate([state.x for state in states])
            first[kind] = time.perf_counter() - start
            bar.update()
        bar.set_postfix_str("timing")
        right = {kind: Timed(call) for kind, call in calls.items() if np.isfinite(outputs[kind]).all()}
        seconds = time_in_turn(right, repeats, warm=False, report=lambda _: bar.update())
    found = [density(state.as_run(tables["sparse"].step), work.layers) for state in states]
    shares = {part: float(np.mean([one[part] for one in found])) for part in found[0]}

    record = partial(work.record, seconds=seconds, sizes={"steps": steps}, benchmark="sample")

    def judged(kind: str) -> Record:
        ms = times(seconds.get(kind, ()), ())["ms"]
        extra = {"density": shares, "ms_per_step": ms and ms / steps, "first_call_s": first[kind]}
        # Of the final latents. With random weights it says nothing about quality, so it is not judged.
        rel_err = relative_l2(outputs[kind], outputs["dense"]) if {kind, "dense"} <= right.keys() else None
        return record(kind, error=None if kind in right else "the result is not finite", rel_err=rel_err, extra=extra)

    return [judged(kind) for kind in calls]
