"""Token orders: near tokens become neighbours, so that a group of rows shares its columns. Models never know."""

import numpy as np


def patch_order(grid: tuple[int, int], patches: tuple[int, ...] = (8, 4)) -> np.ndarray:
    """Raster index of every token in patch order, i32 [rows * columns].

    The largest patches go in raster order, inside each the next smaller ones, inside the smallest the tokens in raster order.
    Rows, then columns, that fill no whole patch follow at the end of their level, in raster order.

    Args:
        grid: (rows, columns) of tokens, any size.
        patches: sides of the nested square patches, the largest first; () is raster order. (Chipmunk, section 4: 8, then 4.)
    """
    return _visit(np.arange(grid[0] * grid[1], dtype=np.int32).reshape(grid), patches)


def _visit(ids: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    if not sides:
        return ids.ravel()
    side, *smaller = sides
    rows, columns = (n - n % side for n in ids.shape)
    whole = ids[:rows, :columns].reshape(rows // side, side, columns // side, side).swapaxes(1, 2)
    parts = [_visit(patch, tuple(smaller)) for patch in whole.reshape(-1, side, side)]
    return np.concatenate([*parts, ids[rows:].ravel(), ids[:rows, columns:].ravel()])


def inverse(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes `order`: x[order][inverse(order)] == x."""
    return np.argsort(order).astype(np.int32)
