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
from chipmunk_jax.bench.inputs import random_inputs, random_model, shortened
from chipmunk_jax.bench.measure import judge
from chipmunk_jax.bench.profile import kernel_times
from chipmunk_jax.bench.records import Record, times
from chipmunk_jax.bench.timing import REPEAT_SECONDS, Timed, time_in_turn
from chipmunk_jax.errors import InputError
from chipmunk_jax.memory import check_room
from chipmunk_jax.model import modulations_of
from chipmunk_jax.order import patch_order
from chipmunk_jax.pipelines import VARIANTS, Variant
from chipmunk_jax.pipelines.variant import Settings
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, Step, by_kind
from chipmunk_jax.solvers import MOST_STEPS
from chipmunk_jax.sparsity import Sparsity, StepCache, to_dict
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
    name: str,
    *,
    height: int | None,
    width: int | None,
    frames: int | None,
    layers: int | None,
    batch: int,
    dtype: str,
    sparsity: Sparsity,
    repeats: int,
    kernels: bool = False,
    only: Collection[str] | None = None,
) -> list[Record]:
    """A record of each of KINDS, or of some.

    Args:
        name: of VARIANTS.
        height, width: pixels; None: the model's usual ones.
        frames: of a video, likewise.
        layers: to shorten the model to; None for all.
        batch: images at once.
        dtype: of weights and activations.
        sparsity: of the steps with caches; its schedule does not count.
        repeats: timed runs of each.
        kernels: whether to record in which kernels each kind spends its time, too; on a GPU.
        only: some of KINDS; None: all that there are with this sparsity.

    Raises:
        InputError: a kind that there is not, sizes that do not fit, or no room, before any work.
    """
    variant = shortened(VARIANTS[name], layers)
    settings = variant.complete(height=height, width=width, frames=frames)
    variant.check(settings, sparsity, schedules=False)
    kinds, filling = _kinds(only, sparsity)
    # A skipped step is timed whatever the schedule, so its tokens want room.
    skipping = replace(sparsity if filling else Sparsity(attention=None, mlp=None), step_cache=StepCache())
    shapes, usual = (
        variant.shapes(settings, batch, jnp.dtype(dtype)),
        dict(guidance=variant.guidance, solver=variant.solver),
    )
    check_room(*shapes, placed=False, steps=INPUTS, sparsity=skipping, **usual)
    checked = {"dense", *filling, *kinds}
    with tqdm(total=len(checked) + len(kinds) * repeats, unit="step", leave=False) as bar:
        bar.set_postfix_str("drawing weights")
        steps = _Steps(variant, settings, batch, jnp.dtype(dtype), sparsity, bool(filling))
        errors = steps.check(checked, TOLERANCES[dtype], bar)
        bar.set_postfix_str("timing")
        right = {kind: Timed(partial(steps.run, kind)) for kind in kinds if errors[kind][0] is None}
        seconds = time_in_turn(right, repeats, warm=steps.last < REPEAT_SECONDS, report=lambda _: bar.update())
        profiles = {kind: kernel_times(timed.dispatch) for kind, timed in right.items()} if kernels else {}
    shape = variant.sizes(settings) | {"batch": batch, "layers": steps.layers, "text": variant.text_rows}
    common = dict(shape=shape, dtype=dtype, sparsity=to_dict(sparsity), model=name)
    return [
        Record(
            benchmark="step",
            variant=kind,
            baseline="dense",
            error=errors[kind][0],
            rel_err=errors[kind][1],
            extra={"kernels": profiles[kind]} if kind in profiles else {},
            **times(seconds.get(kind, ()), seconds.get("dense", ())),
            **common,
        )
        for kind in kinds
    ]


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

    def __init__(
        self, variant: Variant, settings: Settings, batch: int, dtype: jnp.dtype, sparsity: Sparsity, cached: bool
    ):
        grid = variant.grid(settings)
        batch *= 1 if variant.guidance is None else 2  # the network sees both sides
        inputs = [random_inputs(variant, settings, batch, seed) for seed in range(INPUTS)]
        self.model = random_model(variant, dtype)
        tokens = inputs[0][0].shape[1]
        stacks = self.model.stacks(tokens, inputs[0][1])
        self.layers = sum(stack.layers for stack in stacks.values())
        if cached:
            every = replace(sparsity, step_cache=None)
            self.table = _table(plan_stacks(stacks, every, MOST_STEPS, grid), sparsity)
            self.cache = caches.zeros(stacks, sparsity, batch, dtype)
        positions = jnp.asarray(self.model.positions(grid)[patch_order(grid, sparsity.patches)])
        times = jnp.broadcast_to(jnp.linspace(0.9, 0.5, INPUTS)[:, None], (INPUTS, batch))
        self.inputs = [
            (x, t, cond, positions, modulations_of(self.model, t, cond))  # as sample() has them, before its steps
            for (x, cond), t in zip(inputs, times, strict=True)
        ]
        self.hidden = draw.normal(jax.random.key(0), (batch, tokens, next(iter(stacks.values())).width), dtype)
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
        inputs = self.inputs[0]
        dense = np.asarray(self.run("dense", inputs))
        errors = {"dense": judge([dense], [dense], tolerance)}
        bar.update()
        if "skipped" in kinds:
            self.run("skipped", inputs)
            errors["skipped"] = None, None  # its tokens are another step's
            bar.update()
        for kind in [kind for kind in PHASES if kind in kinds]:
            start = time.perf_counter()
            errors[kind] = judge([np.asarray(self.run(kind, inputs))], [dense], tolerance)
            self.last = time.perf_counter() - start
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
