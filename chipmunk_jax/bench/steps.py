"""One step of each kind: dense, and with caches full, selecting and delta."""

import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chipmunk_jax import cache as caches
from chipmunk_jax.bench import draw
from chipmunk_jax.bench.inputs import Workload, random_inputs, random_model
from chipmunk_jax.bench.measure import judge
from chipmunk_jax.bench.profile import kernel_times
from chipmunk_jax.bench.record import Record
from chipmunk_jax.bench.timing import REPEAT_SECONDS, Timed, time_in_turn
from chipmunk_jax.errors import InputError
from chipmunk_jax.model import modulations_of
from chipmunk_jax.order import patch_order
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, Step, by_kind
from chipmunk_jax.solvers import MOST_STEPS
from chipmunk_jax.sparsity import Sparsity, StepCache
from pallas_kernels.dispatch import COMPILER_OPTIONS

# Rows of the table of steps, in an order that fills the caches: the first measures what the second chooses keys by.
PHASES = {
    "first": (AttentionPhase.MEASURE, MlpPhase.FULL),
    "select": (AttentionPhase.SELECT, MlpPhase.SELECT_DELTA),  # keys and neurons
    "full": (AttentionPhase.REFRESH, MlpPhase.FULL),
    "select neurons": (AttentionPhase.DELTA, MlpPhase.SELECT_DELTA),
    "delta": (AttentionPhase.DELTA, MlpPhase.DELTA),
}
KINDS = ("dense", "full", "select", "select neurons", "delta", "skipped")

# On the input of the last full step every kind gives the dense velocity, but for bf16: a residual is rounded once more than the
# dense output, 2e-3 of it in every layer, and over 57 layers of a narrow FLUX that adds up to 1e-2. Columns of another layer give
# 0.3, a residual without its columns 0.5. The network in float32 would take twice the memory, so dense bf16 is the reference here.
TOLERANCES = {"bfloat16": 5e-2, "float32": 1e-3}
INPUTS = 3  # in turn: unchanged tokens would have the delta steps multiply zeros


def bench_step(
    work: Workload, *, repeats: int, kernels: bool = False, only: Collection[str] | None = None
) -> list[Record]:
    """A record of each of KINDS, or of some.

    Args:
        work: what a step is one of; the schedule of its sparsity does not count.
        repeats: timed runs of each.
        kernels: whether to record in which kernels each kind spends its time, too; on a GPU.
        only: some of KINDS; None: all that there are with this sparsity.

    Raises:
        InputError: a kind that there is not, sizes that do not fit, or no room, before any work.
    """
    work.variant.check(work.settings, work.sparsity, schedules=False)
    kinds, filling = _kinds(only, work.sparsity)
    cached = work.sparsity if filling else Sparsity(attention=None, mlp=None)
    # A skipped step is timed whatever the schedule, so its tokens want room.
    work.check_room(INPUTS, replace(cached, step_cache=StepCache()))
    checked = {"dense", *filling, *kinds}
    with tqdm(total=len(checked) + len(kinds) * repeats, unit="step", leave=False) as bar:
        bar.set_postfix_str("drawing weights")
        steps = _Steps(work, cached=bool(filling))
        errors = steps.check(checked, TOLERANCES[work.dtype], bar)
        bar.set_postfix_str("timing")
        right = {kind: Timed(partial(steps.run, kind)) for kind in kinds if errors[kind][0] is None}
        seconds = time_in_turn(right, repeats, warm=steps.last < REPEAT_SECONDS, report=lambda _: bar.update())
        profiles = {kind: {"kernels": kernel_times(one.dispatch)} for kind, one in right.items() if kernels}
    record = partial(work.record, seconds=seconds, sizes={"layers": work.layers}, benchmark="step")
    return [record(k, error=errors[k][0], rel_err=errors[k][1], extra=profiles.get(k, {})) for k in kinds]


def _kinds(only: Collection[str] | None, sparsity: Sparsity) -> tuple[list[str], list[str]]:
    """The kinds to time, and those of PHASES that fill the caches for them."""
    choosing = sparsity.mlp and sparsity.mlp.cache == "activations"  # of neurons, apart from full steps
    usual = [kind for kind in KINDS if kind != "select neurons" or choosing]
    only = usual if only is None else only
    if not only or not set(only) <= set(usual):
        raise InputError(f"only={','.join(only)}: expected some of {', '.join(usual)}")
    filling = ["first", "select", "select neurons"] if choosing else ["first", "select"]
    return [kind for kind in usual if kind in only], [] if set(only) <= {"dense", "skipped"} else filling


class _Steps:
    """A model with random weights, its caches, and inputs in turn."""

    def __init__(self, work: Workload, *, cached: bool):
        variant, sparsity, dtype = work.variant, work.sparsity, jnp.dtype(work.dtype)
        grid = variant.grid(work.settings)
        batch = work.batch * (1 if variant.guidance is None else 2)  # the network sees both sides
        inputs = [random_inputs(variant, work.settings, batch, seed) for seed in range(INPUTS)]
        self.model = random_model(variant, dtype)
        if cached:
            every = replace(sparsity, step_cache=None)
            self.table = _table(plan_stacks(work.stacks, every, MOST_STEPS, grid), sparsity)
            self.cache = caches.zeros(work.stacks, sparsity, batch, dtype)
        positions = jnp.asarray(self.model.positions(grid)[patch_order(grid, sparsity.patches)])
        times = jnp.broadcast_to(jnp.linspace(0.9, 0.5, INPUTS)[:, None], (INPUTS, batch))
        self.inputs = [
            (x, t, cond, positions, modulations_of(self.model, t, cond))  # as sample() has them, before its steps
            for (x, cond), t in zip(inputs, times, strict=True)
        ]
        width = next(iter(work.stacks.values())).width
        self.hidden = draw.normal(jax.random.key(0), (batch, inputs[0][0].shape[1], width), dtype)
        self.turn = cycle(self.inputs)
        self.last = 0.0  # seconds of the last step with caches that was checked, with everything compiled

    def run(self, kind: str, inputs=None) -> jax.Array:
        """The velocity of one step; the caches move on."""
        inputs = inputs or next(self.turn)
        if kind == "dense":
            return _dense_step(self.model, *inputs)
        if kind == "skipped":
            return _final_layer(self.model, self.hidden, inputs[-1])
        velocity, self.cache = _cached_step(self.model, self.cache, *inputs, self.table, list(PHASES).index(kind))
        return velocity

    def check(self, kinds: set[str], tolerance: float, bar: tqdm) -> dict[str, tuple[str | None, float | None]]:
        """What is wrong with each of these kinds on one input, or None, and its error relative to the dense step."""
        bar.set_postfix_str("compiling")
        errors = {}
        for kind in [kind for kind in ("dense", "skipped", *PHASES) if kind in kinds]:
            start = time.perf_counter()
            found = np.asarray(self.run(kind, self.inputs[0]))
            self.last = time.perf_counter() - start if kind in PHASES else 0.0
            if kind == "dense":
                dense = found
            # The tokens of a skipped step are another step's.
            errors[kind] = (None, None) if kind == "skipped" else judge([(found, dense)], tolerance)
            bar.update()
        return errors


@partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _dense_step(model, x, t, cond, positions, modulations):
    return model(x, t, cond, positions, None, None, modulations)[0]


@partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _final_layer(model, hidden, modulations):
    return model.velocity(hidden, modulations)


# Which step it is, is data, as in sample(): one program serves all kinds.
@partial(jax.jit, donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
def _cached_step(model, cache, x, t, cond, positions, modulations, table: Step, index):
    network = lambda step, cache: model(x, t, cond, positions, cache, step, modulations)
    return by_kind(table.at_step(index), network, cache)


def _table(plan: Step, sparsity: Sparsity) -> Step:
    """The plan with PHASES for its steps, all of which run."""
    # Where keys are chosen at each full step, that of the MLP is one, too.
    again = sparsity.attention and sparsity.attention.recompute_mask
    phases = PHASES | ({"select": (AttentionPhase.SELECT, MlpPhase.FULL)} if again else {})
    attention, mlp = (np.array(phases, np.int32) for phases in zip(*phases.values(), strict=True))
    return plan.replace(
        attention=plan.attention and plan.attention.replace(phase=attention),
        mlp=plan.mlp and plan.mlp.replace(phase=mlp),
        key=jax.random.key(0),
    )
