"""sample(): noise to sample in one compiled scan over the steps, whose carry holds the caches."""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import io_callback
from tqdm import tqdm

from chipmunk_jax import cache as caches
from chipmunk_jax import memory
from chipmunk_jax.cache import LayerCache
from chipmunk_jax.model import Condition, Model, Stack
from chipmunk_jax.order import patch_order
from chipmunk_jax.pinned_keys import check_grid, pinned_keys
from chipmunk_jax.schedule import Step, by_kind, check_schedules, plan
from chipmunk_jax.solvers import Euler, Solver
from chipmunk_jax.sparsity import Sparsity
from chipmunk_jax.step_cache import unless_skipped
from pallas_kernels import Implementation
from pallas_kernels.dispatch import COMPILER_OPTIONS

Callback = Callable[[int, float, np.ndarray], None]


@struct.dataclass
class SampleState:
    """All that one step hands to the next."""

    x: jax.Array  # f32 [B, N, C], in the order of the plan
    solver: Any  # state of the solver
    cache: dict[str, LayerCache] | None  # of every stack of layers; None for dense sampling
    hidden: jax.Array | None  # [B, N, D], tokens behind the last block, for steps that run none; None: all do


def sample(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    timesteps: np.ndarray,
    grid: tuple[int, ...],
    sparsity: Sparsity | None = None,
    guidance: float | None = None,
    uncond: Condition | None = None,
    seed: int = 0,
    solver: Solver | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The sample, f32 [B, N, C], tokens in raster order.

    The same arguments give the same bits; on a GPU, where XLA chooses algorithms by timing them, in another process only with a
    compilation cache (jax_compilation_cache_dir), as the command line keeps one.

    Compiled once for the shapes of its arguments: prompts, seeds, guidance, times, schedules and shares of columns are data, the
    number of dense layers and the query stride are not.

    Args:
        model: the network, weights on the device.
        noise: [B, N, C], unit normal, tokens in raster order.
        cond: the network's conditions, each [B, ..]; those of the tokens in raster order.
        timesteps: [steps + 1], f32, from 1 to 0.
        grid: (rows, columns) of the tokens; their product is N.
        sparsity: what to recompute at each step; None samples densely.
        guidance: scale of true (two-sided) guidance, v_u + guidance (v_c - v_u), as one batch of 2 B; None for none.
        uncond: conditions of the other side; None: the same, without a prompt.
        seed: of the columns kept by chance.
        solver: None for Euler.
        progress: draws a bar.
        callback: called on the host as callback(step, t, x) after every step, x [B, N, C] in raster order.
        implementation: of the kernels, see pallas_kernels.dispatch.choose.

    Raises:
        ValueError: arguments that do not fit together, or no room for the caches; before anything is compiled.
        KeyboardInterrupt: at once; what was begun runs on, and a process that ends waits for it.
    """
    steps = len(timesteps) - 1
    _check(model, noise, cond, timesteps, grid, guidance, uncond, seed)
    if sparsity is not None:
        check_grid(sparsity, grid)
        check_schedules(sparsity, steps)
    options = dict(steps=steps, sparsity=sparsity, guidance=guidance, solver=solver, implementation=implementation)
    check_room(model, noise, cond, **options)
    if guidance is not None:
        uncond = uncond or {name: jnp.zeros_like(x) if name in model.prompted else x for name, x in cond.items()}
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)
    batch, tokens, _ = noise.shape
    batch = batch if guidance is None else 2 * batch
    stacks = model.stacks(tokens, cond)
    table = plan_stacks(stacks, sparsity, steps, grid) if sparsity else Step()
    solver = solver or Euler()
    order = patch_order(grid, sparsity.patches if sparsity else ())
    arrays = dict(
        noise=noise,
        cond={name: x[:, order] if name in model.on_grid else x for name, x in cond.items()},
        timesteps=np.asarray(timesteps, np.float32),
        times=solver.times(timesteps),
        guidance=None if guidance is None else np.float32(guidance),
        positions=model.positions(grid)[order],
        order=order,
        table=table.replace(key=jax.random.key(seed), implementation=implementation),
    )
    cache = caches.zeros(stacks, sparsity, batch, model.dtype) if sparsity else None
    with _Reporter(steps, progress, callback) as reporter:
        given = model, cache, arrays, reporter.run
        x, _ = _finished(_run.lower(*given, solver=solver, report=reporter.kind), *given)
    return x


def _finished(program: jax.stages.Lowered, *args: Any) -> Any:
    """What the program returns, once that and all callbacks are over.

    JAX holds a KeyboardInterrupt until the device is done, and crashes in a process that ends while XLA compiles. So this thread
    only waits, which Ctrl-C ends at once, and another one works, which a process that ends waits for.
    """

    def finish(compiled: jax.stages.Compiled) -> Any:
        out = jax.block_until_ready(compiled(*args))
        jax.effects_barrier()  # of this thread
        return out

    pool = ThreadPoolExecutor(1, "sample")
    try:
        compiled = pool.submit(program.compile).result()  # apart, so that nothing runs after a Ctrl-C while it compiles
        return pool.submit(finish, compiled).result()
    finally:
        pool.shutdown(wait=False)


@partial(jax.jit, static_argnames=("solver", "report"), donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
def _run(model: Model, cache, arrays: dict[str, Any], run: jax.Array, *, solver: Solver, report: str):
    order, timesteps, guidance = arrays["order"], arrays["timesteps"], arrays["guidance"]
    back = jnp.argsort(order)
    batch = len(arrays["noise"]) if guidance is None else 2 * len(arrays["noise"])
    times = jnp.broadcast_to(arrays["times"][:, None], (len(timesteps) - 1, batch))
    modulations = modulations_of(model, times, arrays["cond"])

    def body(state: SampleState, index: jax.Array):
        t, mods = jax.tree.map(lambda a: a[index], (times, modulations))
        step = arrays["table"].at_step(index)
        x = state.x if guidance is None else jnp.concatenate([state.x, state.x])
        network = lambda step, x, cache: model.hidden(x, t, arrays["cond"], arrays["positions"], cache, step, mods)
        compute = lambda x, hidden, cache: by_kind(step, network, x, cache)
        hidden, cache = unless_skipped(step.skip, compute, x, state.hidden, state.cache)
        velocity = model.velocity(hidden, mods)
        if guidance is not None:
            conditional, unconditional = jnp.split(velocity, 2)
            velocity = unconditional + guidance * (conditional - unconditional)
        x, solver_state = solver.step(state.x, state.solver, velocity, timesteps[index], timesteps[index + 1])
        if report:
            seen = (x[:, back],) if report == "samples" else ()
            io_callback(_report, None, run, index, timesteps[index + 1], *seen, ordered=True)
        cache, hidden = (None if old is None else new for old, new in ((state.cache, cache), (state.hidden, hidden)))
        return SampleState(x, solver_state, cache, hidden), None

    x = arrays["noise"][:, order].astype(jnp.float32)
    stacks = model.stacks(x.shape[1], arrays["cond"])
    hidden = hidden_zeros(model, stacks, batch, x.shape[1]) if arrays["table"].skip is not None else None
    state = SampleState(x, solver.init(x), cache, hidden)
    state, _ = lax.scan(body, state, jnp.arange(len(timesteps) - 1))
    return state.x[:, back], state.cache


def hidden_zeros(model: Model, stacks: dict[str, Stack], batch: int, tokens: int) -> jax.Array:
    """What stands for the tokens behind the last block before there are any, [B, N, D]."""
    return jnp.zeros((batch, tokens, next(iter(stacks.values())).width), model.dtype)


@jax.jit
def modulations_of(model: Model, t: jax.Array, cond: Condition) -> Any:
    """model.modulations(t, cond), traced once for its shapes, and not again by every sample."""
    return model.modulations(t, cond)


def _check(model: Model, noise, cond: Condition, timesteps, grid, guidance, uncond, seed) -> None:
    whole = all(isinstance(side, (int, np.integer)) and side > 0 for side in grid)
    if noise.ndim != 3 or not grid or not whole or math.prod(grid) != noise.shape[1] or not noise.shape[0]:
        raise ValueError(f"noise {noise.shape}, grid {tuple(grid)}: expected [B, N, C] with N the product of the grid")
    if len(timesteps) < 2 or not np.all(np.diff(timesteps) < 0):
        raise ValueError(f"timesteps of length {len(timesteps)}: expected at least two, falling from 1 to 0")
    if timesteps[0] > 1 or timesteps[-1] < 0:
        raise ValueError(f"timesteps from {timesteps[0]:g} to {timesteps[-1]:g}: expected them within 1 and 0")
    if guidance is None and uncond is not None:
        raise ValueError("uncond without guidance: expected both, or neither")
    if guidance is not None and not np.isfinite(guidance):
        raise ValueError(f"guidance={guidance}: expected a finite number")
    check_seed(seed)
    model.check(noise, cond)
    if uncond is not None:
        model.check(noise, uncond)


def check_seed(seed: int, samples: int = 1) -> None:
    """Raises ValueError unless so many samples have seeds of their own from this one on; JAX takes them modulo 2^32."""
    last = 2**32 - samples
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed <= last:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to {last}")


def plan_stacks(stacks: dict[str, Stack], sparsity: Sparsity, steps: int, grid: tuple[int, ...]) -> Step:
    """plan() for a model's stacks, which share their attention's tokens and their MLP's width."""
    first = next(iter(stacks.values()))
    attention = sparsity.attention
    pinned = attention and pinned_keys(attention, grid, sparsity.patches, first.text)
    return plan(sparsity, steps, tokens=first.tokens, mlp_width=first.mlp_width, pinned=pinned)


def check_room(model: Model, noise: jax.Array, cond: Condition, *, sparsity: Sparsity | None, **options) -> None:
    """Raises ValueError if what plan_memory() says cannot fit the default device; model, noise and conditions lie there."""

    def plan(sparsity: Sparsity | None) -> memory.Parts:
        parts = plan_memory(model, noise, cond, sparsity=sparsity, **options)
        return {name: size for name, size in parts.items() if name not in memory.PLACED}

    memory.check_room(plan, sparsity)


def plan_memory(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    steps: int,
    sparsity: Sparsity | None,
    guidance: float | None = None,
    solver: Solver | None = None,
    implementation: Implementation | None = None,
) -> memory.Parts:
    """Bytes by name of all that a sample holds on its device, by the arguments of sample(), all of which may be shapes alone."""
    sides = 1 if guidance is None else 2
    batch, tokens = sides * noise.shape[0], noise.shape[1]
    stacks = model.stacks(tokens, cond)
    times = jax.ShapeDtypeStruct((steps, batch), jnp.float32)
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((sides * a.shape[0], *a.shape[1:]), a.dtype), cond)
    x = jax.ShapeDtypeStruct(noise.shape, jnp.float32)
    hidden = jax.eval_shape(lambda: hidden_zeros(model, stacks, batch, tokens))
    state = jax.eval_shape((solver or Euler()).init, x)
    return {
        "weights": memory.nbytes(model),
        "noise and conditions": memory.nbytes((noise, rows)),
        # x at one step and the next, and the velocity between them.
        "latents of the solver": 3 * memory.nbytes(x) + memory.nbytes(state),
        "modulations of all steps": memory.nbytes(modulations_of.eval_shape(model, times, rows)),
        **caches.nbytes(stacks, sparsity, batch, model.dtype),
        **({"tokens for skipped steps": memory.nbytes(hidden)} if sparsity and sparsity.step_cache else {}),
        **memory.of_layers(stacks, sparsity, batch, model.dtype, implementation),
    }


@dataclass
class _Reporter:
    """The host's side of a run's progress. The compiled program knows it by a number alone, so that it serves every run."""

    steps: int
    progress: bool
    callback: Callback | None
    error: BaseException | None = None  # the first one of the callback, raised when the run is over

    def __enter__(self) -> "_Reporter":
        self.kind = "samples" if self.callback else "steps" if self.progress else ""
        self.number = next(_numbers)
        self.run = np.int32(self.number)
        self.bar = tqdm(total=self.steps, desc="compiling", unit="step", disable=not self.progress)
        _reporters[self.number] = self
        return self

    def __exit__(self, *_) -> None:
        del _reporters[self.number]
        self.bar.close()
        if self.error:
            raise self.error

    def report(self, step: int, t: float, *x: np.ndarray) -> None:
        self.bar.set_description("sampling")
        self.bar.update()
        if self.callback and not self.error:
            try:
                self.callback(step, t, *x)
            except BaseException as error:  # through the compiled program it would come out as an internal error of XLA
                self.error = error


_numbers = itertools.count()
_reporters: dict[int, _Reporter] = {}


def _report(run, step, t, *x) -> None:
    if reporter := _reporters.get(int(run)):  # none of a run that was interrupted
        reporter.report(int(step), float(t), *(np.asarray(a) for a in x))
