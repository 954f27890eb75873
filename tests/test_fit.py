"""fit(): schedules written for one number of steps, in samples of any other: as written at its own, elsewhere at the same times."""

import dataclasses

import numpy as np
import pytest

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, StepCache, load_sparsity
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.schedule import density, plan_steps
from chipmunk_jax.sparsity import PAPER_SKIPS, PRESETS

NUMBERS = (1, 2, 3, 4, 8, 13, 20, 28, 30, 40, 50, 100)
SIZES = dict(tokens=10_000, mlp_width=10_000)
WRITTEN = {name: preset.schedule_steps for name, preset in PRESETS.items()}
OWN = Sparsity(
    attention=AttentionSparsity(full_step_schedule=(0, 1, 5)),
    mlp=MlpSparsity(full_step_every=4),
    step_cache=StepCache(skip_steps=(3, 6, 9)),
)


def parts(sparsity):
    """The parts that are sparse."""
    return [part for part in (sparsity.attention, sparsity.mlp) if part]


def same(one, other, steps):
    """Two configs plan the same sample."""
    plans = [plan_steps(sparsity, steps, **SIZES) for sparsity in (one, other)]
    for name in ("attention", "mlp"):
        np.testing.assert_array_equal(*(getattr(plan, name) and getattr(plan, name).phase for plan in plans))
    np.testing.assert_array_equal(*(plan.skip for plan in plans))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_its_own_number_of_steps_is_what_is_written(name):
    same(PRESETS[name], dataclasses.replace(PRESETS[name], schedule_steps=None), WRITTEN[name])


def test_every_preset_says_what_its_steps_are_written_for():
    assert {name: {"mini-flux": 28, "mini-wan": 30}.get(name, 50) for name in PRESETS} == WRITTEN


@pytest.mark.parametrize("steps", NUMBERS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_full_step_stays_at_its_time_and_all_presets_plan_any_number_of_steps(name, steps):
    preset, fitted = PRESETS[name], fit(PRESETS[name], steps)
    assert fit(fitted, steps) == fitted  # it is fitted already
    for part in ("attention", "mlp"):
        before, after = getattr(preset, part), getattr(fitted, part)
        if after is None:
            continue
        named = before.full_step_schedule or range(0, WRITTEN[name], before.full_step_every)
        exact = np.array(named) * steps / WRITTEN[name]
        filling = [0, 1] if part == "attention" else [0]
        assert set(after.full_step_schedule) == {*np.floor(exact + 0.5).astype(int), *filling} <= set(range(steps))
        assert len(after.full_step_schedule) < steps
    shares = density(plan_steps(preset, steps, **SIZES), 57)
    few = 28 if name == "mini-flux" else 8  # every third of 28 steps is full
    assert fitted.saves_nothing == (set(shares.values()) == {1.0}) and (not fitted.saves_nothing or steps < few)


@pytest.mark.parametrize("steps", NUMBERS)
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].step_cache])
def test_as_many_steps_are_skipped_as_in_proportion_where_there_is_room(name, steps):
    preset, table = PRESETS[name], plan_steps(PRESETS[name], steps, **SIZES)
    skipped = np.flatnonzero(table.skip) if table.skip is not None else np.zeros(0, int)
    named = preset.step_cache.skip_steps or PAPER_SKIPS
    written = WRITTEN[name]
    wanted = len(named) * steps // written
    # The times of the list, from the start of its first step to the end of its last, without what is full, the first and the last.
    step = np.arange(steps)
    within = (step + 1) / steps > named[0] / written + 1e-9
    within &= step / steps < (named[-1] + 1) / written - 1e-9
    must = plan_steps(dataclasses.replace(preset, step_cache=None), steps, **SIZES)
    room = within & ~must.is_full & (step > 0) & (step < steps - 1)
    assert len(skipped) == min(wanted, room.sum()) and room[skipped].all()
    # Before each step as many as the list has skipped by then, but for those that full steps put off.
    if steps >= 20:
        by_now = np.array([np.sum(np.array(named) < i * written / steps) * steps / written for i in step])
        so_far = np.array([np.sum(skipped < i) for i in step])
        gaps = 1 if named is PAPER_SKIPS else max(1, steps / written)  # between full steps that put some off
        assert np.abs(by_now - so_far).max() < 2 * gaps


def test_the_wish_for_more_steps_skips_no_fewer():
    counts = [
        np.sum(plan_steps(PRESETS["hunyuan-video-step-cache"], n, **SIZES).skip) for n in (4, 8, 20, 28, 30, 40, 50)
    ]
    assert counts == sorted(counts) and counts[-1] == 25


@pytest.mark.parametrize(("steps", "switch"), [(40, 26), (50, 30), (20, 13), (8, 5), (4, 3)])
@pytest.mark.parametrize("name", ["wan-14b", "wan-14b-step-cache"])
def test_parts_of_a_sample_have_their_slice_of_its_schedule_and_caches_that_their_first_steps_fill(name, steps, switch):
    whole = fit(PRESETS[name], steps)
    for first, stop in ((0, switch), (switch, steps)):
        found = fit(PRESETS[name], steps, (first, stop))
        if found.attention:
            planned = {n - first for n in whole.attention.full_step_schedule if first <= n < stop}
            assert set(found.attention.full_step_schedule) == {0, 1} | planned
        if found.step_cache:
            skipped = set(found.step_cache.skip_steps)
            assert 0 not in skipped and not (found.attention and skipped & set(found.attention.full_step_schedule))
            assert max(skipped) < stop - first - (stop == steps)
        assert fit(found, stop - first) == found


@pytest.mark.parametrize("steps", [12, 13, 40])
def test_lists_without_a_number_of_steps_are_taken_as_they_are(steps):
    found = fit(OWN, steps)
    assert found.attention.full_step_schedule == (0, 1, 5) and found.step_cache.skip_steps == (3, 6, 9)
    assert found.mlp.full_step_schedule == tuple(range(0, steps, 4)) and found.mlp.full_step_every == 4
    with pytest.raises(InputError, match=r"step_cache.skip_steps names step 9, but there are 9 steps \(0 to 8\)"):
        fit(OWN, 9)


def test_a_list_beyond_the_steps_that_it_is_written_for_is_refused():
    with pytest.raises(
        InputError, match=r"skip_steps names step 9, but schedule_steps says 8 steps \(0 to 7\): expected 10"
    ):
        fit(dataclasses.replace(OWN, schedule_steps=8), 100)
    for number in (0, -3, 100_001):
        with pytest.raises(InputError, match=f"schedule_steps={number}: expected 1 to 100000, or null"):
            Sparsity(schedule_steps=number)
    with pytest.raises(InputError, match="schedule_steps='50': expected a whole number"):
        load_sparsity({"schedule_steps": "50"})


def test_the_last_step_is_skipped_only_where_the_list_names_its_own():
    every = Sparsity(attention=None, mlp=None, step_cache=StepCache(skip_steps=tuple(range(1, 10))), schedule_steps=10)
    assert fit(every, 5).step_cache.skip_steps == (1, 2, 3, 4)
    but_one = dataclasses.replace(every, step_cache=StepCache(skip_steps=tuple(range(1, 9))))
    assert fit(but_one, 5).step_cache.skip_steps == (1, 2, 3)
