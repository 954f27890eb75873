"""Rivals at the cost of a sparse sample: fewer steps, and skipped steps alone."""

import numpy as np
import pytest

from chipmunk_jax.fit import fit
from chipmunk_jax.report.configurations import rivals


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 28, 50])
def test_rivals_run_the_number_of_steps_that_is_nearest_to_the_cost(steps):
    for share in np.linspace(0.0113, 1, 67):  # no ties
        found = rivals(share, steps)
        run = max(1, min(range(steps + 1), key=lambda n: (abs(n / steps - share), -n)))
        if run == steps:
            assert found == {}
            continue
        assert list(found) == [f"{run} of {steps} steps", f"{steps - run} of {steps} skipped alone"]
        fewer, skipping = found.values()
        assert (fewer.sparsity, fewer.steps) == (None, run)
        assert skipping.steps is None and not (skipping.sparsity.attention or skipping.sparsity.mlp)
        fitted = fit(skipping.sparsity, steps)
        skipped = fitted.step_cache.skip_steps
        assert len(skipped) == steps - run and 0 not in skipped
        assert steps - 1 not in skipped or run == 1  # the last step runs beside the first


def test_a_cost_between_two_numbers_of_steps_is_rounded_in_favour_of_the_rivals():
    assert list(rivals(0.5, 25)) == ["13 of 25 steps", "12 of 25 skipped alone"]


def test_rivals_say_by_what_they_save():
    fewer, skipping = rivals(0.4, 30).values()
    assert (fewer.method(30), skipping.method(30)) == ("fewer steps", "skipped steps")
    assert skipping.sparsity.step_cache.skip_steps[:3] == (3, 4, 6)


@pytest.mark.parametrize(("share", "order"), [(0.9, 1), (1 / 3, 1), (0.3, 0)])
def test_the_rival_that_skips_extrapolates_over_short_gaps_alone(share, order):
    _, skipping = rivals(share, 30).values()
    assert (skipping.sparsity.step_cache.predict, skipping.sparsity.step_cache.order) == ("hidden", order)
