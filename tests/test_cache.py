"""Caches: shapes and dtypes as documented, and their size known before they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, cache
from chipmunk_jax.cache import LayerCache
from chipmunk_jax.model import Stack

# L, B, N, H, d, D, F; an odd edge everywhere. The first stack's MLP sees fewer tokens than its attention.
STACKS = {
    "double": Stack(layers=3, tokens=205, heads=2, head_dim=16, mlp_tokens=135, width=32, mlp_width=300),
    "single": Stack(layers=1, tokens=205, heads=2, head_dim=16, mlp_tokens=205, width=32, mlp_width=300),
}
BATCH = 2
SPARSITY = Sparsity(
    attention=AttentionSparsity(top_keys=0.3, max_keys=0.6, group=64),  # room for 0.6 x 205 = 123: 2 tiles of 64
    mlp=MlpSparsity(top_keys=0.3, random_keys=0.0, group=128),  # 0.3 x 300 = 90: 1 tile of 64
)


def shapes(tree):
    """Dotted path -> (shape, dtype) of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): (a.shape, a.dtype) for path, a in leaves}


def with_cache(kind):
    return Sparsity(attention=SPARSITY.attention, mlp=MlpSparsity(top_keys=0.3, random_keys=0.0, cache=kind))


ATTENTION = {  # N = 205 in groups of 64: 4
    "columns.indices": ((2, 2, 4, 128), jnp.int32),
    "columns.counts": ((2, 2, 4), jnp.int32),
    "residual": ((2, 205, 2, 16), jnp.bfloat16),
    "lse": ((2, 2, 205), jnp.float32),
}
RESIDUAL = {  # N = 135 in groups of 128: 2
    "columns.indices": ((2, 2, 64), jnp.int32),
    "columns.counts": ((2, 2), jnp.int32),
    "out": ((2, 135, 32), jnp.bfloat16),
}
ACTIVATIONS = RESIDUAL | {
    "activations": ((2, 300, 135), jnp.bfloat16),
    "group_mean": ((2, 2, 300), jnp.float32),
}


@pytest.mark.parametrize(("kind", "mlp"), [("activations", ACTIVATIONS), ("residual", RESIDUAL)])
def test_arrays_have_the_documented_shapes_and_dtypes(kind, mlp):
    found = shapes(cache.zeros(STACKS, with_cache(kind), BATCH, jnp.bfloat16))
    expected = {f"attention.{name}": entry for name, entry in ATTENTION.items()}
    expected |= {f"mlp.{name}": entry for name, entry in mlp.items()}
    double = {f"double.{name}": ((3, *shape), dtype) for name, (shape, dtype) in expected.items()}
    assert {name: entry for name, entry in found.items() if name.startswith("double")} == double
    assert {name.partition(".")[0] for name in found} == set(STACKS)
    assert found["single.mlp.out"] == ((1, 2, 205, 32), jnp.bfloat16)


def test_the_lists_start_empty():
    caches = cache.zeros(STACKS, SPARSITY, BATCH, jnp.float32)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(caches))
    assert caches["double"].attention.residual.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", ["activations", "residual"])
def test_predicted_bytes_are_those_of_the_arrays(kind, dtype):
    sparsity = with_cache(kind)
    predicted = cache.nbytes(STACKS, sparsity, BATCH, dtype)
    arrays = cache.zeros(STACKS, sparsity, BATCH, dtype)
    assert predicted.keys() == shapes(arrays).keys()
    assert list(predicted.values()) == [array.nbytes for array in jax.tree.leaves(arrays)]
    assert predicted["double.attention.residual"] == 3 * 2 * 205 * 2 * 16 * jnp.dtype(dtype).itemsize


def test_predicting_allocates_nothing():
    """Arrays of 10^14 bytes fit nowhere."""
    huge = Stack(layers=100, tokens=10**6, heads=100, head_dim=128, mlp_tokens=10**6, width=12800, mlp_width=51200)
    assert sum(cache.nbytes({"huge": huge}, Sparsity(), BATCH, jnp.bfloat16).values()) > 10**14


def test_a_dense_part_has_no_cache():
    mlp_only = cache.zeros(STACKS, Sparsity(attention=None, mlp=SPARSITY.mlp), BATCH, jnp.bfloat16)
    attention_only = cache.zeros(STACKS, Sparsity(attention=SPARSITY.attention, mlp=None), BATCH, jnp.bfloat16)
    nothing = cache.zeros(STACKS, Sparsity(attention=None, mlp=None), BATCH, jnp.bfloat16)
    both = shapes(cache.zeros(STACKS, SPARSITY, BATCH, jnp.bfloat16))
    assert all(stack.attention is None for stack in mlp_only.values())
    assert all(stack.mlp is None for stack in attention_only.values())
    assert nothing == dict.fromkeys(STACKS, LayerCache(None, None))
    assert shapes(mlp_only) | shapes(attention_only) == both
    assert cache.nbytes(STACKS, Sparsity(attention=None, mlp=None), BATCH, jnp.bfloat16) == {}
    assert cache.nbytes(STACKS, None, BATCH, jnp.bfloat16) == {}


def test_no_array_is_there_twice_as_sample_donates_them(monkeypatch):
    monkeypatch.setattr(cache, "PACKED_LENGTHS", range(1000))
    leaves = jax.tree.leaves(cache.zeros(STACKS, SPARSITY, BATCH, jnp.bfloat16))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
