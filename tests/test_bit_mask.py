"""Lists to bit masks and back, in every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cuda_target

from pallas_kernels import lists_to_mask, mask_to_lists


def draw(rng, lead, columns, capacity):
    """Ascending lists of 0 to capacity columns, garbage behind their counts; and which columns they hold."""
    indices = rng.integers(-(2**31), 2**31, (*lead, capacity))
    counts = rng.integers(0, capacity + 1, lead)
    counts.flat[:2] = 0, capacity
    kept = np.zeros((*lead, columns), bool)
    for at in np.ndindex(lead):
        ids = np.sort(rng.choice(columns, counts[at], replace=False))
        indices[at][: counts[at]] = ids
        kept[at][ids] = True
    return jnp.asarray(indices, jnp.int32), jnp.asarray(counts, jnp.int32), kept


@pytest.mark.parametrize(
    ("lead", "columns", "capacity"), [((2, 3), 64, 64), ((1, 2, 2), 1000, 100), ((3,), 40_001, 2_500), ((2,), 1, 1)]
)
def test_a_bit_a_listed_column_and_the_lists_again(implementation, lead, columns, capacity):
    indices, counts, kept = draw(np.random.default_rng(0), lead, columns, capacity)
    mask = lists_to_mask(indices, counts, columns)
    assert mask.shape == (*lead, -(-columns // 32)) and mask.dtype == jnp.int32
    bits = np.unpackbits(np.asarray(mask).view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(bits[..., :columns], kept)
    assert not bits[..., columns:].any()
    again, found = mask_to_lists(mask, capacity=capacity, implementation=implementation)
    np.testing.assert_array_equal(found, counts)
    listed = np.arange(capacity) < np.asarray(counts)[..., None]
    np.testing.assert_array_equal(np.where(listed, again, 0), np.where(listed, indices, 0))


def test_it_lowers_for_cuda_at_the_size_of_a_video():
    mask = jax.ShapeDtypeStruct((24, 930, 3720), jnp.int32)
    with cuda_target():
        lists = jax.jit(lambda mask: mask_to_lists(mask, capacity=8320, implementation="pallas"))
        lowered = lists.trace(mask).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \[.., K\] and \[..\]"):
        lists_to_mask(jnp.zeros((2, 3), jnp.int32), jnp.zeros(3, jnp.int32), 8)
