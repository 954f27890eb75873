"""A fast test of whether all numbers of an array are finite."""

import numpy as np


def finite(array: np.ndarray) -> bool:
    """Whether no float is infinite or NaN, judged by bits: read as integers, infinity and NaN are the largest of either sign.

    Two maxima run at the speed of memory; np.isfinite takes many times as long for bf16, a type that NumPy does not have.

    Args:
        array: floats of any width, in the byte order of this machine.
    """
    below = lambda kind, limit: array.view(kind).max(initial=0) < np.array(limit, array.dtype).view(kind)
    return bool(below(f"i{array.itemsize}", np.inf) and below(f"u{array.itemsize}", -np.inf))
