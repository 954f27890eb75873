"""Group means of pre-activations against naive NumPy, in every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cuda_target

from pallas_kernels import Columns, group_mean_change, pack_lists, store_group_mean

LAYERS, LAYER = 2, 1
MORE = 1  # entries of the caches that the calls have not


@pytest.mark.parametrize(("batch", "groups", "width", "neurons"), [(1, 34, 64, 128), (2, 70, 96, 50)])
def test_change_is_the_distance_of_the_means_from_the_cached_ones(implementation, batch, groups, width, neurons):
    rng = np.random.default_rng(0)
    dtype = jnp.bfloat16 if implementation == "pallas" else jnp.float32
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    rows, fc1, b1 = draw(batch, groups, width), draw(LAYERS, neurons, width) / width**0.5, draw(LAYERS, neurons)
    cached = jnp.asarray(rng.standard_normal((LAYERS, batch + MORE, groups, neurons)), jnp.float32)
    exact = [np.asarray(a, np.float64) for a in (rows, fc1, b1, cached)]
    expected = exact[0] @ exact[1][LAYER].T + exact[2][LAYER]

    mean, change = group_mean_change(rows, fc1, b1, cached, LAYER, implementation=implementation)
    assert mean.dtype == jnp.float32 and change.dtype == dtype
    np.testing.assert_allclose(mean, expected, atol=1e-5)  # products of bf16 are exact in float32
    tolerance = 2**-6 if dtype == jnp.bfloat16 else 1e-5  # the change is rounded to its dtype
    np.testing.assert_allclose(change.astype(jnp.float32), abs(expected - exact[3][LAYER, :batch]), atol=tolerance)


def test_only_listed_means_move(implementation):
    rng = np.random.default_rng(1)
    batch, groups, neurons, capacity = 2, 3, 3000, 1500
    mean = jnp.asarray(rng.standard_normal((batch, groups, neurons)), jnp.float32)
    cached = jnp.asarray(rng.standard_normal((LAYERS, batch + MORE, groups, neurons)), jnp.float32)
    indices = np.full((LAYERS, batch + MORE, groups, capacity), 10**6, np.int32)  # garbage after the counts
    counts = np.zeros((LAYERS, batch + MORE, groups), np.int32)
    expected = np.array(cached)
    for i, at in enumerate(np.ndindex(batch, groups)):
        counts[LAYER][at] = [0, 1, capacity][i % 3]
        chosen = np.sort(rng.choice(neurons, counts[LAYER][at], replace=False))
        indices[LAYER][at][: chosen.size] = chosen
        expected[LAYER][at][chosen] = np.asarray(mean)[at][chosen]
    columns = Columns(jnp.asarray(indices), jnp.asarray(counts))
    moved = jax.jit(lambda c: store_group_mean(mean, columns, LAYER, cached=c, implementation=implementation))(cached)
    np.testing.assert_array_equal(moved, expected)


def test_they_lower_for_cuda_at_flux_size():
    s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    cached, mean = s(38, 1, 34, 12288, dtype=jnp.float32), s(1, 34, 12288, dtype=jnp.float32)
    columns = Columns(s(38, 1, 34, 4096, dtype=jnp.int32), s(38, 1, 34, dtype=jnp.int32))
    layer = s(dtype=jnp.int32)
    change = lambda *args: group_mean_change(*args, implementation="pallas")
    store = lambda m, c, l, cached: store_group_mean(m, c, l, cached=cached, implementation="pallas")
    with cuda_target():
        for run, args in (
            (change, (s(1, 34, 3072), s(38, 12288, 3072), s(38, 12288), cached, layer)),
            (store, (mean, columns, layer, cached)),
        ):
            assert "triton" in jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_shapes_that_do_not_fit_are_refused():
    a = jnp.zeros
    with pytest.raises(ValueError, match="to fit rows"):
        group_mean_change(a((1, 3, 8)), a((1, 16, 4)), a((1, 16)), a((1, 1, 3, 16)))
    with pytest.raises(ValueError, match="to fit mean"):
        store_group_mean(a((1, 3, 16)), Columns.empty((1, 1, 3), 4), 0, cached=a((1, 1, 2, 16)))
    short = Columns(a((1, 1, 3, 4), jnp.int32), a((1, 1, 2), jnp.int32))
    with pytest.raises(ValueError, match="to fit mean"):
        store_group_mean(a((1, 3, 16)), short, 0, cached=a((1, 1, 3, 16)))
    packed = pack_lists(Columns.empty((1, 1, 3), 4))
    with pytest.raises(ValueError, match="only those of keys are packed"):
        store_group_mean(a((1, 3, 16)), packed, 0, cached=a((1, 1, 3, 16)))
