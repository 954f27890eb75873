"""What a sample would cost on a published model, by the steps that were measured there."""

import dataclasses
import json
from pathlib import Path

import pytest

from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.report.price import ONE_SIDE, prices_of, read_prices, step_kinds
from chipmunk_jax.report.records import sparsity_of
from chipmunk_jax.report.work import dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import Step, Taken, as_taken, plan_steps
from chipmunk_jax.sparsity import PRESETS, AttentionSparsity, MlpSparsity, Sparsity

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
FILES = ("hunyuan-video-720x1280x129-h100", "wan-1.3b-480x832x81-h100", "flux-dev-step-1280x768-h100")
LAYERS = 10  # of the model that is judged


def steps_of(name):
    entries = map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["benchmark"] == "step"]


@pytest.fixture(scope="module")
def prices():
    """Of HunyuanVideo."""
    return prices_of(steps_of(FILES[0]))


def plan(steps=50, **changes):
    """A plan of many tokens, whose shares are not rounded to the kernels' 64 columns."""
    return plan_steps(dataclasses.replace(Sparsity(), **changes), steps, tokens=2**17, mlp_width=2**14)


@pytest.mark.parametrize("name", FILES)
def test_a_published_model_s_own_sample_costs_what_its_steps_take(name):
    """The price at the record's own shares is that of its own delta step; so a sample costs what its measured steps add up to."""
    entries = steps_of(name)
    ms = {entry["variant"]: entry["ms"] for entry in entries}
    variant, sparsity = VARIANTS[entries[0]["model"]], sparsity_of(entries[0])
    shape = entries[0]["shape"]
    settings = variant.complete(**{axis: shape[axis] for axis in variant.axes})
    network, noise, cond = variant.shapes(settings, 1, "bfloat16")
    stacks = network.stacks(noise.shape[1], cond)
    own, found = plan_stacks(stacks, sparsity, 50, variant.grid(settings)), read_prices(RESULTS / f"{name}.jsonl")
    assert {kind: price * ms["dense"] for kind, price in found.of(own, shape["layers"]).items() if kind in ms} == (
        pytest.approx(ms, rel=1e-9)
    )
    expected = sum(ms[kind] for kind in step_kinds(own, 50)) / ms["dense"]
    assert found.cost(own, 50, shape["layers"]) == pytest.approx(expected, rel=1e-9)
    assert 1 <= found.column < 2  # a chosen column costs no less than one in a dense kernel


def test_a_dense_step_costs_one_and_a_skipped_one_what_was_measured(prices):
    assert prices.cost(Step(), 7, LAYERS) == 7
    ms = {entry["variant"]: entry["ms"] for entry in steps_of(FILES[0])}
    assert prices.cost(as_taken(Step(), 7, Taken(skipped=(3, 5))), 7, LAYERS) == pytest.approx(
        5 + 2 * ms["skipped"] / ms["dense"]
    )
    every, some = (prices.cost(as_taken(plan(), 50, Taken(skipped=skips)), 50, LAYERS) for skips in ((), (4, 5)))
    delta = prices.of(plan(), LAYERS)["delta"]
    assert every - some == pytest.approx(2 * (delta - ms["skipped"] / ms["dense"]), rel=1e-2)  # one selects neurons


def test_the_cost_grows_with_the_shares_of_keys_and_neurons(prices):
    shares = (0.05, 0.2, 0.5, 1.0)
    keys = [prices.cost(plan(attention=AttentionSparsity(top_keys=s), mlp=None), 50, LAYERS) for s in shares]
    neurons = [prices.cost(plan(mlp=MlpSparsity(top_keys=s), attention=None), 50, LAYERS) for s in shares]
    assert keys == sorted(set(keys)) and neurons == sorted(set(neurons))
    assert keys[0] < 0.5 * 50 < 0.9 * 50 < neurons[0]  # of that model attention is nearly all
    more_layers = prices.cost(plan(attention=AttentionSparsity(first_n_dense_layers=5), mlp=None), 50, LAYERS)
    assert more_layers > prices.cost(plan(attention=AttentionSparsity(), mlp=None), 50, LAYERS)


def test_the_price_of_a_column_is_that_of_the_kernel_measured_alone(prices):
    """HunyuanVideo's attention over 7 % of the keys, and what a step of it takes by that: 20.3 s a share of keys, of 20.5 s."""
    kernels = map(json.loads, (RESULTS / "kernels-h100.jsonl").read_text().splitlines())
    (kernel,) = (k for k in kernels if k["benchmark"] == "column_attention" and k["shape"].get("K") == 8320)
    assert prices.column == pytest.approx(kernel["shape"]["N"] / (kernel["shape"]["K"] * kernel["speedup"]), rel=0.02)
    for share in (0.07, 0.3, 0.6):
        one = plan(attention=AttentionSparsity(top_keys=share, block_means=0), mlp=None)
        assert prices.of(one, 60)["delta"] == pytest.approx((3.2 + 20.3 * share) / 20.5, rel=0.03)


def test_the_parts_of_a_dense_step_are_those_of_its_matrix_products():
    """Counted by hand for a Wan: projections, cross-attention to the text, and what comes before and after the blocks."""
    variant = VARIANTS["mini-wan"]
    settings, c = variant.complete(frames=2, height=8, width=12), variant.config
    tokens, text, dim, layers = 12, variant.text_rows, c.dim, c.num_layers
    attention, mlp = 4 * tokens**2 * dim, 4 * tokens * dim * c.ffn_dim
    other = 2 * tokens * 6 * dim**2 + 2 * text * 2 * dim**2 + 4 * tokens * text * dim  # of a layer
    patch = c.in_dim * 16
    around = 2 * tokens * dim * 2 * patch + 2 * text * (c.text_dim + dim) * dim
    work = dense_work(variant, settings)
    total = layers * (attention + mlp + other) + around
    assert work.attention == pytest.approx(layers * attention / total, rel=1e-9)
    assert work.mlp == pytest.approx(layers * mlp / total, rel=1e-9)
    assert work.attention + work.mlp + work.other == pytest.approx(1)
    assert work.executed({"attention": 1.0, "mlp": 1.0}, 1.0) == pytest.approx(1)


def test_kinds_of_steps():
    """As bench_step names them; those that ran no block are told."""
    both = plan(12, attention=AttentionSparsity(full_step_every=5), mlp=MlpSparsity(full_step_every=5))
    found = step_kinds(as_taken(both, 12, Taken(full=(4,), skipped=(7, 8), one_sided=(11,))), 12)
    assert found[:2] == ["full", "select"] and [found[i] for i in (4, 5, 10)] == ["full"] * 3
    assert found[11] == "delta" + ONE_SIDE
    assert found[7:9] == ["skipped"] * 2 and found[9] == "delta" and found[2] == "select neurons"
    assert step_kinds(as_taken(Step(), 3, Taken(skipped=(1,))), 3) == ["dense", "skipped", "dense"]


def changed(entries, **changes):
    return [entry | {name: change(entry) for name, change in changes.items()} for entry in entries]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda steps: steps[1:], "no time of a step of kind dense; expected dense, full, select, delta, skipped"),
        (lambda steps: changed(steps, model=lambda e: "own"), "steps of own: expected one of"),
        (lambda steps: changed(steps, dtype=lambda e: e["variant"]), "of several models, sizes, dtypes or sparsities"),
        (lambda steps: changed(steps, shape=lambda e: e["shape"] | {"layers": 6}), "6 layers: expected all 30 of wan"),
        (
            lambda steps: changed(steps, ms=lambda e: e["ms"] / (9 if e["variant"] == "delta" else 1)),
            "steps, over the dense one, of full 1.197, delta 0.061: exp",
        ),
        (
            lambda steps: changed(steps, sparsity=lambda e: e["sparsity"] | {"attention": None, "mlp": None}),
            "expected times that leave some for the chosen columns",
        ),
    ],
)
def test_records_that_give_no_prices_are_one_sentence(change, message):
    with pytest.raises(InputError, match=message):
        prices_of(change(steps_of(FILES[1])))


def test_files_that_give_no_prices_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"records of column_attention.*; expected those of `chipmunk bench step`"):
        read_prices(RESULTS / "kernels-h100.jsonl")
    with pytest.raises(InputError, match="line 1 is a record of quality, without a time"):
        read_prices(RESULTS / "quality-rivals-h100.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_prices(tmp_path / "none.jsonl")


def test_the_paper_s_schedule_is_priced_on_every_published_model(prices):
    """The cheapest part of the frontier: steps skipped on top of sparse ones."""
    sparse, skipping = PRESETS["hunyuan-video"], PRESETS["hunyuan-video-step-cache"]
    costs = []
    for sparsity in (sparse, skipping):
        one = plan_steps(sparsity, 50, tokens=4096, mlp_width=1024)
        costs.append(prices.cost(one, 50, LAYERS) / 50)
    assert costs[1] < 0.7 * costs[0] < 0.7
