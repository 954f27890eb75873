"""The drift guard: it decides as a plain loop of its formulas does, and leaves alone what does not drift."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import drawn
from test_sampling import CONFIG, GRID, TOKENS, inputs

from chipmunk_jax import AttentionSparsity, GuidanceCache, MlpSparsity, Sparsity, StepCache, flux_timesteps, sampling
from chipmunk_jax.drift import LEFT
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.memory import plan as plan_memory
from chipmunk_jax.models.flux import Flux
from chipmunk_jax.progress import Reporter
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, Taken, plan_steps, taken
from chipmunk_jax.sparsity import PRESETS

STEPS = 12
TIMES = flux_timesteps(STEPS, TOKENS)
PART = dict(first_n_dense_layers=0, full_step_schedule=(0, 1, 6), group=64)
COMPOSED = Sparsity(
    attention=AttentionSparsity(**PART),
    mlp=MlpSparsity(**PART),
    step_cache=StepCache(predict="residual", skip_steps=(3, 5, 8, 9)),
    guidance_cache=GuidanceCache(one_sided_steps=(4, 10)),
)
ALONE = Sparsity(attention=None, mlp=None, step_cache=StepCache(skip_steps=(2, 3, 5, 6, 7, 9)))


def guarded(sparsity, bound):
    return dataclasses.replace(sparsity, max_drift=bound)


@pytest.fixture(scope="module")
def model():
    return drawn(Flux, CONFIG)


def draw(model, sparsity):
    """x after the last step, the velocity of each, and what they were."""
    (noise, cond), seen = inputs(1), []
    table = sampling.plan(model, noise, cond, timesteps=TIMES, grid=GRID, sparsity=sparsity, guidance=3.0)
    with Reporter(STEPS, "", False, lambda *args: seen.append(args)) as reporter:
        [state] = sampling.run(model, noise, cond, table, reporter, sparsity=sparsity)
    x = [np.asarray(noise), *(after for _, _, after, _ in seen)]
    velocities = [(x - clean) / t for x, (*_, clean), t in zip(x, seen, TIMES, strict=False)]
    return x[-1], velocities, taken(state.as_run(table.step), STEPS)


def decisions(planned, velocities, bound, sparse=True):
    """The full and the skipped steps of a plain loop over the velocities that were recorded."""
    mean = lambda values: np.abs(values).mean()
    full, skipped, ran, left = [], [], [], LEFT
    for step, (t, velocity) in enumerate(zip(TIMES[:-1], velocities, strict=True)):
        change = drift = 0.0
        if len(ran) > 1:
            k, last = ran[-2:]
            rate = mean(velocities[last] - velocities[k]) / mean(velocities[k]) / (TIMES[k] - TIMES[last])
            change = (TIMES[last] - t) * rate
            drift = mean(velocities[last] - velocities[full[-1]]) / mean(velocities[full[-1]])
        if step in planned.full or left * (drift + change) > bound:
            if full and ran[-1] != full[-1]:
                base, part = full[-1], (TIMES[full[-1]] - TIMES[ran[-1]]) / (TIMES[full[-1]] - t)
                moved = part * (velocity - velocities[base])
                left = np.clip(mean(velocities[ran[-1]] - velocities[base] - moved) / mean(moved), LEFT, 1)
            full.append(step)
        elif step in planned.skipped and left * drift + change <= bound:
            skipped.append(step)
            continue
        elif not sparse:
            full.append(step)
        ran.append(step)
    return tuple(full), tuple(skipped)


def test_steps_compute_what_a_plain_loop_of_the_formulas_says_in_one_program(model, compilations):
    """With a bound of almost 0 that is everything, with a large one what was planned, bit for bit as without a guard."""
    planned, found = taken(plan_steps(COMPOSED, STEPS, tokens=TOKENS, mlp_width=256, sides=2), STEPS), {}
    for bound in (1e-9, 0.02, 0.05, 0.1, 1e9):
        compilations.clear()
        found[bound] = _, velocities, steps = draw(model, guarded(COMPOSED, bound))
        assert bool(compilations) == (len(found) == 1)
        assert (steps.full, steps.skipped) == decisions(planned, velocities, bound)
        assert set(steps.one_sided) == set(planned.one_sided) - {*steps.full}
    assert len({steps for *_, steps in found.values()}) >= 4
    assert found[1e9][2] == planned
    np.testing.assert_array_equal(found[1e9][0], draw(model, COMPOSED)[0])
    everything = draw(model, Sparsity(attention=None, mlp=None))[0]
    assert found[1e-9][2] == Taken(full=tuple(range(STEPS)))
    np.testing.assert_allclose(found[1e-9][0], everything, atol=1e-4, rtol=0)


def test_skipped_steps_alone_are_guarded(model):
    planned = taken(plan_steps(ALONE, STEPS, tokens=TOKENS, mlp_width=256), STEPS)
    for bound in (0.05, 0.3):
        _, velocities, steps = draw(model, guarded(ALONE, bound))
        assert (steps.full, steps.skipped) == decisions(planned, velocities, bound, sparse=False)


def test_a_gate_that_decides_skips_no_step_that_the_guard_has_run(model):
    easy = StepCache(gate="easy", threshold=9.0, warm_up=0.2)
    sparsity = dataclasses.replace(COMPOSED, step_cache=easy, guidance_cache=None)
    free, held = (draw(model, guarded(sparsity, bound))[2] for bound in (1e9, 0.02))
    assert free.skipped and not held.skipped and set(held.full) > set(free.full)


@pytest.mark.parametrize(("again", "phase"), [(False, AttentionPhase.REFRESH), (True, AttentionPhase.SELECT)])
def test_a_step_made_full_is_one_of_the_schedule(again, phase):
    config = dataclasses.replace(COMPOSED, attention=AttentionSparsity(**PART, recompute_mask=again))
    table = plan_steps(config, STEPS, tokens=TOKENS, mlp_width=256, sides=2)
    made = table.made_full(np.isin(np.arange(STEPS), (1, 4, 8)))
    assert (
        made.attention.phase[[4, 6, 8]].tolist() == [phase] * 3
        and made.mlp.phase[[4, 8]].tolist() == [MlpPhase.FULL] * 2
    )
    assert not made.skip[8] and made.skip[9] and not made.one_sided[4] and made.one_sided[10]
    for before, after in zip(
        (table.attention.phase, table.mlp.phase), (made.attention.phase, made.mlp.phase), strict=True
    ):
        others = np.isin(np.arange(STEPS), (4, 8), invert=True)
        assert (before[others] == after[others]).all()


def test_a_guard_decides_for_one_sample_and_of_a_dense_one_there_is_none(model):
    plan = lambda sparsity, batch: sampling.plan(model, *inputs(batch), timesteps=TIMES, grid=GRID, sparsity=sparsity)
    with pytest.raises(
        InputError, match=r"max_drift=0\.05 with 2 samples: expected one at a time, as it decides for one"
    ):
        plan(guarded(COMPOSED, 0.05), 2)
    assert plan(guarded(Sparsity(mlp=None, attention=None), 0.05), 2).max_drift is None
    sides_alone = guarded(dataclasses.replace(ALONE, step_cache=None, guidance_cache=COMPOSED.guidance_cache), 0.05)
    assert not sides_alone.decides and fit(sides_alone, STEPS).max_drift is None
    few = guarded(COMPOSED, 0.05), fit(guarded(dataclasses.replace(PRESETS["flux"], mlp=None), 0.05), 2)
    assert few[0].decides and few[1].saves_nothing and few[1].max_drift is None
    for bound in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"max_drift={bound}: expected a finite number above 0, or null"):
            guarded(COMPOSED, bound)


def test_samples_that_too_few_steps_make_dense_run_at_once_with_the_bits_of_no_sparsity(model):
    few, seen = guarded(dataclasses.replace(PRESETS["flux"], mlp=None), 0.05), []
    options = dict(timesteps=flux_timesteps(2, TOKENS), grid=GRID, callback=lambda step, t, x: seen.append(len(x)))
    x, dense = (sampling.sample(model, *inputs(2), sparsity=sparsity, **options) for sparsity in (few, None))
    np.testing.assert_array_equal(x, dense)
    assert few.decides and seen == [2] * 4


def test_the_memory_plan_knows_the_velocities(model):
    (noise, cond), fixed = inputs(1), dict(steps=STEPS, guidance=3.0)
    with_guard, without = (
        plan_memory(model, noise, cond, sparsity=fit(one, STEPS), **fixed) for one in (guarded(COMPOSED, 0.1), COMPOSED)
    )
    assert sum(with_guard.values()) - sum(without.values()) == 2 * TOKENS * CONFIG.in_channels * 4


def test_samples_of_one_call_are_guarded_each(model):
    noise, cond = inputs(2)
    fixed = dict(timesteps=TIMES, grid=GRID, sparsity=guarded(COMPOSED, 0.05), guidance=3.0)
    both = sampling.sample(model, noise, cond, **fixed)
    take = lambda i: (noise[i : i + 1], {name: x[i : i + 1] for name, x in cond.items()})
    alone = [sampling.sample(model, *take(i), **fixed) for i in range(2)]
    np.testing.assert_array_equal(both, np.concatenate(alone))
    assert not any((a == b).all() for a, b in itertools.combinations(map(np.asarray, alone), 2))
