"""Noise to sample in one scan over the steps, whose carry holds the caches.

    table = plan(model, noise, cond, timesteps=.., grid=..)      what every step does, in NumPy, before anything is traced
    state = start(model, noise, cond, table)                     pure, as is
    state = denoise(model, state, cond, table, span=(0, 20))     this: under jit, eval_shape, grad

sample() is all three on the host: checked, compiled once for a shape, with a bar and a callback.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from chipmunk_jax import cache as caches
from chipmunk_jax.arguments import check, check_settings, is_whole, parse_timesteps, placed
from chipmunk_jax.cache import LayerCache
from chipmunk_jax.drift import DriftGuard
from chipmunk_jax.errors import InputError, NotFiniteError, listed
from chipmunk_jax.fit import fit
from chipmunk_jax.guidance_cache import Told, guide, run_sides
from chipmunk_jax.model import Condition, Model, Stack
from chipmunk_jax.order import inverse, patch_order
from chipmunk_jax.pinned_keys import pinned_keys
from chipmunk_jax.progress import Reporter, finished
from chipmunk_jax.progress import on_step as progress_of
from chipmunk_jax.schedule import Step, plan_steps
from chipmunk_jax.solvers import Euler, Solver
from chipmunk_jax.sparsity import Sparsity
from chipmunk_jax.step_cache import (
    Caching,
    GateState,
    Kept,
    caching_of,
    check_caching,
    decide,
    filtered,
    ran,
    start_gate,
    start_kept,
    unless_skipped,
)
from chipmunk_jax.strictness import key_of, usual_modes
from pallas_kernels import Implementation
from pallas_kernels.dispatch import COMPILER_OPTIONS

OnStep = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], None]


@struct.dataclass
class Table:
    """What every step does and is told. All but the solver is data: another table of these shapes compiles nothing."""

    step: Step  # of plan_steps(): a row a step, and what is the same for all
    timesteps: jax.Array  # f32 [steps + 1], from 1 (noise) to 0
    times: jax.Array  # f32 [steps], what the network is told of the first `steps` of them
    order: jax.Array  # i32 [N], raster index of every token as the network gets them
    back: jax.Array  # i32 [N], the inverse of order
    positions: jax.Array  # [N, axes], in that order
    guidance: jax.Array | None  # f32 scalar, scale of two-sided guidance; None: there is one side
    caching: Caching | None  # how steps are skipped; None: all run
    max_drift: jax.Array | None  # f32 scalar, bound of the drift guard; None: there is none
    solver: Solver = struct.field(pytree_node=False)


@struct.dataclass
class SampleState:
    """All that one step hands to the next."""

    x: jax.Array  # f32 [B, N, C], tokens in raster order
    solver: Any  # state of the solver; its tokens are in the table's order, as are all of the following
    cache: dict[str, LayerCache] | None  # of every stack of layers; None for dense sampling
    kept: Kept | None  # of the last steps that ran, for those that run no block; None: all do
    broken: jax.Array  # i32 [B], the first step whose x is not finite, or -1
    gate: GateState | None = None  # of a gate that decides which steps are skipped; None: there is none
    # f32 [B, N, C], of the velocities of both sides of guidance in the last step that ran both; None: each step does
    difference: jax.Array | None = None
    drift: DriftGuard | None = None
    taken: jax.Array | None = None  # bool [3, steps], the Step.kind of those until here; None: all are what was planned

    def as_run(self, step: Step) -> Step:
        """The table's steps as they ran until here, with what was decided on the way."""
        return step if self.taken is None else step.as_kind(*np.asarray(self.taken))


@usual_modes()
def plan(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    timesteps: np.ndarray,
    grid: tuple[int, ...],
    sparsity: Sparsity | None = None,
    guidance: float | None = None,
    solver: Solver | None = None,
    seed: int = 0,
    implementation: Implementation | None = None,
) -> Table:
    """The table of a sample; arguments and errors as of sample(). Only the shapes of noise and cond matter."""
    timesteps, solver = parse_timesteps(timesteps), solver or Euler()
    steps = len(timesteps) - 1
    fixed = dict(guidance=guidance, seed=seed, solver=solver, implementation=implementation)
    check_settings(noise, grid, sparsity=sparsity, **fixed)
    fitted = sparsity and fit(sparsity, steps, guided=guidance is not None)
    caching = fitted.step_cache and caching_of(fitted.step_cache, grid) if fitted else None
    if caching:
        check_caching(fitted.step_cache, model)
    if fitted and fitted.decides and len(noise) > 1:
        what = f"gate={caching.gate!r}" if caching and caching.decides else f"max_drift={fitted.max_drift:g}"
        raise InputError(f"{what} with {len(noise)} samples: expected one at a time, as it decides for one")
    order = patch_order(grid, fitted.patches if fitted else ())
    sides = 1 if guidance is None else 2
    stacks = model.stacks(noise.shape[1], cond)
    step = plan_stacks(stacks, fitted, steps, grid, sides) if fitted else Step(sides=sides)
    return Table(
        step=step.replace(key=key_of(seed), implementation=implementation),
        timesteps=timesteps,
        times=solver.times(timesteps),
        order=order,
        back=inverse(order),
        positions=model.positions(grid)[order],
        guidance=None if guidance is None else np.float32(guidance),
        caching=caching,
        max_drift=np.float32(fitted.max_drift) if fitted and fitted.max_drift else None,
        solver=solver,
    )


def plan_stacks(
    stacks: dict[str, Stack], sparsity: Sparsity, steps: int, grid: tuple[int, ...], sides: int = 1
) -> Step:
    """plan_steps() for a model's stacks, which share the tokens of their attention and the width of their MLP."""
    first = next(iter(stacks.values()))
    attention = sparsity.attention
    pinned = attention and pinned_keys(attention, grid, sparsity.patches, first.text)
    sizes = dict(tokens=first.tokens, mlp_width=first.mlp_width)
    return plan_steps(sparsity, steps, **sizes, pinned=pinned, sides=sides)


@usual_modes()
def start(
    model: Model, noise: jax.Array, cond: Condition, table: Table, *, sparsity: Sparsity | None = None
) -> SampleState:
    """The state before the first step. Pure.

    Args:
        model: the network.
        noise: [B, N, C], unit normal, tokens in raster order.
        cond: as denoise() takes it.
        table: of plan().
        sparsity: that of the table.

    Raises:
        InputError: noise that is no floats or does not fit table and network, or another sparsity than that of the table.
    """
    expected = len(table.order), model.channels
    if noise.shape[1:] != expected or not jnp.issubdtype(noise.dtype, jnp.floating):
        raise InputError(f"noise {noise.dtype} {noise.shape}: expected floats [B, {expected[0]}, {expected[1]}]")
    sparsity, parts = sparsity and fit(sparsity, len(table.times)), ("attention", "mlp")
    planned = [getattr(table.step, part) is not None for part in parts]
    if [bool(sparsity and getattr(sparsity, part)) for part in parts] != planned:
        raise InputError(f"sparsity={sparsity}: expected that of the table, as plan() was given it")
    x = jnp.asarray(noise, jnp.float32)
    stacks = model.stacks(x.shape[1], cond)
    batch, caching, both = _entries(x, table), table.caching, table.step.one_sided is None
    gate = start_gate(caching, x, partial(_first_signal, model, x, cond, table)) if caching else None
    drift = None if table.max_drift is None else DriftGuard.start(x)
    return SampleState(
        x=x,
        solver=table.solver.init(x[:, table.order]),
        cache=caches.zeros(stacks, sparsity, batch, model.dtype) if sparsity else None,
        kept=start_kept(caching, model, stacks, x, batch if both else len(x)) if caching else None,
        broken=jnp.full(len(x), -1, jnp.int32),
        gate=gate,
        difference=None if both else jnp.zeros_like(x),
        drift=drift,
        taken=jnp.zeros((3, len(table.times)), bool) if gate or drift else None,
    )


@usual_modes()
def denoise(
    model: Model,
    state: SampleState,
    cond: Condition,
    table: Table,
    *,
    span: tuple[int, int] | None = None,
    on_step: OnStep | None = None,
) -> SampleState:
    """The state after some steps. Pure: works under jax.jit, jax.eval_shape and, without sparsity, jax.grad.

    Two spans give the bits of one: denoise(.., span=(0, 10)), then (10, 20) of what that returns.

    Args:
        model: the network.
        state: of start(), or of the span before.
        cond: the network's conditions, those of the tokens in raster order; [B, ..], or with guidance [2 B, ..] of both_sides().
        table: of plan().
        span: steps to run, from the first to before the second, static; None: all of them.
        on_step: called while the loop is traced as on_step(step, t, x, clean) with what the step led to: the time, x
            [B, N, C] in raster order, and the clean sample that it points at. progress.on_step makes one that tells the host.

    Raises:
        InputError: a span of steps that the table does not have, or conditions of another batch than the network sees.
    """
    order, back, timesteps, guidance = table.order, table.back, jnp.asarray(table.timesteps), table.guidance
    steps = len(table.times)
    span = (0, steps) if span is None else span
    two = isinstance(span, (tuple, list)) and len(span) == 2 and all(map(is_whole, span))
    if not two or not 0 <= span[0] <= span[1] <= steps:
        raise InputError(f"span={span}: expected two of the {steps} steps in order, such as (0, {steps})")
    entries, caching = _entries(state.x, table), table.caching
    _check_entries(cond, entries)
    cond = {name: x[:, order] if name in model.on_grid else x for name, x in cond.items()}
    # Of all entries, and of those whose velocity is asked for: where steps are one-sided, the prompt's.
    all_told = Told.of(model, table.times, cond, entries)
    own_told = all_told if state.difference is None else Told.of(model, table.times, cond, len(state.x))

    def body(state: SampleState, index: jax.Array):
        step, now, told = table.step.at_step(index), timesteps[index], all_told.at(index)
        drift = state.drift
        if drift is not None:
            step = drift.allowed(step, table.max_drift, now)
        own = told if state.difference is None else own_told.at(index)
        tokens = model.embed(state.x if guidance is None else jnp.concatenate([state.x, state.x]), cond)
        skip, gate = step.skip, state.gate
        compute = partial(run_sides, model, step, told, own, table.positions, tokens)
        guided = lambda hidden, difference: guide(model.velocity(hidden, own.mods), guidance, difference)
        if caching is None:
            hidden, cache, difference = compute(state.cache, state.difference)
            velocity, kept = guided(hidden, difference), None
        else:
            own_tokens = tokens if state.difference is None else tokens[: len(state.x)]

            def run(cache, kept, gate, difference, _):
                hidden, cache, difference = compute(cache, difference)
                if caching.gate == "easy":
                    gate = ran(gate, state.x, model.velocity(hidden, own.mods)[: len(state.x)])
                if caching.predict == "residual":
                    return cache, kept.after(hidden - own_tokens, now), gate, difference, hidden
                found = guided(hidden, difference) if caching.predict == "velocity" else hidden
                return cache, kept.after(found, now), gate, difference, None

            if gate is not None:
                seen = signal_of(model, table, state.x, tokens, told.mods, now)
                skip, gate = decide(caching, gate, skip, seen)
            # tokens + (hidden - tokens) is not hidden bit for bit, so a step that runs hands hidden on beside the residual.
            hidden = own_tokens + state.kept.at(now) if caching.predict == "residual" else None
            carried = state.cache, state.kept, gate, state.difference, hidden
            cache, kept, gate, difference, hidden = unless_skipped(skip, run, *carried)
            found = kept.at(now) if hidden is None else hidden
            velocity = found if caching.predict == "velocity" else guided(found, difference)
        step, taken = step.replace(skip=skip), state.taken
        if drift is not None:
            drift = drift.after(step, now, velocity)
        if taken is not None:
            taken = taken.at[:, index].set(jnp.stack(step.kind))
        x, solver = table.solver.step(state.x, state.solver, velocity, now, timesteps[index + 1])
        if on_step:
            on_step(index, timesteps[index + 1], x[:, back], (state.x - now * velocity)[:, back])
        cache = None if state.cache is None else cache
        broken = jnp.where((state.broken < 0) & ~jnp.isfinite(x).all((1, 2)), index, state.broken)
        return SampleState(x, solver, cache, kept, broken, gate, difference, drift, taken), None

    state, _ = lax.scan(body, state.replace(x=state.x[:, order]), jnp.arange(*span, dtype=jnp.int32))
    return state.replace(x=state.x[:, back])


def signal_of(model: Model, table: Table, x: jax.Array, tokens: jax.Array, mods: Any, t: jax.Array) -> jax.Array:
    """What a gate that decides sees at time t of x [B, N, C], of its embedded tokens, or of the times: the prompt's side."""
    match table.caching.gate:
        case "tea":
            return model.tea_signal(tokens, mods)[: len(x)]
        case "sea":
            return filtered(table.caching, model.signal(tokens, mods)[: len(x)], table.back, t)
    return x


def both_sides(model: Model, cond: Condition, uncond: Condition | None = None) -> Condition:
    """Conditions of both sides of guidance, [2 B, ..]: the prompt's, then the others'.

    Args:
        model: the network.
        cond: [B, ..] each.
        uncond: of the other side; None: the same, with zeros for what a prompt makes.
    """
    uncond = uncond or {name: jnp.zeros_like(x) if name in model.prompted else x for name, x in cond.items()}
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)


def _first_signal(model: Model, x: jax.Array, cond: Condition, table: Table) -> jax.Array:
    """signal_of() the first step."""
    rows = jnp.broadcast_to(table.times[:1, None], (1, _entries(x, table)))
    mods = jax.tree.map(lambda a: a[0], model.modulations(rows, cond))
    tokens = model.embed(x if table.guidance is None else jnp.concatenate([x, x]), cond)
    return signal_of(model, table, x, tokens, mods, table.timesteps[0])


def _entries(x: jax.Array, table: Table) -> int:
    """How many entries the network sees: B, with guidance 2 B."""
    return len(x) if table.guidance is None else 2 * len(x)


def _check_entries(cond: Condition, batch: int) -> None:
    """Raises InputError unless every condition has as many entries as the network sees."""
    if wrong := [name for name, x in cond.items() if len(x) != batch]:
        raise InputError(
            f"condition {wrong[0]} {cond[wrong[0]].shape}: expected a batch of {batch}; guidance takes both_sides()"
        )


@usual_modes()
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
    callback: Callable[[int, float, np.ndarray], None] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The samples, f32 [B, N, C], tokens in raster order; one after another where a gate or max_drift decides (Sparsity.decides).

    The same arguments give the same bits; on a GPU, where XLA chooses algorithms by timing them, in another process only with a
    compilation cache (jax_compilation_cache_dir), as the command line keeps one.

    Compiled once for the shapes of its arguments: prompts, seeds, guidance, times, schedules and shares of columns are data, the
    number of dense layers and the query stride are not.

    Args:
        model: the network, weights on the device.
        noise: [B, N, C], unit normal, floats, tokens in raster order; of JAX or NumPy, as all arrays.
        cond: the network's conditions, each [B, ..], floats but for a mask; those of the tokens in raster order.
        timesteps: [steps + 1], f32, from 1 to 0, each less than the one before; an array or a list.
        grid: (rows, columns) of the tokens, of a video (frames, rows, columns); their product is N.
        sparsity: what to recompute at each step; None samples densely.
        guidance: scale of true (two-sided) guidance, v_u + guidance (v_c - v_u), as one batch of 2 B, up to 100; None for none.
            The scale that FLUX.1-dev and HunyuanVideo were trained with is a condition instead, cond["guidance"] [B].
        uncond: conditions of the other side; None: the same, without a prompt.
        seed: of the columns kept by chance.
        solver: None for Euler.
        progress: draws a bar.
        callback: called on the host as callback(step, t, x) after every step, x [B, N, C] in raster order; where samples
            are made one after another, with all steps of one, x [1, N, C], and then with those of the next.
        implementation: of the kernels, see pallas_kernels.dispatch.choose.

    What the networks take, and how they are usually sampled (chipmunk_jax.pipelines.variant_of has all of it by config):
        network        values of a token, in this order   guidance                                      solver   shift of times
        flux           channel, row, column               cond["guidance"], 3.5 (dev); none (schnell)   Euler    by tokens; none
        hunyuan_video  channel, frame, row, column        cond["guidance"], 6.0                         Euler    7
        wan            frame, row, column, channel        guidance=5.0, 6.0 (1.3B), 3.5 (Wan2.2 A14B)   UniPC    5; 8 (1.3B)
    A guidance that is a condition is the plain scale: the networks multiply it by 1,000 themselves, as they do times from 1 to 0.

    Example, of a published model as it is usually sampled:
        model = chipmunk_jax.load("flux-dev")  # written by `chipmunk convert flux1-dev.safetensors flux-dev`
        usual = chipmunk_jax.variant_of(model.config)
        noise = jax.random.normal(jax.random.key(0), (1, 48 * 80, 64), "bfloat16")  # of 1280 x 768 pixels
        cond = {"text": .., "pooled": .., "guidance": jax.numpy.full(1, 3.5)}  # text [1, 512, 4096] of T5, pooled [1, 768] of CLIP
        settings = dict(timesteps=usual.timesteps(), grid=usual.grid(), guidance=usual.guidance, solver=usual.solver)
        sparsity = chipmunk_jax.load_sparsity(usual.preset)
        latents = chipmunk_jax.sample(model, noise, cond, sparsity=sparsity, **settings)

    Raises:
        InputError: arguments that do not fit together or are not finite, or no room for the caches; before anything is compiled.
        NotFiniteError: the sample is not finite; it says from which step on.
        KeyboardInterrupt: at once; what was begun runs on, and a process that ends waits for it.
    """
    fixed = dict(timesteps=timesteps, grid=grid, sparsity=sparsity, guidance=guidance, seed=seed)
    fixed |= dict(solver=solver, implementation=implementation)
    if callback is not None and not callable(callback):
        raise InputError(f"callback={callback!r}: expected a function of (step, t, x), or None")
    noise, cond, uncond = placed(model, noise, cond, uncond)
    fitted = check(model, noise, cond, uncond=uncond, **fixed)
    seen = callback and (lambda step, t, x, _: callback(step, t, x))
    apart = fitted is not None and fitted.decides
    table = plan(model, noise[:1] if apart else noise, cond, **fixed)
    steps, dense = len(table.times), fitted is None or fitted.saves_nothing
    with Reporter(steps * len(noise) if apart else steps, "dense" if dense else "sparse", progress, seen) as reporter:
        given = dict(uncond=uncond, sparsity=sparsity)
        return jnp.concatenate([state.x for state in run(model, noise, cond, table, reporter, apart=apart, **given)])


def run(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    table: Table,
    reporter: Reporter,
    *,
    uncond: Condition | None = None,
    sparsity: Sparsity | None = None,
    carried: Sequence[SampleState] = (),
    apart: bool = False,
) -> list[SampleState]:
    """The states after the last step of a table, one of all samples or one each; their x is what sample() gives, once checked.

    Args:
        model, noise, cond, uncond: as of sample().
        table: of plan(), for one sample where they are apart.
        reporter: entered; its callback(step, t, x, clean) sees the clean sample too, that x points at, in raster order.
        sparsity: that of the table.
        carried: what another network led to, whose steps came before: x and the solver go on from there, the caches are new.
        apart: samples one after another, as gates that decide and the drift guard have it, in place of all at once.

    Raises:
        NotFiniteError: a sample is not finite; it says from which step on.
    """
    states, broken = [], np.full(len(noise), -1)
    for i in range(len(noise) if apart else 1):
        take = lambda x, i=i: lax.dynamic_slice_in_dim(x, i, 1)
        one = jax.tree.map(take, (noise, cond, uncond)) if apart else (noise, cond, uncond)
        state = _run_together(model, *one, table, reporter, sparsity, carried[i] if carried else None)
        broken[i : i + len(state.broken)] = state.broken
        check_finite(broken, table, model.dtype, first=reporter.first)
        states.append(state.replace(cache=None, kept=None, difference=None, gate=None, drift=None))
    return states


def _run_together(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    uncond: Condition | None,
    table: Table,
    reporter: Reporter,
    sparsity: Sparsity | None,
    carried: SampleState | None,
) -> SampleState:
    """The state of all samples of run() at once."""
    if table.guidance is not None:
        cond = both_sides(model, cond, uncond)
    state = start(model, noise, cond, table, sparsity=sparsity)
    if carried is not None:
        state = state.replace(x=carried.x, solver=carried.solver)
    # Placed by name: the program is called in another thread, where jax_transfer_guard is the caller's.
    given = jax.device_put((model, state.cache, state.replace(cache=None), cond, table))
    with jax.disable_jit(False):
        given = *given, jax.device_put(reporter.run)
        reporter.pause("compiling")
        return finished(_run.lower(*given, report=reporter.kind), *given, started=reporter.resume)


# The caches alone are donated: the noise is the caller's.
@partial(jax.jit, static_argnames="report", donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
def _run(model: Model, cache, state: SampleState, cond: Condition, table: Table, number: jax.Array, *, report: str):
    return denoise(model, state.replace(cache=cache), cond, table, on_step=progress_of(number, report))


def check_finite(broken: np.ndarray, table: Table, dtype: jnp.dtype, first: int = 0) -> None:
    """Raises NotFiniteError where a sample is not finite.

    Args:
        broken: as of SampleState.
        table: of plan().
        dtype: of the model.
        first: number of the table's first step in the whole sample.
    """
    if (bad := np.flatnonzero(broken >= 0)).size:
        step = int(broken[bad].min())
        names = f"sample {listed([str(i + 1) for i in bad])} of {len(broken)}" if len(broken) > 1 else "the sample"
        hint = "; in float16 nothing is above 65504, bfloat16 goes on" if dtype == jnp.float16 else ""
        raise NotFiniteError(
            f"{names}: not finite from step {first + step} of 0 to {first + len(table.times) - 1} on, "
            f"t = {table.timesteps[step]:.4g}{hint}"
        )
