"""Step caching: gates decide as plain loops of their formulas do, and a skipped step gives what the last ones that ran predict."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn
from test_sampling import CONFIG, GRID, TOKENS, inputs
from test_strictness import NETWORKS

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, StepCache, flux_timesteps, sampling
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.memory import plan as plan_memory
from chipmunk_jax.models.flux import Flux
from chipmunk_jax.models.leaves import abstract
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.progress import Reporter
from chipmunk_jax.schedule import plan_steps
from chipmunk_jax.step_cache import Kept, constants, unless_skipped, with_constants

ALONE = Sparsity(attention=None, mlp=None)
STEPS = 12


def with_cache(sparsity=ALONE, **options):
    return dataclasses.replace(sparsity, step_cache=StepCache(**options))


def listed(sparsity, steps=STEPS, span=None):
    """The steps that a plan skips."""
    found = fit(sparsity, steps, span).step_cache
    assert found is None or found.gate == "list"
    return list(found.skip_steps) if found else []


def longest_row(steps):
    """The most steps one after the other."""
    return max((n for n in range(len(steps) + 1) if any(set(range(i, i + n)) <= set(steps) for i in steps)), default=0)


# Gates that are known before.


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("steps", [2, 4, 8, 20, 50])
@pytest.mark.parametrize("base", [ALONE, Sparsity(attention=AttentionSparsity(full_step_every=5), mlp=None)])
def test_a_share_is_skipped_evenly_after_the_warm_up_but_never_a_full_or_the_last_step(base, steps, share):
    found = listed(with_cache(base, gate="share", share=share, warm_up=0.2, max_skips=3), steps)
    full = set(range(0, steps, 5)) | {1} if base.attention else set()
    assert not full & set(found) and all(max(1, math.ceil(0.2 * steps)) <= step < steps - 1 for step in found)
    assert len(found) <= round(share * steps) and longest_row(found) <= 3
    if not full and share == 0.5 and steps >= 20:
        assert len(found) == steps // 2 and max(np.diff(found)) <= 2


def magcache(ratios, threshold, most, free):
    """The published loop."""
    found, product, error, row = [], 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        product, row = product * ratio, row + 1
        error += abs(1 - product)
        if step in free and error < threshold and row <= most:
            found.append(step)
        else:
            product, error, row = 1.0, 0.0, 0
    return found


@pytest.mark.parametrize("name", constants()["mag"])
def test_magcache_skips_what_a_plain_loop_of_its_formula_does(name):
    ratios = constants()["mag"][name]["coefficients"]
    steps = len(ratios)
    assert steps == {"flux-dev": 28, "wan-i2v-14b": 40, "wan2.2-t2v-a14b": 40}.get(name, 50) and ratios[0] == 1
    sparse = Sparsity(attention=AttentionSparsity(full_step_every=7), mlp=None)
    for base, full in ((ALONE, set()), (sparse, {1, *range(0, steps, 7)})):
        sparsity = with_constants(with_cache(base, gate="mag", warm_up=0.2), name)
        assert sparsity.step_cache.threshold == constants()["mag"][name]["threshold"]
        free = {step for step in range(math.ceil(0.2 * steps), steps - 1) if step not in full}
        found = listed(sparsity, steps)
        assert found == magcache(ratios, sparsity.step_cache.threshold, 4, free) and longest_row(found) <= 4
    for threshold, count in ((0.0, 0), (1e9, None)):
        found = listed(with_cache(gate="mag", threshold=threshold, coefficients=tuple(ratios), warm_up=0.0), steps)
        assert len(found) == count if count == 0 else longest_row(found) == 4


def test_ratios_of_another_number_of_steps_have_the_same_product_over_a_part_of_the_path():
    """So twice the steps with half the change each skip as long a part of the path; errors are summed twice as often."""
    ratios = (1.0, *(0.97 for _ in range(19)))
    options = dict(gate="mag", coefficients=ratios, warm_up=0.0, max_skips=40)
    finer = listed(with_cache(**options, threshold=0.2), 40)
    assert finer == magcache([1.0, *(0.97**0.5 for _ in range(37)), 1.0, 1.0], 0.2, 40, set(range(1, 39)))


@pytest.mark.parametrize("gate", ["tea", "sea", "easy"])
def test_a_gate_that_decides_may_skip_what_is_neither_full_nor_warm_up_nor_last(gate):
    base = with_cache(Sparsity(attention=AttentionSparsity(full_step_every=5), mlp=None), gate=gate, warm_up=0.3)
    found = fit(base, 12)
    assert found.step_cache.gate == gate and found.step_cache.skip_steps == (4, 6, 7, 8, 9) and fit(found, 12) == found
    part = fit(base, 12, (6, 12))  # full at 0 and 1, and at 4, which is step 10
    assert part.step_cache.skip_steps == (2, 3) and fit(part, 6) == part


# What a skipped step gives.


def test_order_1_is_exact_for_what_is_linear_in_time_and_order_0_for_what_stays():
    value = lambda t: jnp.float32([[3.0, -2.0]]) * t + jnp.float32([[1.0, 5.0]])
    kept = {
        order: Kept(jnp.zeros((1, 2)), jnp.zeros((1, 2)) if order else None, jnp.float32(jnp.inf)) for order in (0, 1)
    }
    kept = {order: one.after(value(0.9), jnp.float32(0.9)) for order, one in kept.items()}
    for one in kept.values():  # what it was where only one has run
        np.testing.assert_array_equal(one.at(jnp.float32(0.5)), value(0.9))
    kept = {order: one.after(value(0.7), jnp.float32(0.7)) for order, one in kept.items()}
    np.testing.assert_allclose(kept[1].at(jnp.float32(0.4)), value(0.4), rtol=1e-5)
    np.testing.assert_array_equal(kept[0].at(jnp.float32(0.4)), value(0.7))
    for one in kept.values():
        np.testing.assert_array_equal(one.at(jnp.float32(0.7)), value(0.7))


@pytest.mark.parametrize("skip", [None, False, True])
def test_a_skipped_step_keeps_all_bits_and_another_one_runs(skip):
    run = lambda hidden, cache: (2 * hidden, {"a": cache["a"] * 2})
    hidden, cache = jnp.float32([0.1, jnp.inf]), {"a": jnp.float32([3])}
    flag = None if skip is None else jnp.array(skip)
    found = jax.jit(lambda flag: unless_skipped(flag, run, hidden, cache))(flag)
    jax.tree.map(np.testing.assert_array_equal, found, (hidden, cache) if skip else run(hidden, cache))


# In the scan. Each way compiles once, with a hook that records every step.

WAYS = {
    "tea": dict(gate="tea", predict="residual", order=1, coefficients=(0.5, 1.0, 0.0)),
    "sea": dict(gate="sea", predict="hidden", order=1),
    "easy": dict(gate="easy", predict="velocity"),
}
THRESHOLD = {"tea": 1.0, "sea": 2.0, "easy": 3.0}
TIMES = flux_timesteps(STEPS, TOKENS)
GUIDANCE = {"tea": 2.0}


@pytest.fixture(scope="module")
def model():
    return drawn(Flux, CONFIG)


def draw(model, sparsity, guidance=None):
    """x before every step and after the last, the velocity of each, and the state at the end."""
    (noise, cond), seen = inputs(1), []
    options = dict(timesteps=TIMES, grid=GRID, sparsity=sparsity, guidance=guidance)
    table = sampling.plan(model, noise, cond, **options)
    with Reporter(STEPS, "", False, lambda *args: seen.append(args)) as reporter:
        (state,) = sampling.run(model, noise, cond, table, reporter, sparsity=sparsity)
    x = [np.asarray(noise), *(after for _, _, after, _ in seen)]
    return x, [(x - clean) / t for x, (*_, clean), t in zip(x, seen, TIMES, strict=False)], state


def relative(a, b):
    return np.abs(a - b).mean() / np.abs(b).mean()


def wiener(tokens, t):
    """Of tokens [1, N, D] in raster order."""
    gain = np.ones(GRID)
    for axis, side in enumerate(GRID):
        f = np.maximum(np.abs(np.fft.fftfreq(side)), 1 / side) ** -3.0
        t = min(t, 1 - 1e-6)  # at 1 all is noise, and the mean that it is divided by 0
        gain *= np.expand_dims((1 - t) * f / ((1 - t) ** 2 * f + t**2), 1 - axis)
    grid = np.asarray(tokens, np.float64).reshape(*GRID, -1)
    return np.fft.ifft2(np.fft.fft2(grid, axes=(0, 1)) * (gain / gain.mean())[..., None], axes=(0, 1)).real


def decisions(gate, model, x, velocities, options):
    """Steps that a plain loop skips, by the recorded x and, of the steps that it runs, velocities."""
    _, cond = inputs(1)
    total, row, ran, found, before = 0.0, 0, [], [], None
    for step, t in enumerate(TIMES[:-1]):
        mods = model.modulations(jnp.full(1, t), cond)
        signal = x[step]
        if gate in ("tea", "sea"):
            signal = np.asarray(model.signal(model.embed(x[step], cond), mods))
            signal = wiener(signal, t) if gate == "sea" else signal
        change = math.inf
        if gate == "easy" and len(ran) > 1:
            a, b = ran[-2:]
            mean = lambda values: np.abs(values).mean()
            slope = mean(velocities[b] - velocities[a]) / mean(x[b] - x[a])
            change = slope * mean(x[step] - x[step - 1]) / mean(velocities[b])
        elif gate != "easy" and before is not None:
            change = relative(signal, before)
            change = 0.5 * change**2 + change if gate == "tea" else change
        total, before = total + change, signal
        if (
            max(1, math.ceil(0.1 * STEPS)) <= step < STEPS - 1
            and total < options["threshold"]
            and row < options["max_skips"]
        ):
            found.append(step)
            row += 1
        else:
            total, row = 0.0, 0
            ran.append(step)
    return found


@pytest.mark.parametrize("gate", WAYS)
def test_a_gate_decides_as_a_plain_loop_of_its_formula_and_skips_nothing_at_threshold_0(model, gate):
    """tea with guidance: the prompt's side decides for both."""
    options = WAYS[gate] | dict(threshold=THRESHOLD[gate], max_skips=2)
    x, velocities, state = draw(model, with_cache(**options), GUIDANCE.get(gate))
    found = np.flatnonzero(state.taken[1]).tolist()
    assert found == decisions(gate, model, x, velocities, options) and longest_row(found) == 2 < len(found)
    run, *_ = draw(model, with_cache(**options | dict(threshold=0.0)), GUIDANCE.get(gate))
    dense, *_ = draw(model, None, GUIDANCE.get(gate))
    np.testing.assert_allclose(run[-1], dense[-1], rtol=0, atol=1e-5)  # float32 in programs of their own
    assert np.abs(x[-1] - dense[-1]).max() > 1e-3


def test_samples_of_which_a_gate_decides_for_each_are_those_alone(model):
    noise, cond = inputs(2)
    options = dict(timesteps=TIMES, grid=GRID, sparsity=with_cache(**WAYS["easy"], threshold=THRESHOLD["easy"]))
    draw = lambda *part: sampling.sample(model, *jax.tree.map(lambda x: x[slice(*part)], (noise, cond)), **options)
    np.testing.assert_array_equal(draw(0, 2), np.concatenate([draw(0, 1), draw(1, 2)]))


@pytest.mark.parametrize("predict", ["residual", "velocity"])
def test_a_skipped_step_gives_the_last_residual_or_velocity(model, predict):
    """Of a step that is skipped right after one that ran; that hidden tokens are shown to the final layer: test_sampling.py."""
    _, cond = inputs(1)
    x, velocities, _ = draw(model, with_cache(predict=predict, skip_steps=(5, 8)))
    tokens, mods = model.embed(x[5], cond), [model.modulations(jnp.full(1, t), cond) for t in TIMES[4:6]]
    expected = velocities[4]
    if predict == "residual":
        last = model.embed(x[4], cond)
        added = model.hidden(last, None, cond, model.positions(GRID), None, None, mods[0])[0] - last
        expected = model.velocity(tokens + added, mods[1])
    np.testing.assert_allclose(velocities[5], expected, rtol=0, atol=1e-4)  # of x and a clean sample, by a division


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_show_gates_the_tokens_of_their_first_attention_and_wan_the_time(name):
    _, config, grid = NETWORKS[name]
    model, tokens = abstract(name, config, "float32"), math.prod(grid)
    shaped = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    cond = {key: shaped(*shape) for key, shape in model.conditions(tokens, 5).items()}

    def signals(model, x, cond):
        mods, tokens = model.modulations(jnp.full(1, 0.5), cond), model.embed(x, cond)
        return tokens, model.signal(tokens, mods), model.tea_signal(tokens, mods)

    embedded, signal, tea = jax.eval_shape(signals, model, shaped(tokens, model.channels), cond)
    assert embedded.shape == signal.shape == (1, tokens, 16) and signal.dtype == embedded.dtype
    assert tea.shape == ((1, 1, 16) if name == "wan" else embedded.shape)


# What is published, and what is refused.


def test_constants_are_of_published_models_and_fill_only_what_is_not_given():
    for gate in ("mag", "tea"):
        assert set(constants()[gate]) <= set(VARIANTS)
    found = with_constants(with_cache(gate="tea"), "flux-dev").step_cache
    assert (found.threshold, len(found.coefficients)) == (0.25, 5)
    own = with_cache(gate="tea", threshold=0.4, coefficients=(1.0, 0.0))
    assert with_constants(own, "mini-flux") == own and with_constants(ALONE, "mini-flux") == ALONE
    assert with_constants(with_cache(gate="tea", threshold=0.4), "flux-dev").step_cache.threshold == 0.4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: with_constants(with_cache(gate="tea"), "mini-wan"),
            "gate='tea': no constants for mini-wan, only for flux-dev, ",
        ),
        (
            lambda: with_constants(with_cache(gate="mag"), "flux-schnell"),
            "gate='mag': no constants for flux-schnell, only for",
        ),
        (
            lambda: fit(with_cache(gate="mag"), 20),
            "gate='mag': expected coefficients, a ratio for each step, and a threshold",
        ),
        (lambda: StepCache(gate="teacache"), "gate=teacache: expected one of list, share, mag, tea, sea, easy"),
        (lambda: StepCache(predict="x0"), "predict=x0: expected one of hidden, residual, velocity"),
        (lambda: StepCache(order=2), "order=2: expected 0 or 1"),
        (lambda: StepCache(share=1.1), "share=1.1: expected a fraction above 0 and up to 1"),
        (lambda: StepCache(warm_up=-0.1), "warm_up=-0.1: expected a fraction from 0 to 1"),
        (lambda: StepCache(max_skips=0), "max_skips=0: expected at least 1"),
        (lambda: StepCache(threshold=-1.0), "threshold=-1.0: expected 0 or more, or null"),
        (lambda: StepCache(coefficients=()), r"coefficients=\(\): expected at least one finite number, or null"),
        (lambda: StepCache(coefficients=("1",)), "coefficients=.*: expected a list of numbers"),
        (lambda: StepCache(gate="mag", coefficients=(1.0, -1.0)), "expected ratios above 0"),
    ],
)
def test_bad_settings_are_one_sentence(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_a_gate_that_a_model_or_a_batch_cannot_have_is_refused(model):
    fixed = dict(timesteps=TIMES, grid=GRID)
    plan = lambda sparsity, noise, cond, model=model: sampling.plan(model, noise, cond, sparsity=sparsity, **fixed)
    with pytest.raises(InputError, match="gate='easy' with 2 samples: expected one at a time"):
        plan(with_cache(gate="easy"), *inputs(2))
    with pytest.raises(InputError, match="gate='tea': expected coefficients, those of a polynomial"):
        plan(with_cache(gate="tea"), *inputs(1))

    class Bare:
        """A network without signals."""

        positions, stacks = model.positions, model.stacks

    with pytest.raises(InputError, match=r"gate='sea': Bare has no signal\(\); expected one of list, share, easy"):
        plan(with_cache(gate="sea"), *inputs(1), model=Bare())


def test_the_memory_plan_knows_what_is_kept(model):
    noise, cond = inputs(1)
    count = lambda **options: plan_memory(model, noise, cond, steps=STEPS, sparsity=fit(with_cache(**options), STEPS))
    kept = {key: count(**options)["kept for skipped steps"] for key, options in WAYS.items()}
    tokens, latents = TOKENS * CONFIG.hidden_size * 4, TOKENS * CONFIG.in_channels * 4
    assert count()["kept for skipped steps"] == tokens + 4
    assert (kept["tea"], kept["easy"]) == (2 * tokens + 4 + tokens + 2 * tokens, latents + 4 + 4 * latents)
    several = plan_memory(model, *inputs(3), steps=STEPS, sparsity=fit(with_cache(**WAYS["easy"]), STEPS))
    beside = "noise and conditions"  # of all samples, which are made one after another
    assert several | {beside: 0} == count(**WAYS["easy"]) | {beside: 0}
    assert "kept for skipped steps" not in plan_memory(model, noise, cond, steps=STEPS, sparsity=ALONE)


def test_a_planned_gate_is_in_the_table_and_the_shares():
    table = plan_steps(with_cache(Sparsity(mlp=MlpSparsity()), gate="share"), 20, tokens=1000, mlp_width=1000)
    assert 0 < table.skip.sum() <= 10 and table.skip.dtype == bool
    every = fit(with_cache(Sparsity(attention=None, mlp=None), gate="share", share=1.0, max_skips=30), 30).step_cache
    assert every.skip_steps == tuple(range(3, 29))  # after the first tenth, but for the last
