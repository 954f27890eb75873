"""finite() by bit patterns is np.isfinite."""

import ml_dtypes
import numpy as np
import pytest

from chipmunk_jax.finite import finite

DTYPES = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_holds_for_every_float_but_infinities_and_nan(dtype):
    numbers = ml_dtypes.finfo(dtype)
    values = np.array([[0, -0.0, 1, numbers.max], [-1, numbers.min, numbers.tiny, -numbers.tiny]]).astype(dtype)
    assert finite(values) and finite(values[:, ::2].T) and finite(values[:0])
    for wrong in (np.nan, -np.nan, np.inf, -np.inf):  # the infinities of e4m3fn are NaN
        broken = values.copy()
        broken[1, 2] = wrong
        assert not finite(broken) and not finite(broken.T) and finite(broken[:, :2])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_finite_is_isfinite_of_every_pattern(dtype):
    size = np.dtype(dtype).itemsize
    patterns = np.arange(256**size, dtype=f"u{size}").view(dtype)
    assert [finite(one) for one in patterns.reshape(-1, 1)] == np.isfinite(patterns.astype(np.float32)).tolist()
