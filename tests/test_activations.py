"""What is measured in the attention and the MLP of a dense sample, and that measuring changes nothing."""

import importlib.util
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chipmunk_jax import Pipeline
from chipmunk_jax.cli.main import main
from chipmunk_jax.delta import MlpWeights, attend, feed_forward
from chipmunk_jax.model import Stack
from chipmunk_jax.report.activation_changes import (
    GROUPS,
    MEASURES,
    Comparison,
    change,
    compare_activations,
    compare_attention,
    sampled,
)
from chipmunk_jax.report.activations import observe
from chipmunk_jax.schedule import Step
from chipmunk_jax.sparsity import Sparsity

PROMPT = "red striped heart on meadow"
GROUP, KEPT = 64, 0.3


def smallest(amounts, share):
    """The smallest share of the amounts whose sum is that share of all, by hand."""
    total, found = 0.0, 0
    for amount in sorted(amounts, reverse=True):
        if total >= share * sum(amounts):
            break
        total, found = total + amount, found + 1
    return found / len(amounts)


def largest(amounts, count):
    """Places of the largest amounts."""
    return set(sorted(range(len(amounts)), key=lambda i: -amounts[i])[:count])


def probabilities(q, k, valid):
    """Softmax of one head in float64, [N, valid]."""
    logits = q.astype(float) @ k[:valid].astype(float).T / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_measured_as_by_hand(padded):
    """Two sides, two heads, a ragged last group, and keys that are padding."""
    rng, tokens = np.random.default_rng(0), 90
    q, k = rng.standard_normal((2, 4, tokens, 2, 8)).astype(np.float32) * 2
    lengths = np.full(4, 84 if padded else tokens)
    lse = np.full((4, 2, tokens), np.inf, np.float32)
    for entry, head in np.ndindex(4, 2):
        n = lengths[entry]
        logits = q[entry, :n, head].astype(float) @ k[entry, :n, head].T.astype(float) / np.sqrt(8)
        lse[entry, head, :n] = np.log(np.exp(logits).sum(-1))
    valid = jnp.asarray(lengths, jnp.int32) if padded else None
    found = compare_attention(q, k, jnp.asarray(lse), valid, group=GROUP, top_keys=KEPT)

    count, groups = round(KEPT * tokens), ((0, 64), (64, int(lengths[0])))
    expected = {name: [] for name in found}
    for head, (start, stop) in ((head, group) for head in range(2) for group in groups):
        full = np.zeros((4, tokens, tokens))
        for entry in range(4):
            n = lengths[entry]
            full[entry, :n, :n] = probabilities(q[entry, :n, head], k[entry, :, head], n)
        weights = full[:, start:stop]
        mass = weights.sum(1)
        moved = [abs(weights[i] - weights[i + 1]) for i in (0, 2)]
        chosen = [largest(one, count) for one in mass]
        shared = lambda a, b, chosen=chosen: len(chosen[a] & chosen[b]) / count
        expected["keys_of_group"].append([[smallest(m.sum(0), s) for s in (0.7, 0.8, 0.9)] for m in moved])
        expected["keys_of_query"].append([[smallest(m[0], s) for s in (0.7, 0.8, 0.9)] for m in moved])
        held = lambda i, s, mass=mass: sum(sorted(mass[i])[-round(s * tokens) :]) / sum(mass[i])
        expected["mass"].append([[held(i, s) for s in (0.05, 0.1, 0.2)] for i in (0, 2)])
        expected["overlap_of_steps"].append([shared(0, 1), shared(2, 3)])
        expected["overlap_of_sides"].append(shared(0, 2))
    mass = np.moveaxis(np.reshape(expected.pop("mass"), (2, 2, 2, 3)).mean(1), 0, -1)  # [S, shares, H]
    np.testing.assert_allclose(found.pop("mass"), mass, rtol=1e-4)  # of float32
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], np.mean(values, 0), rtol=1e-5, err_msg=name)


def test_neurons_are_measured_as_by_hand():
    a = np.random.default_rng(1).standard_normal((4, 70, 20)).astype(np.float32)
    found = compare_activations(jnp.asarray(a), group=GROUP)
    moved = [abs(a[i] - a[i + 1]).astype(float) for i in (0, 2)]
    groups = [(0, 64), (64, 70)]
    of = lambda amounts: np.mean(
        [[[smallest(amounts(m, *g), s) for s in (0.7, 0.8, 0.9)] for m in moved] for g in groups], 0
    )
    np.testing.assert_allclose(found["neurons_of_group"], of(lambda m, start, stop: m[start:stop].sum(0)), rtol=1e-5)
    np.testing.assert_allclose(found["neurons_of_token"], of(lambda m, start, stop: m[start]), rtol=1e-5)


def test_groups_are_spread_over_all_and_bounded():
    rows, inside = sampled(100 * GROUP - 5, GROUP)
    assert rows.shape == inside.shape == (GROUPS, GROUP)
    assert rows[0, 0] == 0 and rows[-1, 0] == 99 * GROUP and rows.max() == 100 * GROUP - 6
    assert set(np.diff(rows[:, 0])) <= {GROUP, 2 * GROUP} and np.flatnonzero(~inside.all(1)).tolist() == [63]


def test_equal_steps_do_not_change():
    rng = np.random.default_rng(2)
    twice = lambda *shape: jnp.asarray(np.repeat(rng.standard_normal((2, *shape)).astype(np.float32), 2, 0))
    q, k, x, lse = twice(90, 2, 8), twice(90, 2, 8), twice(90, 20), jnp.full((4, 2, 90), 5.0)
    found = compare_attention(q, k, lse, None, group=GROUP, top_keys=KEPT) | compare_activations(x, group=GROUP)
    np.testing.assert_array_equal(change(x), 0)
    np.testing.assert_array_equal(found["overlap_of_steps"], 1)
    for name in ("keys_of_group", "keys_of_query", "neurons_of_group", "neurons_of_token"):
        np.testing.assert_array_equal(found[name], 0)


def test_being_looked_at_changes_no_bit():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    stack = Stack(layers=2, tokens=90, heads=2, head_dim=8, mlp_tokens=90, width=16, mlp_width=20)
    qkv, mlp = draw(3, 2, 90, 2, 8), MlpWeights(draw(2, 20, 16), draw(2, 20), draw(2, 20, 16), draw(2, 16))

    @jax.jit
    def layer(cache):
        out, cache = attend(*qkv, cache, Step(layer=1))
        out, cache = feed_forward(out.reshape(2, 90, 16), mlp, cache, Step(layer=1))
        return out, cache

    out, seen = layer(Comparison.zeros(stack, 1, Sparsity()))
    np.testing.assert_array_equal(out, layer(None)[0])
    for name, values in seen.numbers.items():
        assert not values[0].any() and values[1].any(), name  # of this layer alone


@pytest.fixture(scope="module")
def study(video_checkpoint):
    """What is found in three steps of a video."""
    size = dict(height=16, width=16, num_frames=4, num_inference_steps=3)
    return observe(Pipeline.from_pretrained(video_checkpoint), PROMPT, progress=False, **size)


def check(values, name):
    """The laws of one measure, its values [steps, ..]."""
    one = MEASURES[name]
    assert np.isnan(values[0]).all() == one.compared and np.isfinite(values[1:]).all()
    assert (values[1:] > 0).all() and (name.endswith("change") or (values[1:] <= 1).all())
    assert not one.shares or (np.diff(values[1:], axis=-1) >= 0).all()


def test_shares_lie_within_0_and_1_and_grow_with_what_they_explain(study):
    assert study.numbers.keys() == MEASURES.keys() and study.about["layers"] == {"blocks": 3}
    for name, one in MEASURES.items():
        assert study.numbers[name].shape == (3, 3, *(2,) * one.sides, *(3,) * bool(one.shares))
        check(study.numbers[name], name)
    np.testing.assert_allclose(study.mass_by_head.mean(1), study.numbers["mass"].mean((0, 2)), rtol=1e-5)


def test_the_first_step_of_a_second_network_is_compared_with_none(study):
    """As in Wan2.2, whose second network takes over within a sample."""
    numbers = {name: values.copy() for name, values in study.numbers.items()}
    for name in (name for name, one in MEASURES.items() if one.compared):
        numbers[name][1] = np.nan
    rows = replace(study, numbers=numbers).rows()
    assert len(rows) == 1 + len(MEASURES) and "nan" not in str(rows)
    assert rows[1][1] == f"{100 * numbers['attention_change'][2].mean():.1f}"


def test_heat_maps_are_drawn(study, folder):
    pytest.importorskip("matplotlib")
    study.draw(folder / "activations.png")
    assert (folder / "activations.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_all_numbers_and_does_without_matplotlib(checkpoint, folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    size = ["--height", "16", "--width", "16", "--steps", "3", "--guidance", "1"]
    assert main(["inspect", "--activations", str(checkpoint), *size, "-o", "out"]) == 0
    told = capsys.readouterr()
    assert "matplotlib is not installed" in told.err and "pip install" in told.err
    assert [path.name for path in folder.rglob("*.*")] == ["activations.json"]
    written = json.loads((folder / "out/activations.json").read_text())
    assert written["sides"] == ["prompt"] and written["layers"] == {"double": 1, "single": 2}
    assert written["measures"].keys() == MEASURES.keys() - {"overlap_of_sides"}  # without guidance there is one side
    for name, one in written["measures"].items():
        assert one["what"] in told.out
        values = np.array(one["values"], float)
        assert values.ndim == len(one["axes"]) and values.shape[:2] == (3, 3)
        check(values, name)
    assert "The paper: 5 to 25 %" in told.out and told.out.endswith("out/activations.json\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--activations"], ["expected PATH"]),
        (["--activations", "somewhere"], ["somewhere", "no such file or folder"]),
        (["--activations", "--plan", "somewhere"], ["--plan or --activations, one of them"]),
        (["--activations", "somewhere", "--batch", "2", "--dense"], ["--batch, --dense only with --plan"]),
        (["somewhere", "--prompt", "x", "--seed", "1"], ["--prompt, --seed only with --activations"]),
        (["somewhere", "--steps", "3"], ["--steps only with --plan or --activations"]),
    ],
)
def test_a_study_that_cannot_be_is_one_sentence(flags, words, folder, capsys):
    assert main(["inspect", *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words)


def test_one_step_and_a_folder_that_is_none_are_one_sentence(checkpoint, folder, capsys):
    (folder / "taken").write_text("")
    for flags, word in ((["--steps", "1"], "--steps 1"), (["-o", "taken"], "taken"), (["-o", "no/where"], "no/where")):
        assert main(["inspect", "--activations", str(checkpoint), *flags]) == 2
        assert word in (told := capsys.readouterr().err) and told.count("\n") == 1
