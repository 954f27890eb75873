"""Block means against naive NumPy: what a list leaves out is counted, averaged, and follows the rest in attention."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import LAYER, LAYERS, MORE, agree, draw, draw_lists, dtype_of, whole

from pallas_kernels import Columns, PinnedKeys, block_means, column_attention, columns, pack_lists

B, N, H, D, GROUP = 2, 333, 2, 64, 128
VALID = np.array([N - 33, N - 80])  # whole blocks are padding in the second of the batch
PINNED = [np.arange(200, 240), np.arange(0), np.arange(N - 20, N)]  # the last are padding
OPTIONS = dict(group=GROUP, scale=0.125, valid=jnp.asarray(VALID), lse=jnp.zeros((LAYERS, B + MORE, H, N)), layer=LAYER)


def naive(q, k, v, chosen, end, block):
    """One group's attention over its chosen keys and the means of blocks; and how many keys each block leaves out."""
    blocks = [np.arange(start, min(start + block, end)) for start in range(0, end, block)]
    left = np.array([len(np.setdiff1d(keys, chosen)) for keys in blocks])
    rows = lambda x: np.concatenate([x[chosen], *(x[keys].mean(0, keepdims=True) for keys in blocks)])
    weights = np.exp(0.125 * q @ rows(k).T) * np.array([1] * len(chosen) + [*left])
    return weights @ rows(v) / weights.sum(-1, keepdims=True), left


@pytest.mark.parametrize(("block", "packed"), [(64, True), (128, False)])
def test_the_keys_that_are_left_out_count_as_the_mean_of_their_block(implementation, block, packed, monkeypatch):
    """But for padding, which is poison."""
    monkeypatch.setattr(columns, "WRAP", 128)  # packed lists wrap early for once
    rng, dtype = np.random.default_rng(0), dtype_of(implementation)
    (q, nq), (k, nk), (v, nv) = (draw(rng, B, N, H, D, dtype=dtype) for _ in range(3))
    keys = draw_lists(rng, (B + MORE, H, len(PINNED)), 70, 200, "mixed")
    starts = np.cumsum([0, *map(len, PINNED)])
    pinned = PinnedKeys(jnp.asarray(np.concatenate(PINNED)), jnp.asarray(starts))
    poison = lambda x: jnp.where((np.arange(N) >= VALID[:, None])[..., None, None], jnp.nan, x).astype(dtype)
    common = OPTIONS | dict(pinned=pinned, implementation=implementation)

    def both(q, k, v, keys):
        shared = {name: common[name] for name in ("layer", "pinned", "valid", "implementation")}
        means = block_means(k, v, keys, block=block, **shared)
        return means.left, column_attention(q, k, v, keys, means=means, **common)

    left, out = whole(both, q, poison(k), poison(v), pack_lists(keys) if packed else keys)
    expected = np.zeros_like(nq)
    for b, h, g in np.ndindex(B, H, len(PINNED)):
        own, rows = (
            np.asarray(keys.indices[LAYER, b, h, g])[: keys.counts[LAYER, b, h, g]],
            slice(g * GROUP, (g + 1) * GROUP),
        )
        chosen = np.array([*own, *PINNED[g][PINNED[g] < VALID[b]]], int)
        expected[b, rows, h], counts = naive(nq[b, rows, h], nk[b, :, h], nv[b, :, h], chosen, VALID[b], block)
        assert np.asarray(left)[b, h, g].tolist() == [*counts, *[0] * (left.shape[-1] - len(counts))]
    agree(out, expected, implementation)


def test_means_of_keys_that_are_all_chosen_have_no_weight(implementation):
    rng, dtype = np.random.default_rng(1), dtype_of(implementation)
    (q, nq), (k, nk), (v, nv) = (draw(rng, 1, 128, 1, D, dtype=dtype) for _ in range(3))
    keys = Columns(jnp.broadcast_to(jnp.arange(128), (1, 1, 1, 2, 128)), jnp.full((1, 1, 1, 2), 128))
    means = block_means(k, v, keys, block=64, implementation=implementation)
    assert not np.asarray(means.left).any()
    wild = means._replace(k=jnp.full_like(means.k, 0.1), v=jnp.full_like(means.v, 1e3))
    options = dict(lse=jnp.zeros((1, 1, 1, 128)), group=64, scale=0.125, implementation=implementation)
    dense = np.exp(0.125 * nq[0, :, 0] @ nk[0, :, 0].T)
    expected = dense / dense.sum(-1, keepdims=True) @ nv[0, :, 0]
    agree(whole(column_attention, q, k, v, keys, means=wild, **options)[0, :, 0], expected, implementation)


@pytest.mark.parametrize(("block", "shape"), [(32, (1, 128, 1, D)), (64, (1, 128, 2, D)), (0, (1, 128, 1, D))])
def test_blocks_and_shapes_that_do_not_fit_are_refused(block, shape):
    k = jnp.zeros((1, 128, 1, D))
    keys = Columns.empty((1, 1, 1, 2), 8)
    with pytest.raises(ValueError, match="expected"):
        block_means(k, jnp.zeros(shape), keys, block=block, implementation="reference")
