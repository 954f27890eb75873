"""One-sided steps: which they are, that they give what a plain loop does, and that they leave the other side's caches alone."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import drawn
from test_sampling import CLOSE, CONFIG, GRID, TOKENS, draw, hidden, inputs, modulations, velocity

from chipmunk_jax import AttentionSparsity, GuidanceCache, MlpSparsity, Sparsity, StepCache, flux_timesteps, sampling
from chipmunk_jax.bench.schedule import by_schedule
from chipmunk_jax.cli.sampled import summary
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.memory import plan as plan_memory
from chipmunk_jax.models.flux import Flux
from chipmunk_jax.pipelines import PipelineOutput
from chipmunk_jax.pipelines.denoising import Span, computed
from chipmunk_jax.progress import Reporter
from chipmunk_jax.report.charts import kinds_strip
from chipmunk_jax.report.price import step_kinds
from chipmunk_jax.schedule import AttentionPhase, Taken, as_taken, density, plan_steps, taken
from chipmunk_jax.sparsity import PRESETS, to_dict

ALONE = Sparsity(attention=None, mlp=None)
SIZES = dict(tokens=1000, mlp_width=1000)


def halved(sparsity=ALONE, **options):
    return dataclasses.replace(sparsity, guidance_cache=GuidanceCache(**options))


def listed(sparsity, steps, span=None):
    """The one-sided steps of a plan."""
    found = fit(sparsity, steps, span).guidance_cache
    return list(found.one_sided_steps) if found else []


# Which steps.


def test_one_side_runs_after_a_part_of_the_path_and_both_once_in_so_many_steps():
    assert listed(halved(after=0.5, every=3), 10) == [5, 6, 8, 9]  # 4 is the last before
    assert listed(halved(after=0.0, every=4), 9) == [1, 2, 3, 5, 6, 7]
    assert listed(halved(after=0.5, every=1), 10) == listed(halved(after=1.0), 10) == []


@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].step_cache])
def test_a_full_or_skipped_step_is_never_one_sided_and_no_difference_is_older_than_every(name, every):
    sparsity = halved(PRESETS[name], after=0.3, every=every)
    steps = sparsity.schedule_steps
    late = math.ceil(0.3 * steps)
    for first, stop in ((0, steps), (0, 18), (18, steps)):
        fitted = fit(sparsity, steps, (first, stop))
        found, skipped = listed(sparsity, steps, (first, stop)), set(fitted.step_cache.skip_steps)
        parts = [part for part in (fitted.attention, fitted.mlp) if part]
        full = set().union(*(part.full_step_schedule for part in parts))
        assert min(found, default=steps) >= max(1, late - first) and not set(found) & (skipped | full)
        both = set(range(stop - first)) - set(found) - skipped
        assert all(step - max(n for n in both if n < step) < every for step in found)
        needless = [step for step in both - full if step >= max(2, late - first)]
        assert (found or every < 100) and all(step - max(n for n in both if n < step) >= every for step in needless)
        assert fit(fitted, stop - first) == fitted


def test_with_more_steps_the_times_stay_that_run_one_side_or_both():
    named = dataclasses.replace(halved(one_sided_steps=(3, 4, 9, 11)), schedule_steps=12)
    assert listed(named, 12) == [3, 4, 9, 11] and listed(named, 6) == [2]  # of times that begin as 4 does
    assert listed(named, 48) == [4 * step + part for step in (3, 4, 9, 11) for part in range(4)]
    ruled = dataclasses.replace(halved(after=0.25, every=4), schedule_steps=12)
    assert listed(ruled, 12) == [3, 4, 5, 7, 8, 9, 11]
    assert [step for step in range(12, 48) if step not in listed(ruled, 48)] == [27, 43]  # every 16th after 11


def test_one_side_alone_has_nothing_to_leave_out():
    sparsity = halved(after=0.5, every=5)
    one, two = (plan_steps(sparsity, 10, **SIZES, sides=sides) for sides in (1, 2))
    assert one.one_sided is None and density(one, 4) == {"attention": 1.0, "mlp": 1.0}
    assert two.one_sided.tolist() == [False] * 5 + [True] * 4 + [False]
    assert density(two, 4) == {"attention": 0.8, "mlp": 0.8}
    assert [fit(sparsity, 10, guided=guided).saves_nothing for guided in (False, True)] == [True, False]


def test_a_one_sided_step_counts_and_costs_half_of_one_that_runs_both():
    base = dataclasses.replace(PRESETS["wan-14b"], schedule_steps=None)
    one_sided = (12, 22, 32)
    both, some = (plan_steps(s, 50, **SIZES, sides=2) for s in (base, halved(base, one_sided_steps=one_sided)))
    kinds, before = (
        step_kinds(as_taken(one, 50, dataclasses.replace(taken(one, 50), skipped=(22,))), 50) for one in (some, both)
    )
    assert [i for i in range(50) if kinds[i] != before[i]] == [12, 32] and kinds[12] == "delta, one side"
    assert kinds_strip(kinds).count('class="delta one-side"') == 2
    share = (
        3
        * density(both.replace(attention=both.attention.replace(phase=np.int32([AttentionPhase.DELTA]))), 40)[
            "attention"
        ]
    )
    assert density(both, 40)["attention"] - density(some, 40)["attention"] == pytest.approx(share / 2 / 50)
    ms = dict(dense=10.0, full=12.0, select=14.0, delta=4.0)
    common = dict(
        model="wan-14b", peak_bytes=None, benchmark="step", dtype="bfloat16", shape={}, sparsity=to_dict(base)
    )
    steps = [common | dict(variant=kind, ms=value) for kind, value in ms.items()]
    _, whole = by_schedule(steps, 50, base)
    _, found = by_schedule(steps, 50, halved(base, one_sided_steps=one_sided))
    assert found["counts"]["delta, one side"] == 3 and whole["ms"] - found["ms"] == pytest.approx(3 * 4.0 / 2)


def test_a_step_of_a_result_is_full_or_skipped_or_one_sided_whichever_network_ran_it():
    step = plan_steps(halved(one_sided_steps=(2, 3)), 5, **SIZES, sides=2)
    table = lambda step: SimpleNamespace(step=step, times=range(5))
    span = lambda first, step: Span(role="", first=first, table=table(step), need=0, options={})
    found = computed([span(0, step), span(5, step.replace(skip=np.arange(5) == 3))], 4, 1)
    assert (found["one_sided_steps"], found["skipped_steps"]) == ((2, 3, 7), (8,))
    assert found["full_steps"] == (0, 1, 4, 5, 6, 9)
    out = PipelineOutput(seconds=1.0, settings={"num_inference_steps": 10}, **found)
    assert "full 0, 1, 4, 5, 6, 9, skipped 8, one-sided 2, 3, 7\n" in summary(out, 1, "video")
    [one], other = found["steps_by_sample"], Taken(full=(0, 1), one_sided=(2,))
    apart = dataclasses.replace(out, steps_by_sample=(one, other))
    assert "in the mean 0.5 skipped, in the mean 2 one-sided, as was decided" in summary(apart, 2, "video")


@pytest.mark.parametrize("sparsity", [ALONE, Sparsity(mlp=None)], ids=["alone", "with deltas"])
def test_steps_as_they_were_taken_are_told_as_they_were(sparsity):
    """A gate may run, on one side or on both, what it may skip."""
    gated = halved(dataclasses.replace(sparsity, step_cache=StepCache(gate="easy")), after=0.3, every=4)
    step, found = plan_steps(gated, 9, **SIZES, sides=2), Taken(full=(0, 1, 2, 5, 8), skipped=(3, 6), one_sided=(4, 7))
    assert step.skip[3:8].all() and step.one_sided[[4, 7]].all() and taken(step, 9) != found
    assert taken(as_taken(step, 9, found), 9) == found


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: GuidanceCache(after=1.5), "after=1.5: expected a fraction from 0 to 1"),
        (lambda: GuidanceCache(every=0), "every=0: expected at least 1"),
        (lambda: GuidanceCache(one_sided_steps=()), r"one_sided_steps=\(\): expected at least one, none before step 1"),
        (lambda: GuidanceCache(one_sided_steps=(0, 3)), r"expected at least one, none before step 1"),
        (
            lambda: fit(halved(one_sided_steps=(3, 12)), 12),
            r"guidance_cache.one_sided_steps names step 12, but there are 12 steps \(0 to 11\)",
        ),
        (
            lambda: fit(halved(Sparsity(mlp=None), one_sided_steps=(1, 5)), 12),
            "guidance_cache.one_sided_steps names step 1: expected none that the attention computes in full",
        ),
    ],
)
def test_bad_settings_are_one_sentence(act, message):
    with pytest.raises(InputError, match=message):
        act()


# In the scan.


@pytest.fixture(scope="module")
def model():
    return drawn(Flux, CONFIG)


def plain_loop(model, noise, cond, guidance, times, skipped, one_sided):
    """Every side in calls of its own; a one-sided or a skipped step has the last difference."""
    x, nothing = np.asarray(noise), {name: np.zeros_like(value) for name, value in cond.items()}
    told = lambda side: (side, modulations(model, np.full(len(x), t, np.float32), side))
    look = lambda tokens, mods: np.asarray(velocity(model, tokens, mods))
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        side, mods = told(cond)
        if i not in skipped:
            tokens = hidden(model, x, side, mods)
        prompted = look(tokens, mods)
        if i not in {*skipped, *one_sided}:
            side, mods = told(nothing)
            difference = prompted - look(hidden(model, x, side, mods), mods)
        x = x + (t_next - t) * (prompted + (guidance - 1) * difference)
    return x


def test_samples_are_those_of_a_plain_loop_and_another_schedule_compiles_nothing(model, compilations):
    """With a scale of 1 the difference counts for nothing."""
    (noise, cond), skipped = inputs(1), (3, 6)
    times, skipping = flux_timesteps(8, TOKENS), dataclasses.replace(ALONE, step_cache=StepCache(skip_steps=skipped))
    found = []
    for guidance, options in (
        (2.0, dict(after=0.2, every=100)),
        (4.0, dict(one_sided_steps=(1, 4))),
        (1.0, dict(after=0.2, every=3)),
        (1.0, dict(one_sided_steps=(1, 2, 4, 5, 7))),
    ):
        compilations.clear()
        sparsity = halved(skipping, **options)
        found.append(draw(model, noise, cond, sparsity=sparsity, guidance=guidance, timesteps=times))
        assert bool(compilations) == (len(found) == 1)
        if guidance > 1:
            expected = plain_loop(model, noise, cond, guidance, times, skipped, listed(sparsity, 8))
            np.testing.assert_allclose(found[-1], expected, **CLOSE)
    np.testing.assert_allclose(*found[2:], **CLOSE)
    assert np.abs(found[0] - found[2]).max() > 1e-2


def test_sides_that_are_alike_give_the_sample_of_one_side_whatever_is_composed(model):
    """With all columns kept; a gate decides, and an extrapolated residual of the prompt's side stands for what is skipped."""
    noise, cond = inputs(1)
    kept = dict(top_keys=1.0, first_n_dense_layers=0, full_step_every=4, group=64)
    gate = StepCache(gate="easy", threshold=9.0, max_skips=1, predict="residual", order=1)
    parts = dict(attention=AttentionSparsity(**kept), mlp=MlpSparsity(random_keys=0.0, **kept), step_cache=gate)
    composed = halved(Sparsity(**parts), after=0.2, every=100)
    alone = dataclasses.replace(ALONE, step_cache=fit(composed, 8).step_cache)
    options = dict(timesteps=flux_timesteps(8, TOKENS), grid=GRID)
    x, skipped = [], []
    for sparsity, guidance in ((composed, 3.0), (alone, None)):
        table = sampling.plan(model, noise, cond, sparsity=sparsity, guidance=guidance, **options)
        with Reporter(8, "", False, None) as reporter:
            [state] = sampling.run(model, noise, cond, table, reporter, uncond=cond, sparsity=sparsity)
        x.append(state.x)
        skipped.append(np.flatnonzero(state.taken[1]).tolist())
    assert listed(composed, 8) == [2, 3, 5, 6, 7] and skipped[0] == skipped[1] == [2, 5]
    np.testing.assert_allclose(*x, **CLOSE)


def test_the_memory_plan_knows_the_difference_and_that_one_side_is_kept(model):
    noise, cond = inputs(1)
    skipping = dataclasses.replace(ALONE, step_cache=StepCache(skip_steps=(4,)))
    plan = lambda sparsity, guidance: plan_memory(
        model, noise, cond, steps=8, sparsity=fit(sparsity, 8, guided=guidance is not None), guidance=guidance
    )
    whole, half = plan(skipping, 2.0), plan(halved(skipping, after=0.5), 2.0)
    assert half["difference of both sides"] == TOKENS * CONFIG.in_channels * 4
    assert whole["kept for skipped steps"] - half["kept for skipped steps"] == TOKENS * CONFIG.hidden_size * 4
    assert half["modulations of all steps"] == 1.5 * whole["modulations of all steps"]
    assert plan(halved(skipping, after=0.5), None) == plan(skipping, None)
