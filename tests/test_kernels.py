"""Kernels against naive NumPy, written apart from them, in every implementation that runs here; lowering at FLUX.1-dev's size.

Tolerances: the references and the interpreter compute in float32 (1e-5 relative to outputs of order 1); on a GPU bf16 inputs
round each factor to 2^-8 and sums of some hundred terms stay within 2e-2.
"""

import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cuda_target

from pallas_kernels import (
    Columns,
    PinnedKeys,
    Scaled,
    block_means,
    column_attention,
    column_fc1,
    column_fc2,
    column_sums,
    columns,
    dense_attention,
    dispatch,
    launch,
    move_column_fc2,
    pack_lists,
    store_activations,
    store_attention_residual,
    store_fc2_residual,
    topk_columns,
)
from pallas_kernels.tiles import Tile

LAYERS, LAYER = 2, 1
MORE = 1  # entries of the stacked arrays that a call has not: it leaves them alone


CARDS = [("9.0", 132), ("9.0", 2), ("8.9", 2)]
BODIES = [("interpret", card) for card in CARDS]
BODIES += [pytest.param(("pallas", card), marks=pytest.mark.gpu) for card in CARDS]


@pytest.fixture(params=[("reference", CARDS[0]), *BODIES], ids=lambda body: "{0}-{1[0]} {1[1]}".format(*body))
def planned(request, monkeypatch) -> str:
    """Every body, and of those that are planned for a card, all kinds of plans.

    Many multiprocessors leave everything to the narrow launch, few make both; 8.9 has small tiles.
    """
    implementation, card = request.param
    monkeypatch.setattr(dispatch, "card", lambda: dispatch.Card(*card))
    return implementation


GARBAGE = 2**31 - 1  # in slots that must never be read


def dtype_of(implementation):
    return jnp.bfloat16 if implementation == "pallas" else jnp.float32


def agree(got, expected, implementation):
    got = np.asarray(got, np.float32)
    assert np.isfinite(got).all()
    tolerance = 2e-2 if implementation == "pallas" else 1e-5
    np.testing.assert_allclose(got, expected, atol=tolerance * max(1, np.abs(expected).max()), rtol=0)


def whole(function, *arrays, **options):
    """The result of the function as one program: op by op, every operation of a reference would be compiled alone."""
    return jax.jit(lambda *arrays: function(*arrays, **options))(*arrays)


def draw(rng, *shape, dtype=jnp.float32):
    """An array of the dtype, and the float64 values it really holds."""
    array = jnp.asarray(rng.standard_normal(shape), dtype)
    return array, np.asarray(array, np.float64)


def draw_lists(rng, lists, capacity, columns, counts):
    """Stacked lists of distinct ids with garbage after the counts (a number, or "mixed": 0, 1, .., capacity)."""
    indices = np.full((LAYERS, *lists, capacity), GARBAGE, np.int32)
    sizes = np.full((LAYERS, *lists), 0, np.int32)
    for i, at in enumerate(np.ndindex(LAYERS, *lists)):
        sizes[at] = [0, 1, capacity // 2, capacity][i % 4] if counts == "mixed" else counts
        indices[at][: sizes[at]] = np.sort(rng.choice(columns, sizes[at], replace=False))
    return Columns(jnp.asarray(indices), jnp.asarray(sizes))


def assert_others_untouched(stored, before, batch):
    """In the other layer, and where the stack has more entries than the call."""
    np.testing.assert_array_equal(stored[1 - LAYER], before[1 - LAYER])
    np.testing.assert_array_equal(stored[LAYER, batch:], before[LAYER, batch:])


def naive_column_attention(q, k, v, indices, counts, group, scale):
    out, indices, counts = np.zeros_like(q), np.asarray(indices), np.asarray(counts)
    for b, i, h in np.ndindex(q.shape[:3]):
        chosen = indices[b, h, i // group, : counts[b, h, i // group]]
        if chosen.size:
            logits = scale * k[b, chosen, h] @ q[b, i, h]
            weights = np.exp(logits - logits.max())
            out[b, i, h] = weights @ v[b, chosen, h] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("batch", "rows", "heads", "width", "group", "capacity", "counts"),
    [
        (1, 128, 1, 64, 64, 64, 64),
        (2, 200, 2, 64, 128, 70, "mixed"),  # ragged rows, ragged steps, counts of 0 and 1
        (1, 257, 1, 128, 192, 96, "mixed"),  # a group that is not a power of two
    ],
)
def test_column_attention_is_softmax_over_the_listed_columns(
    planned, batch, rows, heads, width, group, capacity, counts
):
    implementation = planned
    rng, scale = np.random.default_rng(0), width**-0.5
    dtype = dtype_of(implementation)
    (q, nq), (k, nk), (v, nv) = (draw(rng, batch, rows, heads, width, dtype=dtype) for _ in range(3))
    residual, naive_residual = draw(rng, LAYERS, batch + MORE, *q.shape[1:], dtype=dtype)
    dense, naive_dense = draw(rng, *q.shape, dtype=dtype)
    groups = -(-rows // group)
    keys = draw_lists(rng, (batch + MORE, heads, groups), capacity, rows, counts)
    expected = naive_column_attention(nq, nk, nv, keys.indices[LAYER], keys.counts[LAYER], group, scale)

    lse = draw(rng, LAYERS, batch + MORE, heads, rows)[0]  # of logits that have moved since
    options = dict(layer=LAYER, lse=lse, group=group, scale=scale, implementation=implementation)
    agree(whole(column_attention, q, k, v, keys, **options), expected, implementation)
    added = whole(column_attention, q, k, v, keys, residual=residual, **options)
    agree(added, naive_residual[LAYER, :batch] + expected, implementation)
    stored = jax.jit(lambda r: store_attention_residual(dense, q, k, v, keys, residual=r, **options))(residual)
    agree(stored[LAYER, :batch], naive_dense - expected, implementation)
    assert_others_untouched(stored, residual, batch)


# Any two of the three in all their combinations.
@pytest.mark.parametrize(
    ("rows", "heavy", "packed"), [(200, 0, False), (200, 1, True), (1100, 0, True), (1100, 1, False)]
)
def test_pinned_keys_are_keys_like_those_of_the_lists(planned, rows, heavy, packed, monkeypatch):
    """All but the padding, which is poison, and so is what the lists name after their counts."""
    implementation = planned
    monkeypatch.setattr(columns, "WRAP", 2048 if rows == 200 else 512)  # packed lists wrap early for once
    rng, group, batch, heads, width = np.random.default_rng(2), 128, 2, 2, 64
    dtype, scale, groups = dtype_of(implementation), width**-0.5, -(-rows // group)
    (q, nq), (k, nk), (v, nv) = (draw(rng, batch, rows, heads, width, dtype=dtype) for _ in range(3))
    valid = np.array([rows, rows - 20])
    keys = draw_lists(rng, (batch, heads, groups), 20, rows - 120, "mixed")
    last = np.arange(rows - 120, rows)
    pinned = [(last[:1], last[30:], last, last[:0], last[3:67])[g % 5] for g in range(groups)]
    chosen, counts = np.zeros((batch, heads, groups, rows), np.int32), np.zeros((batch, heads, groups), np.int32)
    indices, own = np.asarray(keys.indices[LAYER]), np.asarray(keys.counts[LAYER])
    for at in np.ndindex(counts.shape):
        b, _, g = at
        listed = [*indices[at][: own[at]], *pinned[g][pinned[g] < valid[b]]]
        chosen[at][: len(listed)], counts[at] = listed, len(listed)
    expected = naive_column_attention(nq, nk, nv, chosen, counts, group, scale)

    padding = np.arange(rows) >= valid[:, None]
    poison = lambda x: jnp.where(padding[..., None, None], jnp.nan, x).astype(dtype)
    starts = np.cumsum([0, *map(len, pinned)])
    options = dict(group=group, scale=scale, lse=jnp.zeros((LAYERS, batch, heads, rows)), valid=jnp.asarray(valid))
    options |= dict(pinned=PinnedKeys(jnp.asarray(np.concatenate(pinned)), jnp.asarray(starts), heavy))
    options |= dict(layer=LAYER, implementation=implementation)
    keys = pack_lists(keys) if packed else keys
    agree(whole(column_attention, q, poison(k), poison(v), keys, **options), expected, implementation)
    dense, naive_dense = draw(rng, *q.shape, dtype=dtype)
    residual = jnp.zeros((LAYERS, *q.shape), dtype)
    stored = whole(store_attention_residual, dense, q, poison(k), poison(v), keys, residual=residual, **options)
    agree(stored[LAYER], naive_dense - expected, implementation)


def test_a_residual_of_8_bits_is_that_of_16_but_for_its_rounding(planned):
    implementation = planned
    rng, group, batch, rows, heads, width = np.random.default_rng(3), 64, 2, 150, 2, 64
    dtype = dtype_of(implementation)
    (q, nq), (k, nk), (v, nv), (dense, _) = (draw(rng, batch, rows, heads, width, dtype=dtype) for _ in range(4))
    dense = dense.at[0, 7].set(0).at[0, 8].multiply(1e4)
    keys = draw_lists(rng, (batch + MORE, heads, 3), 64, rows, "mixed")
    sparse = naive_column_attention(nq, nk, nv, keys.indices[LAYER], keys.counts[LAYER], group, 0.125)
    expected = np.asarray(dense, np.float64) - sparse
    lse = jnp.zeros((LAYERS, batch + MORE, heads, rows))
    options = dict(lse=lse, group=group, scale=0.125, implementation=implementation)
    store = lambda r: store_attention_residual(dense, q, k, v, keys, LAYER, residual=r, **options)
    stored = jax.jit(store)(Scaled.zeros((LAYERS, batch + MORE, *q.shape[1:])))
    own = Scaled(*(np.asarray(a[LAYER, :batch], np.float64) for a in stored))
    values = own.values * own.scale.swapaxes(1, 2)[..., None]
    # Three bits of mantissa: half a unit is 1/16 of a value; below 2^-6 of 448 the units are even.
    bound = (
        np.abs(expected) / 15
        + np.abs(expected).max(-1, keepdims=True) * 2**-16
        + (1e-1 if dtype == jnp.bfloat16 else 1e-4)
    )
    assert (np.abs(values - expected) <= bound).all()
    for a in stored:
        assert_others_untouched(a.astype(jnp.float32), jnp.zeros(a.shape), batch)
    added = whole(column_attention, q, k, v, keys, layer=LAYER, residual=stored, **options)
    agree(added, values + (np.asarray(dense, np.float64) - expected), implementation)


@pytest.mark.parametrize("drift", [-60.0, 0.0, 40.0])  # the largest listed logit may lie far below the largest of all
def test_unlisted_garbage_and_extreme_logits_never_leak(implementation, drift):
    rng, group, width = np.random.default_rng(1), 64, 64
    dtype = dtype_of(implementation)
    q, k, v = (draw(rng, 1, 128, 1, width, dtype=dtype)[0] for _ in range(3))
    q = q * 20  # logits of up to a hundred: exp of them overflows float32
    keys = draw_lists(rng, (1, 1, 2), 64, 128, 37)
    unlisted = np.setdiff1d(np.arange(128), np.asarray(keys.indices[LAYER])[..., :37])
    poison = lambda x: x.at[:, unlisted].set(jnp.nan)
    options = dict(group=group, scale=0.125, implementation=implementation)
    lse = 0.125 * jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32).max(-1) + drift
    out = whole(column_attention, q, poison(k), poison(v), keys, layer=LAYER, lse=jnp.stack([lse, lse]), **options)
    lists = keys.indices[LAYER], keys.counts[LAYER]
    expected = naive_column_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), *lists, group, 0.125)
    agree(out, expected, implementation)


def test_column_attention_stays_finite_under_drift(implementation):
    rng = np.random.default_rng(9)
    q, k, v = (draw(rng, 1, 128, 1, 64, dtype=dtype_of(implementation))[0] for _ in range(3))
    v = 10 * v
    keys = draw_lists(rng, (1, 1, 1), 64, 128, 64)
    options = dict(group=128, scale=0.125, implementation=implementation)
    attention = jax.jit(lambda qkv, lse: column_attention(*qkv, keys, lse=lse, **options))
    for drift in (-1000, -100, -89, -88, -87, -85, -80, 87, 100, 1000):
        out = attention((q, k, v), np.full((LAYERS, 1, 1, 128), drift, np.float32))
        assert np.isfinite(np.asarray(out, np.float32)).all(), drift


@pytest.mark.parametrize(
    ("rows", "group", "stride"),
    [(128, 64, 1), (200, 128, 1), (257, 192, 1), (300, 128, 2), (300, 128, 4), (257, 192, 4)],
)
def test_column_sums_are_the_attention_mass_of_each_group(implementation, rows, group, stride):
    rng, width, scale = np.random.default_rng(2), 64, 0.125
    dtype = dtype_of(implementation)
    (q, nq), (k, nk) = (draw(rng, 2, rows, 2, width, dtype=dtype) for _ in range(2))
    logits = scale * np.einsum("bqhd,bkhd->bhqk", nq, nk)
    lse = np.log(np.exp(logits).sum(-1)) + 0.1 * rng.standard_normal(logits.shape[:-1])  # of an earlier step
    mass = np.exp(logits - lse[..., None])
    sampled = (
        np.arange(rows) % stride == np.arange(rows) // stride % stride
    )  # a diagonal: rows 0, 5, 10, 15, 16, 21, ..
    mass[:, :, ~sampled] = 0
    expected = np.stack([mass[:, :, i : i + group].sum(2) for i in range(0, rows, group)], axis=2)
    options = dict(group=group, scale=scale, stride=stride, implementation=implementation)
    sums = whole(column_sums, q, k, jnp.asarray(lse, jnp.float32), **options)
    agree(sums, expected, implementation)


def test_column_sums_stay_finite_under_drift(implementation):
    rng = np.random.default_rng(3)
    q, k = (draw(rng, 1, 128, 1, 64, dtype=dtype_of(implementation))[0] for _ in range(2))
    sums_of = jax.jit(lambda *args: column_sums(*args, group=64, scale=0.125, implementation=implementation))
    for drift in (-1000, -100, 100, 1000):
        sums = np.asarray(sums_of(q, k, np.full((1, 1, 128), drift, np.float32)))
        assert np.isfinite(sums).all() and (sums >= 0).all(), drift


def test_dense_attention_gives_softmax_and_its_log_sum_exp(implementation):
    rng = np.random.default_rng(4)
    draws = [draw(rng, 2, 77, 2, 64, dtype=dtype_of(implementation)) for _ in range(3)]
    (nq, nk, nv) = (n for _, n in draws)
    logits = 0.125 * np.einsum("bqhd,bkhd->bhqk", nq, nk)
    weights = np.exp(logits)
    out, lse = whole(dense_attention, *(a for a, _ in draws), scale=0.125, implementation=implementation)
    agree(out, np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), nv), implementation)
    assert lse.dtype == jnp.float32
    agree(lse, np.log(weights.sum(-1)), implementation)


def test_dense_attention_leaves_padding_out(implementation):
    rng, rows, valid = np.random.default_rng(9), 150, np.array([150, 70])
    draws = [draw(rng, 2, rows, 2, 64, dtype=dtype_of(implementation)) for _ in range(3)]
    there = np.arange(rows) < valid[:, None]
    q, k, v = (jnp.where(there[..., None, None], a, jnp.asarray(100, a.dtype)) for a, _ in draws)
    out, lse = whole(dense_attention, q, k, v, scale=0.125, valid=jnp.asarray(valid), implementation=implementation)
    for b, n in enumerate(valid):
        nq, nk, nv = (a[b, :n] for _, a in draws)
        weights = np.exp(0.125 * np.einsum("qhd,khd->hqk", nq, nk))
        agree(out[b, :n], np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), nv), implementation)
        agree(lse[b, :, :n], np.log(weights.sum(-1)), implementation)
    assert not np.asarray(out)[~there].any() and np.isposinf(np.asarray(lse).swapaxes(1, 2)[~there]).all()


def naive_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("batch", "rows", "width", "neurons", "group", "capacity", "counts"),
    [
        (1, 128, 64, 256, 128, 128, 128),
        (2, 150, 96, 300, 64, 70, "mixed"),  # nothing divides anything
    ],
)
def test_column_mlp_is_the_mlp_of_the_listed_neurons(planned, batch, rows, width, neurons, group, capacity, counts):
    implementation = planned
    rng, dtype = np.random.default_rng(5), dtype_of(implementation)
    x, nx = draw(rng, batch, rows, width, dtype=dtype)
    fc1, n1 = (a / width**0.5 for a in draw(rng, LAYERS, neurons, width, dtype=dtype))
    b1, nb1 = draw(rng, LAYERS, neurons, dtype=dtype)
    fc2, n2 = (a / neurons**0.5 for a in draw(rng, LAYERS, neurons, width, dtype=dtype))
    cached, naive_cached = draw(rng, LAYERS, batch + MORE, neurons, rows, dtype=dtype)
    base, naive_base = draw(rng, LAYERS, batch + MORE, rows, width, dtype=dtype)
    dense, naive_dense = draw(rng, batch, rows, width, dtype=dtype)
    n1, n2 = np.asarray(fc1, np.float64), np.asarray(fc2, np.float64)
    lists = draw_lists(rng, (batch + MORE, -(-rows // group)), capacity, neurons, counts)
    naive_base = naive_base[LAYER, :batch]

    full = naive_gelu(nx @ n1[LAYER].T + nb1[LAYER])
    packed = np.zeros((batch, rows, capacity))
    change, moved, product = packed.copy(), naive_cached[LAYER, :batch].copy(), np.zeros((batch, rows, width))
    listed, counts = np.asarray(lists.indices[LAYER]), np.asarray(lists.counts[LAYER])
    for b, i in np.ndindex(batch, rows):
        chosen = listed[b, i // group, : counts[b, i // group]]
        packed[b, i, : chosen.size] = full[b, i, chosen]
        change[b, i, : chosen.size] = full[b, i, chosen] - naive_cached[LAYER, b, chosen, i]
        moved[b, chosen, i] = full[b, i, chosen]
        product[b, i] = full[b, i, chosen] @ n2[LAYER, chosen]

    options = dict(layer=LAYER, group=group, implementation=implementation)
    got, none = whole(column_fc1, x, fc1, b1, lists, **options)
    assert none is None
    agree(got, packed, implementation)
    got_change, got_cache = jax.jit(lambda a: column_fc1(x, fc1, b1, lists, activations=a, **options))(cached)
    agree(got_change, change, implementation)
    agree(got_cache[LAYER, :batch], moved, implementation)
    assert_others_untouched(got_cache, cached, batch)

    agree(whole(column_fc2, got, fc2, lists, residual=base, **options), naive_base + product, implementation)
    added, fresh = jax.jit(lambda o: move_column_fc2(got, fc2, lists, out=o, **options))(base)
    agree(fresh, naive_base + product, implementation)
    np.testing.assert_array_equal(added[LAYER, :batch], fresh)
    assert_others_untouched(added, base, batch)
    left = jax.jit(lambda o: store_fc2_residual(dense, got, fc2, lists, residual=o, **options))(base)
    agree(left[LAYER, :batch], naive_dense - product, implementation)
    assert_others_untouched(left, base, batch)


@pytest.mark.parametrize(("batch", "rows", "neurons"), [(1, 64, 128), (2, 77, 100)])
def test_activations_are_stored_transposed(implementation, batch, rows, neurons):
    rng = np.random.default_rng(7)
    activations, cached = draw(rng, batch, rows, neurons)[0], draw(rng, LAYERS, batch + MORE, neurons, rows)[0]
    store = jax.jit(lambda c: store_activations(activations, LAYER, cached=c, implementation=implementation))
    stored = store(cached)
    np.testing.assert_array_equal(stored[LAYER, :batch], np.swapaxes(activations, 1, 2))
    assert_others_untouched(stored, cached, batch)


def test_launches_cover_every_tile_once(monkeypatch):
    rng = np.random.default_rng(6)
    for _ in range(100):
        rows, columns, batch = (int(rng.integers(1, n)) for n in (9000, 2000, 4))
        card = dispatch.Card("9.0", int(rng.integers(1, 200)))
        monkeypatch.setattr(dispatch, "card", lambda card=card: card)
        wide = Tile(128, 256, warps=8, resident=int(rng.integers(1, 3)))
        narrow = Tile(int(rng.choice([32, 128])), 32, warps=4)
        covered = np.zeros((rows, columns), int)
        for part in launch.launches(rows, columns, batch, wide, narrow):
            first, (tiles, column_tiles, _), tile = part
            assert part.grid[2] == batch and tiles > 0 and column_tiles == -(-columns // tile.columns)
            covered[first * tile.rows : (first + tiles) * tile.rows] += 1
        np.testing.assert_array_equal(covered, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("columns", "k", "capacity"), [(64, 64, 64), (1500, 100, 128), (2048, 1, 1), (333, 0, 5)])
def test_topk_lists_the_largest_ascending_with_ties_from_the_left(implementation, dtype, columns, k, capacity):
    rng = np.random.default_rng(6)
    scores = jnp.asarray(np.abs(rng.standard_normal((2, 3, columns))), dtype)
    scores = scores.at[0, 0].set(jnp.round(scores[0, 0]))  # many ties
    scores = scores.at[1, 1].set(0.0).at[1, 2, columns // 2].set(jnp.inf)
    indices, counts, _ = whole(topk_columns, scores, jnp.int32(k), capacity=capacity, implementation=implementation)
    assert indices.shape == (2, 3, capacity) and bool((counts == k).all())
    values = np.asarray(scores, np.float32)
    for at in np.ndindex(2, 3):
        expected = np.sort(np.argsort(-values[at], kind="stable")[:k])
        np.testing.assert_array_equal(np.asarray(indices)[at][:k], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("capacity", "numbers"), [(1000, (0, 1, 1000)), (20_003, (15_000, 20_003))])
def test_topk_of_long_rows_is_exact_whatever_a_sample_of_them_says(implementation, dtype, capacity, numbers):
    rng, columns = np.random.default_rng(7), 20_003
    usual = np.exp(rng.standard_normal(columns))
    place = np.arange(columns)
    rows = [
        usual,
        np.sort(usual),
        np.ones(columns),
        rng.random(columns) < 0.3,  # two values
        np.where(place < 7, 5.0, 0.0),
        np.where(rng.random(columns) < 0.02, np.inf, usual),
        np.where(place % 78 < 16, usual, 100 + usual),  # what a sample would see, and the rest
        1 + rng.integers(0, 3, columns) * 2.0**-7,  # neighbouring patterns
    ]
    scores = jnp.asarray(np.stack(rows), dtype)
    lists = jax.jit(lambda x, k: topk_columns(x, k, capacity=capacity, implementation=implementation).indices)
    for k in numbers:
        for found, values in zip(np.asarray(lists(scores, k)), np.asarray(scores, np.float32), strict=True):
            np.testing.assert_array_equal(found[:k], np.sort(np.argsort(-values, kind="stable")[:k]))


@pytest.mark.parametrize("columns", [300, 17_000])
def test_topk_takes_a_number_for_every_row(implementation, columns):
    scores = jnp.asarray(np.random.default_rng(8).random((2, 3, columns)), jnp.float32)
    k = np.array([[0, 5, 64], [1, 0, 33]])
    indices, counts, _ = whole(topk_columns, scores, jnp.asarray(k), capacity=64, implementation=implementation)
    np.testing.assert_array_equal(counts, k)
    for at in np.ndindex(k.shape):
        expected = np.sort(np.argsort(-np.asarray(scores)[at], kind="stable")[: k[at]])
        np.testing.assert_array_equal(np.asarray(indices)[at][: k[at]], expected)


def test_topk_fills_every_list_whatever_the_signs(implementation):
    scores = jnp.asarray([[0.5, -0.0, 0.0, -jnp.nan, 2.0, -0.0, 0.0, 0.0]])
    indices = topk_columns(scores, 6, capacity=6, implementation=implementation).indices
    assert np.unique(indices).size == 6 and (np.asarray(indices) >= 0).all() and (np.asarray(indices) < 8).all()


def test_a_card_without_8_bits_is_told(monkeypatch):
    monkeypatch.setattr(dispatch, "card", lambda: dispatch.Card("8.0", 108))
    q, keys = jnp.zeros((1, 64, 1, 64), jnp.bfloat16), Columns.empty((1, 1, 1, 1), 8)
    options = dict(lse=jnp.zeros((1, 1, 1, 64)), group=64, scale=1.0, residual=Scaled.zeros((1, *q.shape)))
    with pytest.raises(NotImplementedError, match=r"8 bits on a card of compute capability 8\.0"):
        column_attention(q, q, q, keys, **options, implementation="pallas")


def test_a_named_implementation_is_obeyed_or_raises():
    x = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(NotImplementedError, match="float32"):
        dense_attention(x, x, x, scale=1.0, implementation="pallas")
    with pytest.raises(ValueError, match="cutlass"):
        dense_attention(x, x, x, scale=1.0, implementation="cutlass")
    with pytest.raises(ValueError, match="group=100"):
        column_sums(x, x, jnp.zeros((1, 1, 64)), group=100, scale=1.0)
    with pytest.raises(ValueError, match="stride=3: expected a divisor of group=64"):
        column_sums(x, x, jnp.zeros((1, 1, 64)), group=64, scale=1.0, stride=3)


def test_lists_that_do_not_fit_are_refused():
    x, lse = jnp.zeros((1, 128, 1, 64)), jnp.zeros((1, 1, 1, 128))
    keys, options = Columns.empty((1, 1, 1, 2), 8, packed=True), dict(lse=lse, group=64, scale=1.0)
    few = Columns.empty((1, 1, 1, 1), 8)
    with pytest.raises(ValueError, match=r"expected \[L, 1, 1, 2, K\], \[L, 1, 1, 2\] to fit q \(1, 128, 1, 64\)"):
        column_attention(x, x, x, few, **options)
    with pytest.raises(ValueError, match=r"wrap \(1, 1, 1, 1\): expected wrap \[L, 1, 1, 2\] to fit q"):
        column_attention(x, x, x, keys._replace(wrap=few.counts), **options)
    neurons, weights = Columns.empty((1, 1, 2), 8), jnp.zeros((1, 32, 64))
    with pytest.raises(ValueError, match=r"expected \[L, 1, 1, K\], \[L, 1, 1\] to fit"):
        column_fc1(x[:, :, 0], weights, weights[..., 0], neurons, group=128)
    with pytest.raises(ValueError, match="expected lists of neurons as they are"):
        column_fc1(x[:, :, 0], weights, weights[..., 0], pack_lists(neurons), group=64)
    with pytest.raises(ValueError, match="to fit K = 8"):
        column_fc2(x[:, :, 0], weights, neurons, group=64, residual=x[None, :, :, 0])


@pytest.mark.parametrize("found", ["nothing", "no residual", "bfloat16"])
def test_a_jax_without_the_attention_of_cudnn_as_it_is_known_is_told(monkeypatch, found):
    name = "jax._src.cudnn.fused_attention_stablehlo"
    if found == "nothing":
        monkeypatch.setitem(sys.modules, name, None)
    else:
        known = lambda q, k, v, *, scale, qkv_layout, return_residual: (q, q[..., 0].swapaxes(1, 2))
        other = known if found == "bfloat16" else lambda q, k, v, *, scale, qkv_layout: q
        monkeypatch.setattr(importlib.import_module(name), "dot_product_attention", other)
    x = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=rf"JAX {re.escape(jax.__version__)} .* use JAX 0\.10\.2 to 0\.12\.0"):
        dense_attention(x, x, x, scale=1.0, implementation="pallas")


@pytest.mark.parametrize("padding", [False, True])
def test_this_jax_has_the_attention_of_cudnn_as_it_is_known(monkeypatch, padding):
    """Traced alone: what lowers it asks for the version of cuDNN, which may not be here."""
    name = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(importlib.import_module(name), "check_cudnn_version", lambda: 91_000)
    x, valid = jax.ShapeDtypeStruct((2, 64, 3, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    dense = lambda x, valid: dense_attention(x, x, x, scale=1.0, valid=valid, implementation="pallas")
    out, lse = jax.eval_shape(dense, x, valid if padding else None)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (x.shape, x.dtype, (2, 3, 64), jnp.float32)


FLUX = dict(layers=57, tokens=4352, heads=24, head_dim=128, width=3072, neurons=12288, group=128, keys=704, kept=4096)


def flux_calls():
    """Every kernel at the shapes of FLUX.1-dev, 1280x768, one image: name -> (function, argument shapes)."""
    f = FLUX
    groups, half = f["tokens"] // f["group"], jnp.bfloat16
    s = lambda *shape, dtype=half: jax.ShapeDtypeStruct(shape, dtype)
    qkv = [s(1, f["tokens"], f["heads"], f["head_dim"])] * 3
    ints = lambda *shape: s(*shape, dtype=jnp.int32)
    lists = lambda *shape: Columns(ints(*shape), ints(*shape[:-1]))
    keys, neurons = lists(f["layers"], 1, f["heads"], groups, f["keys"]), lists(38, 1, groups, f["kept"])
    layer, kw = s(dtype=jnp.int32), dict(implementation="pallas")
    residual, tokens = s(f["layers"], *qkv[0].shape), s(1, f["tokens"], f["width"])
    weight, out = s(38, f["neurons"], f["width"]), s(38, 1, f["tokens"], f["width"])
    packed, lse = s(1, f["tokens"], f["kept"]), s(1, f["heads"], f["tokens"], dtype=jnp.float32)
    measured = s(f["layers"], *lse.shape, dtype=jnp.float32)
    attention = dict(group=128, scale=128**-0.5, **kw)
    mlp = dict(group=128, **kw)
    # HunyuanVideo's, with all that a video adds: packed lists, a residual of 8 bits, keys of a text, padding.
    video, row = s(1, 119_056, f["heads"], f["head_dim"]), s(58, 1, f["heads"], 119_056, dtype=jnp.float32)
    packed_keys = lists(58, 1, f["heads"], 931, 4160)._replace(wrap=ints(58, 1, f["heads"], 931))
    of_video = dict(
        columns=packed_keys,
        layer=layer,
        lse=row,
        residual=Scaled(s(58, *video.shape, dtype=jnp.float8_e4m3fn), row),
        pinned=PinnedKeys(ints(600_000), ints(932), 3),
        valid=ints(1),
    )
    means_of = lambda k, v, columns, layer, pinned, valid, **_: block_means(
        k, v, columns, layer, block=64, pinned=pinned, valid=valid, **kw
    )
    return {
        "column_attention_of_a_video": (
            lambda q, k, v, rest: column_attention(q, k, v, **rest, means=means_of(k, v, **rest), **attention),
            [*[video] * 3, of_video],
        ),
        "store_attention_residual_of_a_video": (
            lambda o, q, k, v, rest: store_attention_residual(o, q, k, v, **rest, **attention),
            [*[video] * 4, of_video],
        ),
        "column_attention": (
            lambda q, k, v, c, l, m, r: column_attention(q, k, v, c, l, lse=m, residual=r, **attention),
            [*qkv, keys, layer, measured, residual],
        ),
        "store_attention_residual": (
            lambda o, q, k, v, c, l, m, r: store_attention_residual(o, q, k, v, c, l, lse=m, residual=r, **attention),
            [qkv[0], *qkv, keys, layer, measured, residual],
        ),
        "column_sums": (lambda q, k, m: column_sums(q, k, m, **attention), [*qkv[:2], lse]),
        "topk_columns": (
            lambda x: topk_columns(x, 704, capacity=704, **kw),
            [s(1, f["heads"], groups, f["tokens"])],
        ),
        "column_fc1": (
            lambda x, w, b, c, l, a: column_fc1(x, w, b, c, l, activations=a, **mlp),
            [tokens, weight, s(38, f["neurons"]), neurons, layer, s(38, 1, f["neurons"], f["tokens"])],
        ),
        "store_activations": (
            lambda a, l, c: store_activations(a, l, cached=c, **kw),
            [s(1, f["tokens"], f["neurons"]), layer, s(38, 1, f["neurons"], f["tokens"])],
        ),
        "column_fc2": (
            lambda p, w, c, l, r: column_fc2(p, w, c, l, residual=r, **mlp),
            [packed, weight, neurons, layer, out],
        ),
        "move_column_fc2": (
            lambda p, w, c, l, o: move_column_fc2(p, w, c, l, out=o, **mlp),
            [packed, weight, neurons, layer, out],
        ),
        "store_fc2_residual": (
            lambda x, p, w, c, l, r: store_fc2_residual(x, p, w, c, l, residual=r, **mlp),
            [tokens, packed, weight, neurons, layer, out],
        ),
    }


@pytest.mark.parametrize("name", flux_calls())
def test_kernels_lower_for_cuda_at_flux_size(name):
    function, shapes = flux_calls()[name]
    with cuda_target():
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
