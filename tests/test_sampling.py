"""Laws of sample(): it is a plain Euler loop, its columns change nothing when all are kept, and its bits do not change at all."""

import dataclasses
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn
from flax import nnx
from safetensors.numpy import load_file

from chipmunk_jax import (
    AttentionSparsity,
    Euler,
    GuidanceCache,
    MlpSparsity,
    Sparsity,
    StepCache,
    UniPC,
    flux_timesteps,
    memory,
    sample,
    sampling,
    schedule,
    wan_timesteps,
)
from chipmunk_jax.convert import read
from chipmunk_jax.errors import InputError, NotFiniteError
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.progress import Reporter
from chipmunk_jax.sampling import both_sides, denoise, plan, start

GRID, TEXT, STEPS = (9, 14), 5, 6  # neither patches nor groups fit
TOKENS = GRID[0] * GRID[1]
CONFIG = FluxConfig(
    in_channels=6,
    vec_in_dim=8,
    context_in_dim=10,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(8, 12, 12),
    guidance_embed=False,
)
SPARSE = Sparsity(
    attention=AttentionSparsity(first_n_dense_layers=0, full_step_every=4, group=64),
    mlp=MlpSparsity(first_n_dense_layers=0, full_step_every=4, group=64),
)
SKIPPING = dataclasses.replace(SPARSE, step_cache=StepCache(skip_steps=(3, 5)))
ONE_SIDED = dataclasses.replace(SPARSE, guidance_cache=GuidanceCache(one_sided_steps=(2, 5)))
COMPOSED = dataclasses.replace(
    SKIPPING, mlp=dataclasses.replace(SPARSE.mlp, cache="residual"), guidance_cache=ONE_SIDED.guidance_cache
)
DECIDING = dataclasses.replace(SPARSE, step_cache=StepCache(gate="easy", threshold=9.0, predict="residual", order=1))


def make() -> Flux:
    return drawn(Flux, CONFIG)


@pytest.fixture(scope="module")
def model() -> Flux:
    return make()


def inputs(batch: int = 2, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    noise = jax.random.normal(keys[0], (batch, TOKENS, CONFIG.in_channels))
    text = jax.random.normal(keys[1], (batch, TEXT, CONFIG.context_in_dim))
    return noise, {"text": text, "pooled": jax.random.normal(keys[2], (batch, CONFIG.vec_in_dim))}


def draw(model, noise, cond, **options):
    options = {"timesteps": flux_timesteps(STEPS, TOKENS), "grid": GRID} | options
    return np.asarray(sample(model, noise, cond, **options))


def plain_euler(model, noise, cond, guidance=None):
    """The textbook's loop, tokens in raster order, two calls for guidance."""
    times, x = flux_timesteps(STEPS, TOKENS), noise
    nothing = jax.tree.map(jnp.zeros_like, cond)
    velocity = jax.jit(lambda x, t, cond: model(x, jnp.full(len(x), t), cond, model.positions(GRID))[0])
    for t, t_next in itertools.pairwise(times):
        v = velocity(x, t, cond)
        if guidance is not None:
            u = velocity(x, t, nothing)
            v = u + guidance * (v - u)
        x = x + (t_next - t) * v
    return np.asarray(x)


@jax.jit
def modulations(model, t, cond):
    return model.modulations(t, cond)


@jax.jit
def hidden(model, x, cond, mods):
    """The tokens before the final layer, dense."""
    return model.hidden(model.embed(x, cond), None, cond, model.positions(GRID), None, None, mods)[0]


@jax.jit
def velocity(model, tokens, mods):
    return model.velocity(tokens, mods)


# Float32 in another order of tokens and additions, six steps: 1e-4 for values of order 1.
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_dense_sampling_is_a_plain_euler_loop(model, guidance):
    noise, cond = inputs()
    np.testing.assert_allclose(
        draw(model, noise, cond, guidance=guidance), plain_euler(model, noise, cond, guidance), **CLOSE
    )


@pytest.mark.parametrize("cache", ["activations", "residual"])
def test_all_columns_kept_equals_dense_in_any_order_of_tokens(model, cache):
    noise, cond = inputs()
    everything = Sparsity(
        attention=AttentionSparsity(top_keys=1.0, first_n_dense_layers=0, group=64),
        mlp=MlpSparsity(top_keys=1.0, random_keys=0.0, first_n_dense_layers=1, group=64, cache=cache),
    )
    np.testing.assert_allclose(draw(model, noise, cond, sparsity=everything), plain_euler(model, noise, cond), **CLOSE)


def test_a_schedule_of_full_steps_equals_dense(model):
    """Up to the last step, as a schedule without any delta step keeps no caches."""
    (noise, cond), full, seen = inputs(), dict(full_step_schedule=tuple(range(STEPS - 1)), group=64), []
    sparsity = Sparsity(attention=AttentionSparsity(**full), mlp=MlpSparsity(**full))
    draw(model, noise, cond, sparsity=sparsity, callback=lambda *args: seen.append(args))
    dense = draw(model, noise, cond, callback=lambda *args: seen.append(args))
    for (_, _, x), (_, _, expected) in zip(seen[: STEPS - 1], seen[STEPS:], strict=False):
        np.testing.assert_allclose(x, expected, **CLOSE)
    every = Sparsity(attention=AttentionSparsity(full_step_every=1), mlp=MlpSparsity(full_step_every=1))
    np.testing.assert_allclose(draw(model, noise, cond, sparsity=every), dense, **CLOSE)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_skipped_step_shows_the_final_layer_the_tokens_of_the_last_one_that_ran(model, guidance):
    noise, cond = inputs()
    skip, x = (2, 3, 5), noise
    sides = [cond] if guidance is None else [cond, jax.tree.map(jnp.zeros_like, cond)]
    for i, (t, t_next) in enumerate(itertools.pairwise(flux_timesteps(STEPS, TOKENS))):
        mods = [modulations(model, np.full(len(x), t), side) for side in sides]
        if i not in skip:
            tokens = [hidden(model, x, *side) for side in zip(sides, mods, strict=True)]
        v, *u = (velocity(model, *side) for side in zip(tokens, mods, strict=True))
        x = x + (t_next - t) * (v if guidance is None else u[0] + guidance * (v - u[0]))
    caching = Sparsity(attention=None, mlp=None, step_cache=StepCache(skip_steps=skip))
    np.testing.assert_allclose(draw(model, noise, cond, sparsity=caching, guidance=guidance), x, **CLOSE)


def test_a_solver_with_a_history_and_a_callback_see_skipped_steps_like_others(model):
    noise, cond = inputs()
    skip, seen = (2, 3, 5), []
    times, solver = wan_timesteps(STEPS, 3.0), UniPC()
    x, state = noise, solver.init(noise)
    for i, t in enumerate(solver.times(times)):
        mods = modulations(model, np.full(len(x), t), cond)
        if i not in skip:
            tokens = hidden(model, x, cond, mods)
        x, state = solver.step(x, state, velocity(model, tokens, mods), times[i], times[i + 1])
    caching = Sparsity(attention=None, mlp=None, step_cache=StepCache(skip_steps=skip))
    options = dict(timesteps=times, solver=solver, callback=lambda i, t, x: seen.append(i))
    np.testing.assert_allclose(draw(model, noise, cond, sparsity=caching, **options), x, **CLOSE)
    assert seen == list(range(STEPS))


def test_another_choice_of_skipped_steps_compiles_nothing(model, compilations):
    skipping = lambda *steps: dataclasses.replace(SPARSE, step_cache=StepCache(skip_steps=steps))
    draw(model, *inputs(), sparsity=skipping(2))
    compilations.clear()
    draw(model, *inputs(), sparsity=skipping(3, 5), seed=9)
    for gate in (dict(gate="share", share=0.3), dict(gate="mag", threshold=0.2, coefficients=(1.0, 0.9, 0.9))):
        draw(model, *inputs(), sparsity=dataclasses.replace(SPARSE, step_cache=StepCache(**gate)))
    assert not compilations
    deciding = dict(gate="tea", coefficients=(1.0, 0.0), threshold=0.2, warm_up=0.2, max_skips=1)
    for change in ({}, dict(threshold=0.5), dict(coefficients=(2.0, 0.1)), dict(warm_up=0.4), dict(max_skips=3)):
        found = StepCache(**deciding | change)
        draw(model, *inputs(1), sparsity=Sparsity(attention=None, mlp=None, step_cache=found))
        assert bool(compilations) == (not change)
        compilations.clear()
    draw(model, *inputs(), timesteps=flux_timesteps(STEPS + 1, TOKENS))
    assert compilations


def test_a_skipped_step_leaves_the_caches_alone(model):
    """With everything kept a later step is dense again, whatever was skipped between."""
    noise, cond = inputs()
    everything = AttentionSparsity(top_keys=1.0, first_n_dense_layers=0, group=64)
    caching = StepCache(skip_steps=(2, 4))
    sparse, dense = (
        draw(model, noise, cond, sparsity=Sparsity(attention=attention, mlp=None, step_cache=caching))
        for attention in (everything, None)
    )
    np.testing.assert_allclose(sparse, dense, **CLOSE)


def test_sparse_sampling_runs_every_body_of_the_kernels_to_the_same_result(model):
    noise, cond = inputs()
    reference, interpreted = (
        draw(model, noise, cond, sparsity=SPARSE, implementation=name) for name in ("reference", "interpret")
    )
    np.testing.assert_allclose(interpreted, reference, **CLOSE)


def test_an_image_does_not_depend_on_its_batch(model):
    noise, cond = inputs()
    fixed = Sparsity(attention=SPARSE.attention, mlp=None)  # the random neurons are drawn for the whole batch
    together = draw(model, noise, cond, sparsity=fixed)
    for i in range(2):
        alone = draw(model, noise[i : i + 1], {name: value[i : i + 1] for name, value in cond.items()}, sparsity=fixed)
        np.testing.assert_allclose(together[i : i + 1], alone, **CLOSE)


def test_one_compile_for_all_prompts_seeds_guidance_scales_and_schedules_of_a_shape(model, compilations):
    roomy = dict(max_keys=0.9, first_n_dense_layers=0, group=64)
    configs = [
        Sparsity(attention=AttentionSparsity(top_keys=top, full_step_every=every, **roomy), mlp=MlpSparsity(**roomy))
        for top, every in ((0.2, 4), (0.5, 2), (0.7, 10))
    ]
    for seed, config in enumerate(configs):
        noise, cond = inputs(2, seed)
        compilations.clear()
        draw(model, noise, cond, sparsity=config, guidance=1.0 + seed, seed=seed)
        assert bool(compilations) == (seed == 0)


@pytest.mark.parametrize("without", [(), ("attention",), ("mlp",)])
def test_steps_compiled_apart_are_those_that_choose_as_they_run(model, monkeypatch, without):
    sparsity, (noise, cond) = dataclasses.replace(SPARSE, **dict.fromkeys(without)), inputs()
    table = table_of(model, noise, cond, sparsity)
    begin, calls = start(model, noise, cond, table, sparsity=sparsity), []
    monkeypatch.setattr(schedule, "choose", lambda *_, **__: calls.append(0) or "pallas")  # as on a GPU
    apart = jax.jit(lambda *args: denoise(*args))(model, begin, cond, table)  # the kernels' references run
    assert calls
    monkeypatch.undo()
    np.testing.assert_allclose(apart.x, draw(model, noise, cond, sparsity=sparsity), **CLOSE)


def test_callback_sees_every_step_in_raster_order_and_changes_nothing(model):
    noise, cond = inputs(1)
    seen, whole = [], draw(model, noise, cond)
    final = draw(model, noise, cond, callback=lambda *args: seen.append(args))
    assert [step for step, _, _ in seen] == list(range(STEPS))
    np.testing.assert_allclose([t for _, t, _ in seen], flux_timesteps(STEPS, TOKENS)[1:])
    np.testing.assert_array_equal(seen[-1][2], final)
    np.testing.assert_array_equal(final, whole)
    np.testing.assert_array_equal(draw(model, noise, cond, progress=True), whole)


def test_an_error_of_the_callback_comes_out_as_it_is(model):
    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(model, *inputs(1), callback=fail)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_raised_while_the_program_runs_and_the_next_sample_is_whole(model):
    whole, seen, over = draw(model, *inputs(1)), [], threading.Event()

    def interrupt(step, *_):
        seen.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(60)

    with pytest.raises(KeyboardInterrupt):
        draw(model, *inputs(1), callback=interrupt)
    assert seen == [0]
    over.set()
    np.testing.assert_array_equal(draw(model, *inputs(1), callback=lambda *_: None), whole)
    assert seen == [0]  # the program that was interrupted has run on, and told nobody


def table_of(model, noise, cond, sparsity=None, **options):
    options = dict(timesteps=flux_timesteps(STEPS, TOKENS), grid=GRID) | options
    return plan(model, noise, cond, sparsity=sparsity, **options)


@pytest.mark.parametrize(
    ("sparsity", "solver", "guidance"), [(None, Euler(), 2.0), (DECIDING, UniPC(), 2.0)], ids=["dense", "deciding"]
)
def test_two_spans_give_the_bits_of_one_and_of_sample(model, sparsity, solver, guidance):
    noise, cond = inputs(1)
    options = dict(timesteps=wan_timesteps(STEPS, 3.0), solver=solver, guidance=guidance)
    table = table_of(model, noise, cond, sparsity, **options)
    both = both_sides(model, cond) if guidance else cond
    run = jax.jit(denoise, static_argnames="span")
    begin = start(model, noise, cond, table, sparsity=sparsity)
    middle = run(model, begin, both, table, span=(0, 4))
    whole, parts = run(model, begin, both, table), run(model, middle, both, table, span=(4, STEPS))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(middle.x) != np.asarray(whole.x))
    assert sparsity is None or whole.taken[1].tolist() == [False, False, True, True, False, False]
    np.testing.assert_array_equal(draw(model, noise, cond, sparsity=sparsity, **options), whole.x)


def test_denoise_has_the_shapes_that_eval_shape_says(model):
    noise, cond = inputs()
    table = table_of(model, noise, cond, SPARSE)
    begin = jax.eval_shape(lambda model, noise: start(model, noise, cond, table, sparsity=SPARSE), model, noise)
    end = jax.eval_shape(denoise, model, begin, cond, table)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), end) == jax.tree.map(lambda a: (a.shape, a.dtype), begin)
    assert end.x.shape == noise.shape and end.cache["double"].mlp.out.shape == (1, 2, TOKENS, 64)


def test_the_gradient_with_respect_to_the_noise_is_that_of_small_differences(model):
    noise, cond = inputs(1)
    table = table_of(model, noise, cond)
    loss = lambda noise: jnp.sum(denoise(model, start(model, noise, cond, table), cond, table).x ** 2)
    both = jax.jit(jax.value_and_grad(loss))
    gradient = both(noise)[1]
    direction = jax.random.normal(jax.random.key(5), noise.shape) / noise.size**0.5
    along = (both(noise + 0.05 * direction)[0] - both(noise - 0.05 * direction)[0]) / 0.1
    # Float32 sums of 756 squares differ by some 1e-5 of 1,000, divided by 0.1.
    np.testing.assert_allclose(jnp.vdot(gradient, direction), along, rtol=2e-2)


@pytest.mark.parametrize("span", [(-1, 3), (3, 2), (0, STEPS + 1)])
def test_a_span_beyond_the_steps_is_refused(model, span):
    noise, cond = inputs(1)
    table = table_of(model, noise, cond)
    with pytest.raises(InputError, match="expected two of the 6 steps in order"):
        denoise(model, start(model, noise, cond, table), cond, table, span=span)


def test_a_state_or_conditions_that_are_not_of_the_table_are_refused(model):
    noise, cond = inputs(1)
    sparse, dense = table_of(model, noise, cond, SPARSE), table_of(model, noise, cond)
    for table, sparsity in ((sparse, None), (dense, SPARSE), (sparse, dataclasses.replace(SPARSE, mlp=None))):
        with pytest.raises(InputError, match="expected that of the table"):
            start(model, noise, cond, table, sparsity=sparsity)
    with pytest.raises(InputError, match=r"noise float32 \(1, 64, 6\): expected floats \[B, 126, 6\]"):
        start(model, noise[:, :64], cond, dense)
    with pytest.raises(InputError, match="expected a batch of 1; guidance takes both_sides"):
        denoise(model, start(model, noise, cond, dense), both_sides(model, cond), dense)


def over(function):
    """It as the body of a scan."""
    return lambda noise: jax.lax.scan(lambda carry, x: (carry, function(x)), 0, noise[None])


def sharded(function):
    """It over a mesh of one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    return jax.shard_map(function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())


def shaped(function):
    """It with shapes for arrays."""
    return lambda noise: jax.eval_shape(function, noise)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, over, sharded, shaped])
def test_sample_inside_a_trace_names_the_function_to_use(model, transform):
    noise, cond = inputs(1)
    noise = noise[None] if transform is jax.vmap else noise
    with pytest.raises(InputError, match=r"sample\(\) under jit, grad, vmap or the like: use .* denoise\(\)"):
        transform(lambda noise: sample(model, noise, cond, timesteps=flux_timesteps(2, TOKENS), grid=GRID).sum())(noise)


def test_a_step_hook_sees_the_clean_sample_that_the_velocity_points_at(model):
    """With Euler every step moves x to (t_next / t) x + (1 - t_next / t) clean."""
    noise, cond = inputs(1)
    seen, times = [], flux_timesteps(STEPS, TOKENS)
    table = table_of(model, noise, cond, SPARSE)
    with Reporter(STEPS, "", False, lambda *args: seen.append(args)) as reporter:
        sampling.run(model, noise, cond, table, reporter, sparsity=SPARSE)
    x = np.asarray(noise)
    for (_, t, after, clean), before in zip(seen, times, strict=False):
        np.testing.assert_allclose(after, t / before * x + (1 - t / before) * clean, **CLOSE)
        x = after
    assert [step for step, *_ in seen] == list(range(STEPS))
    np.testing.assert_allclose(seen[-1][3], x, **CLOSE)  # at t = 0 there is nothing left to do


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import jax, test_sampling as t
compile = jax.stages.Lowered.compile
jax.stages.Lowered.compile = lambda self: (os.kill(os.getpid(), signal.SIGINT), compile(self))[1]
t.draw(t.make(), *t.inputs(), sparsity=t.SPARSE, progress=True)
"""


@pytest.mark.usefixtures("interruptible")
def test_a_process_that_is_interrupted_while_xla_compiles_does_not_crash():
    program = INTERRUPTED.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGINT and done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr


BITS = """
import sys
sys.path.insert(0, {folder!r})
import hashlib, test_sampling as t
print(hashlib.sha256(t.draw(t.make(), *t.inputs(), sparsity=t.SPARSE, seed=3).tobytes()).hexdigest())
"""


def test_same_seed_same_bits_across_processes(model):
    here = hashlib.sha256(draw(model, *inputs(), sparsity=SPARSE, seed=3).tobytes()).hexdigest()
    script = BITS.format(folder=str(Path(__file__).parent))
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.split()[-1] == here
    assert here != hashlib.sha256(draw(model, *inputs(), sparsity=SPARSE, seed=4).tobytes()).hexdigest()


def half(**changes: int) -> Flux:
    """A model that the compiled kernels take."""
    config = FluxConfig(**(vars(CONFIG) | {"hidden_size": 256, "axes_dim": (16, 56, 56)} | changes))
    return Flux(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["activations", "residual"])
def test_compiled_kernels_sample_what_the_references_do(cache):
    model, (noise, cond) = half(), inputs()
    fixed = MlpSparsity(random_keys=0.0, first_n_dense_layers=0, full_step_every=4, group=64, cache=cache)
    sparsity = Sparsity(attention=SPARSE.attention, mlp=fixed)
    got, expected = (
        draw(model, noise, cond, sparsity=sparsity, implementation=name) for name in ("pallas", "reference")
    )
    # bf16 all the way through three layers and six steps; another choice of a few tied columns is part of it.
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sparsity", "guidance"),
    [(SPARSE, None), (SKIPPING, None), (ONE_SIDED, 2.0), (COMPOSED, 2.0)],
    ids=["sparse", "skipping", "one side", "composed"],
)
def test_no_cache_is_copied_in_the_compiled_program(monkeypatch, sparsity, guidance):
    """A copy of a stacked cache at every layer costs more than the delta step saves. (Of one layer, the stack is its part.)"""
    texts, caches_in, finished = [], set(), sampling.finished
    names = dict(int32="s32", float32="f32", bfloat16="bf16", float8_e4m3fn="f8e4m3fn")

    def spy(program, model, cache, *args, **options):
        stacked = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim > 3]
        caches_in.update(f"{names[a.dtype.name]}[{','.join(map(str, a.shape))}]" for a in stacked)
        texts.append(program.compile().as_text())
        return finished(program, model, cache, *args, **options)

    monkeypatch.setattr(sampling, "finished", spy)
    draw(half(depth=2, depth_single_blocks=3), *inputs(), sparsity=sparsity, guidance=guidance)
    copies = re.findall(r"= (\w+\[[\d,]+\])\S* copy(?:-start)?\(", texts[0])
    assert len(caches_in) > 3 and not caches_in & set(copies)
    parts = tuple(f"{kind}[{layers}," for kind in ("s32", "bf16") for layers in (1, 2))  # of one layer, too
    assert not [copy for copy in copies if copy.count(",") >= 3 and copy.startswith(parts)]


def deleted(array):
    """The array as it is once it was donated."""
    array.delete()
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (9, 13)}, "grid"),
        ({"grid": ()}, "grid"),
        ({"grid": (9.0, 14.0)}, "grid"),
        ({"timesteps": np.array([1.0])}, "timesteps"),
        ({"timesteps": None}, "timesteps None: expected at least two numbers"),
        ({"timesteps": [1.0, 0.5, 0.5, 0.0]}, r"timesteps \[1.0, 0.5, 0.5, 0.0\]: expected .* numbers that fall"),
        ({"timesteps": [1.0, 0.5, 0.5 - 1e-12, 0.0]}, "numbers that fall, in float32 too"),
        ({"timesteps": [1j, 0]}, "timesteps .*: expected at least two numbers"),
        ({"grid": 126}, "grid 126"),
        ({"timesteps": np.array([0.0, 1.0])}, "timesteps"),
        ({"timesteps": np.array([1.0, np.nan])}, "timesteps"),
        ({"timesteps": np.array([1000.0, 500.0, 0.0])}, "timesteps from 1000 to 0: expected them within 1 and 0"),
        ({"timesteps": np.array([1.0, 0.5, -0.5])}, "timesteps from 1 to -0.5"),
        ({"grid": (-9, -14)}, r"grid \(-9, -14\)"),
        ({"grid": (0, 5), "noise": jnp.zeros((2, 0, 6))}, r"grid \(0, 5\)"),
        ({"grid": (1, 9, 14)}, "grid .*: expected 2 sides, rows, columns"),
        ({"noise": jnp.zeros((0, TOKENS, 6))}, r"noise \(0, 126, 6\)"),
        ({"cond": {"text": jnp.zeros((2, 257, 10)), "pooled": jnp.zeros((2, 8))}}, "257 rows: expected 1 to 256"),
        ({"cond": {"text": jnp.zeros((2, 0, 10)), "pooled": jnp.zeros((2, 8))}}, "0 rows: expected 1 to 256"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"sparsity": "flux"}, r"sparsity='flux': expected a Sparsity, as load_sparsity\(\) makes"),
        ({"sparsity": Sparsity(patches=((4, 4, 8),))}, r"patch \(4, 4, 8\): expected 2 sides"),
        ({"sparsity": Sparsity(attention=AttentionSparsity(local_voxels=3))}, "local_voxels=3: expected at most 1"),
        ({"seed": True}, "seed=True: expected a whole number"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": [2.0]}, r"guidance=\[2.0\]: expected a number, the plain scale, up to 100"),
        ({"guidance": True}, "guidance=True: expected a number"),
        ({"guidance": 2j}, "guidance=2j: expected a number"),
        ({"guidance": 6016.0}, "guidance=6016.0: expected a number, the plain scale, up to 100"),
        ({"solver": Euler}, r"solver=.*: expected one such as Euler\(\)"),
        ({"implementation": "cuda"}, "implementation='cuda': expected None or one of"),
        ({"callback": 3}, "callback=3: expected a function"),
        ({"model": CONFIG}, "model FluxConfig: expected a network with its weights"),
        ({"noise": None}, "noise NoneType: expected an array"),
        ({"noise": jnp.zeros((2, TOKENS, 6), int)}, "noise of int32: expected floats"),
        ({"noise": jnp.zeros((2, TOKENS, 6), complex)}, "noise of complex64: expected floats"),
        ({"noise": jnp.full((2, TOKENS, 6), jnp.nan)}, "noise: holds NaN or infinity"),
        ({"noise": np.full((2, TOKENS, 6), 1e300)}, "noise: holds NaN or infinity"),
        ({"noise": np.full((2, TOKENS, 6), np.inf, ">f4")}, "noise: holds NaN or infinity"),
        ({"cond": []}, "cond list: expected the conditions by name"),
        (
            {"cond": {"text": jnp.zeros((2, 5, 10)), "pooled": jnp.full((2, 8), -jnp.inf)}},
            "condition pooled: holds NaN",
        ),
        (
            {"cond": {"text": jnp.zeros((2, 5, 10), int), "pooled": jnp.zeros((2, 8))}},
            "condition text int32: expected f",
        ),
        ({"cond": {"text": [[0.0]], "pooled": jnp.zeros((2, 8))}}, "condition text list: expected an array"),
        (
            {"guidance": 2.0, "uncond": {"text": jnp.zeros((2, 5, 10)) * jnp.nan, "pooled": jnp.zeros((2, 8))}},
            "condition",
        ),
        ({"uncond": {}}, "uncond"),
        ({"guidance": 2.0, "uncond": []}, "uncond list: expected the conditions by name"),
        ({"guidance": 2.0, "uncond": {}}, "conditions"),
        (
            {"guidance": 2.0, "uncond": {"text": jnp.zeros((2, 6, 10)), "pooled": jnp.zeros((2, 8))}},
            r"uncond: condition text \(2, 6, 10\), expected \(2, 5, 10\)",
        ),
        ({"cond": {"text": jnp.zeros((2, 5, 10)), 3: jnp.zeros((2, 8))}}, "cond dict: expected the conditions by name"),
        ({"noise": deleted(jnp.zeros((2, TOKENS, 6)))}, "noise ArrayImpl: expected an array .* none that is deleted"),
        ({"cond": {"text": jnp.zeros((2, 5, 10))}}, "conditions"),
        ({"cond": {"text": jnp.zeros((2, 5, 11)), "pooled": jnp.zeros((2, 8))}}, "text"),
        ({"cond": {"text": jnp.zeros((2, 5, 10)), "pooled": jnp.zeros((1, 8))}}, "pooled"),
        ({"noise": jnp.zeros((2, TOKENS, 7))}, "channels"),
        ({"sparsity": Sparsity(attention=AttentionSparsity(full_step_schedule=(0, 1, 9)))}, "step 9"),
        ({"sparsity": Sparsity(step_cache=StepCache(skip_steps=(3, 6)))}, "step 6, but there are 6 steps"),
        ({"sparsity": Sparsity(step_cache=StepCache(skip_steps=(1,)))}, "step 1: expected none that the attention"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_compiled(model, change, message, monkeypatch):
    noise, cond = inputs()
    monkeypatch.setattr(sampling, "_run", None)
    arguments = {"model": model, "noise": noise, "cond": cond} | change
    first = [arguments.pop(name) for name in ("model", "noise", "cond")]
    with pytest.raises(InputError, match=message):
        draw(*first, **arguments)


@pytest.mark.parametrize("dtype", ["float64", ">f4"])
def test_numpy_arrays_of_other_floats_and_a_list_of_times_are_those_of_float32(model, dtype):
    noise, cond = inputs()
    wide = [np.asarray(noise, dtype), {name: np.asarray(x, dtype) for name, x in cond.items()}]
    np.testing.assert_array_equal(
        draw(model, *wide, timesteps=flux_timesteps(STEPS, TOKENS).tolist()), draw(model, noise, cond)
    )


def table_with(table, factor, step):
    """The table with another time for the network at one step."""
    return table.replace(times=np.where(np.arange(STEPS) == step, factor, table.times).astype(np.float32))


@pytest.mark.parametrize("sparsity", [None, SKIPPING], ids=["dense", "skipping"])
def test_a_sample_that_is_not_finite_says_which_and_from_which_step_on(model, sparsity):
    noise, cond = inputs()
    table = table_with(table_of(model, noise, cond, sparsity), jnp.nan, 2)
    with (
        Reporter(STEPS, "", False, None) as reporter,
        pytest.raises(NotFiniteError, match=r"sample 1, 2 of 2: not finite from step 2 of 0 to 5 on, t = 0\.\d+$"),
    ):
        sampling.run(model, noise, cond, table, reporter, sparsity=sparsity)


def test_the_first_step_that_is_not_finite_is_the_same_in_spans(model):
    noise, cond = inputs()
    table = table_with(table_of(model, noise, cond), jnp.nan, 3)
    run = jax.jit(denoise, static_argnames="span")
    begin = start(model, noise, cond, table)
    whole = run(model, begin, cond, table)
    middle = run(model, begin, cond, table, span=(0, 4))
    assert begin.broken.tolist() == [-1, -1] and middle.broken.tolist() == whole.broken.tolist() == [3, 3]
    assert run(model, middle, cond, table, span=(4, STEPS)).broken.tolist() == [3, 3]


def test_one_sample_of_a_batch_that_is_not_finite_is_named_and_float16_is_told_of_bfloat16(model):
    times = flux_timesteps(STEPS, TOKENS)
    table = SimpleNamespace(timesteps=times, times=times[:-1])
    sampling.check_finite(np.array([-1, -1]), table, jnp.float16)
    with pytest.raises(
        NotFiniteError, match=r"sample 2 of 3: not finite from step 0 of 0 to 5 on, t = 1; in float16 .* bf"
    ):
        sampling.check_finite(np.array([-1, 0, -1]), table, jnp.float16)


def test_no_room_on_the_device_names_the_largest_part(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=r"no room on .*; use .*smaller"):
        draw(model, *inputs(), sparsity=SPARSE)


# SHA-256 over the converted leaves in order of their paths, bf16.
MINI_FLUX = "d36c53041dc9271db6f31dffeb2011721e40c716ffbf41ca9377a1a25659d080"


def test_mini_flux_converts_to_the_same_bytes(trained):
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves_of(read(trained("mini-flux"), "bfloat16")).items()):
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    assert digest.hexdigest() == MINI_FLUX


def test_mini_flux_reproduces_the_dense_golden_sample(trained):
    """28 steps with guidance 2 in float32, against diffusers in float32: 1e-3 (Black Forest Labs' schedule and ours agree)."""
    golden = load_file(Path(__file__).parent / "golden" / "mini_flux_64.safetensors")
    model = read(trained("mini-flux"), "float32")
    cond = {name: jnp.asarray(golden[name][:1]) for name in ("text", "pooled")}
    times = flux_timesteps(28, 1024)
    np.testing.assert_allclose(times, golden["sigmas"], atol=1e-6)
    out = sample(model, jnp.asarray(golden["noise"][:1]), cond, timesteps=times, grid=(32, 32), guidance=2.0)
    np.testing.assert_allclose(out, golden["latents"][:1], atol=1e-3, rtol=0)
