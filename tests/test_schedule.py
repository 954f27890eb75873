"""plan_steps(): the phases of every step, against tables written by hand."""

import jax
import numpy as np
import pytest

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, StepCache
from chipmunk_jax.errors import InputError
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, Step, attention_phases, density, mlp_phases, plan_steps
from chipmunk_jax.sparsity import PRESETS

# Letters of the tables below.
ATTENTION = {
    "m": AttentionPhase.MEASURE,
    "S": AttentionPhase.SELECT,
    "R": AttentionPhase.REFRESH,
    ".": AttentionPhase.DELTA,
}
MLP = {"F": MlpPhase.FULL, "s": MlpPhase.SELECT_DELTA, ".": MlpPhase.DELTA}


def spell(table, phases):
    """The phases as letters."""
    letters = {int(phase): letter for letter, phase in table.items()}
    assert phases.dtype == np.int32
    return "".join(letters[phase] for phase in phases.tolist())


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (50, "mS........R.........R.........R.........R........."),
        (28, "mS........R.........R......."),
        (3, "mS."),
        (2, "mS"),
        (1, "m"),
    ],
)
def test_attention_of_the_flux_preset_measures_selects_and_refreshes_every_tenth_step(steps, expected):
    assert spell(ATTENTION, attention_phases(AttentionSparsity(), steps)) == expected


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (50, "FsssssssssF.s.s.s.s.F.s.s.s.s.F.s.s.s.s.F.s.s.s.s."),
        (28, "FsssssssssF.s.s.s.s.F.s.s.s."),
        (2, "Fs"),
        (1, "F"),
    ],
)
def test_mlp_of_the_flux_preset_selects_at_every_step_then_at_every_second(steps, expected):
    assert spell(MLP, mlp_phases(MlpSparsity(), steps)) == expected


def test_mlp_with_a_residual_never_selects_between_full_steps():
    config = MlpSparsity(cache="residual")
    assert spell(MLP, mlp_phases(config, 28)) == "F.........F.........F......."


def test_select_every_counts_steps_from_the_start():
    config = MlpSparsity(full_step_every=4, select_every=3)
    assert spell(MLP, mlp_phases(config, 14)) == "FsssF.s.Fs..F."


def test_a_schedule_takes_the_place_of_full_step_every():
    steps, schedule = 50, (0, 1, 10, 40)
    attention = AttentionSparsity(full_step_schedule=schedule, full_step_every=3)
    assert spell(ATTENTION, attention_phases(attention, steps)) == "mS........R" + 29 * "." + "R" + 9 * "."
    mlp = MlpSparsity(full_step_schedule=schedule)
    expected = "FF" + 8 * "s" + "F" + ".s" * 14 + "." + "F" + ".s" * 4 + "."
    assert spell(MLP, mlp_phases(mlp, steps)) == expected


def test_recomputed_masks_are_selected_at_every_full_step():
    config = AttentionSparsity(recompute_mask=True, full_step_every=5)
    assert spell(ATTENTION, attention_phases(config, 12)) == "mS...S....S."


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(attention=AttentionSparsity(full_step_schedule=(0, 1, 28)), mlp=None),
        Sparsity(attention=None, mlp=MlpSparsity(full_step_schedule=(0, 28))),
    ],
)
def test_a_schedule_beyond_the_steps_is_one_error(sparsity):
    with pytest.raises(InputError, match=r"^(attention|mlp).full_step_schedule names step 28, but there are 28 steps"):
        plan_steps(sparsity, 28, tokens=100, mlp_width=100)
    plan_steps(sparsity, 29, tokens=100, mlp_width=100)


def test_a_plan_skips_the_steps_that_are_named_and_no_others():
    caching = StepCache(skip_steps=(7, 5, 5))
    table = plan_steps(Sparsity(step_cache=caching), 9, tokens=100, mlp_width=100)
    assert np.flatnonzero(table.skip).tolist() == [5, 7] and table.at_step(5).skip and not table.at_step(6).skip
    assert plan_steps(Sparsity(), 9, tokens=100, mlp_width=100).skip is None


@pytest.mark.parametrize(("part", "step"), [("attention", 1), ("attention", 10), ("mlp", 20)])
def test_a_full_step_cannot_be_skipped(part, step):
    dense = {"attention": None, "mlp": None}
    parts = dense | {part: AttentionSparsity() if part == "attention" else MlpSparsity()}
    with pytest.raises(InputError, match=rf"^step_cache.skip_steps names step {step}: expected none that the {part}"):
        plan_steps(Sparsity(**parts, step_cache=StepCache(skip_steps=(3, step))), 28, tokens=100, mlp_width=100)


def test_the_presets_skip_every_second_of_fifty_steps_and_no_full_one():
    for name in ("flux", "hunyuan-video", "wan-14b", "wan-1.3b"):
        table = plan_steps(PRESETS[f"{name}-step-cache"], 50, tokens=10_000, mlp_width=12_288)
        assert table.skip.sum() == 25


def test_a_plan_holds_what_the_config_says():
    sparsity = Sparsity(attention=AttentionSparsity(top_keys=0.5, first_n_dense_layers=3, group=64), mlp=None)
    table = plan_steps(sparsity, 12, tokens=1000, mlp_width=7)
    assert table.mlp is None and table.attention.columns == 1000 and table.attention.group == 64
    assert (table.attention.keep, table.attention.dense_layers, table.attention.random) == (512, 3, 0)
    assert table.attention.phase.shape == (12,)


@pytest.mark.parametrize("layers", [1, 2, 3, 57])
@pytest.mark.parametrize("steps", [1, 2, 28, 50])
@pytest.mark.parametrize("cache", ["activations", "residual"])
def test_density_is_the_mean_over_layers_and_steps(layers, steps, cache):
    block = {"activations": 0, "residual": 64}[cache]
    sparsity = Sparsity(
        attention=AttentionSparsity(block_means=block), mlp=MlpSparsity(cache=cache, first_n_dense_layers=1)
    )
    tokens, neurons = 1111, 12288
    expected = {"attention": [], "mlp": []}
    for step in range(steps):
        for layer in range(layers):
            full = {"attention": step < 2 or step % 10 == 0 or layer < 2, "mlp": step % 10 == 0 or layer < 1}
            columns = 192 + (18 if block else 0)  # 0.165 x 1111 = 183; 1111 / 64 = 17.4
            expected["attention"].append(1 if full["attention"] else columns / tokens)
            expected["mlp"].append(1 if full["mlp"] else 4096 / neurons)
    found = density(plan_steps(sparsity, steps, tokens=tokens, mlp_width=neurons), layers)
    assert found.keys() == expected.keys()
    for name, shares in expected.items():
        # The sums differ by the rounding of float64.
        assert found[name] == pytest.approx(np.mean(shares), rel=1e-12), name


def test_a_skipped_step_computes_nothing():
    sparsity = Sparsity(mlp=None, step_cache=StepCache(skip_steps=(3, 4)))
    table = plan_steps(sparsity, 6, tokens=1111, mlp_width=100)
    assert density(table, 4) == {"attention": pytest.approx((2 + 2 * (2 + 2 * 210 / 1111) / 4) / 6), "mlp": 4 / 6}


def test_density_of_a_dense_part_is_one():
    table = plan_steps(Sparsity(attention=None, mlp=None), 10, tokens=100, mlp_width=100)
    assert density(table, 5) == {"attention": 1.0, "mlp": 1.0}


@pytest.mark.parametrize("dense_layers", [0, 2, 100])
def test_the_first_layers_and_only_they_are_dense(dense_layers):
    sparsity = Sparsity(
        attention=AttentionSparsity(first_n_dense_layers=dense_layers),
        mlp=MlpSparsity(first_n_dense_layers=0),
    )
    table = plan_steps(sparsity, 12, tokens=100, mlp_width=100).replace(key=jax.random.key(0))
    for index in range(12):
        depths = []
        for first, layers in ((0, 1), (1, 4)):
            for start, stop, seen in table.at_step(index).runs(first, layers):
                for layer in range(start, stop):
                    depth = first + layer
                    expected = AttentionPhase.DENSE if depth < dense_layers else table.attention.phase[index]
                    assert seen.attention.phase == expected and seen.mlp.phase == table.mlp.phase[index]
                    assert seen.at_layer(layer, depth).layer == layer
                    depths.append(depth)
        assert depths == list(range(5))


def test_every_layer_of_every_step_has_a_key_of_its_own():
    table = plan_steps(Sparsity(), 4, tokens=100, mlp_width=100).replace(key=jax.random.key(0))
    keys = [table.at_step(i).at_layer(0, depth).key for i in range(4) for depth in range(3)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 12


def test_a_step_without_parts_stays_without():
    step = Step().at_layer(layer=1, depth=1)
    assert step.attention is None and step.mlp is None and step.key is None
