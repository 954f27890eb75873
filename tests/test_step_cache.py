"""Step caching: which steps are skipped, and that they leave what was kept as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chipmunk_jax import StepCache
from chipmunk_jax.step_cache import skipped, unless_skipped


def test_the_skipped_steps_are_those_that_are_named():
    assert skipped(StepCache(skip_steps=(4, 1)), 6).tolist() == [False, True, False, False, True, False]
    assert np.flatnonzero(skipped(StepCache(), 50)).tolist() == list(StepCache().skip_steps)


@pytest.mark.parametrize("skip", [None, False, True])
def test_a_skipped_step_keeps_all_bits_and_another_one_runs(skip):
    run = lambda x, hidden, cache: (x + hidden, {"a": cache["a"] * 2})
    x, hidden, cache = jnp.float32([1, 2]), jnp.float32([0.1, jnp.inf]), {"a": jnp.float32([3])}
    flag = None if skip is None else jnp.array(skip)
    found = jax.jit(lambda flag: unless_skipped(flag, run, x, hidden, cache))(flag)
    jax.tree.map(np.testing.assert_array_equal, found, (hidden, cache) if skip else run(x, hidden, cache))
