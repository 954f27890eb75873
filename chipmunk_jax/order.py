"""Token orders: near tokens become neighbours, so that a group of rows shares its columns. Models never know."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from chipmunk_jax.errors import InputError


def patch_order(grid: Sequence[int], patches: Sequence[int | Sequence[int]] = (8, 4)) -> np.ndarray:
    """Raster index of every token of a grid in patch order, i32 [product of the grid].

    The largest patches go in raster order, inside each the next smaller ones, inside the smallest the tokens in raster order.
    Tokens that fill no whole patch follow at the end of their level, a slab for each axis, in raster order: first what is behind
    the last whole patch on the first axis, then of the rest what is behind it on the second, ..

    Args:
        grid: (rows, columns) of an image's tokens, (frames, rows, columns) of a video's, any size.
        patches: nested, the largest first; a side, or one for each axis, as the voxel (4, 4, 8). () is raster order. (Chipmunk,
            section 4: 8, then 4.)

    Raises:
        InputError: a patch of another number of axes.
    """
    sides = patch_sides(grid, patches)
    return _visit(np.arange(math.prod(grid), dtype=np.int32).reshape(grid), sides)


def patch_sides(grid: Sequence[int], patches: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Sides of every patch on all axes of a grid.

    Raises:
        InputError: a patch of another number of axes.
    """
    sides = [(patch,) * len(grid) if isinstance(patch, int) else tuple(patch) for patch in patches]
    if wrong := [side for side in sides if len(side) != len(grid)]:
        raise InputError(f"patch {wrong[0]}: expected {len(grid)} sides for the grid {tuple(grid)}")
    return sides


def _visit(ids: np.ndarray, sides: list[tuple[int, ...]]) -> np.ndarray:
    if not sides:
        return ids.ravel()
    whole = [n - n % side for n, side in zip(ids.shape, sides[0], strict=True)]
    corners = itertools.product(*(range(0, n, side) for n, side in zip(whole, sides[0], strict=True)))
    inside = lambda corner: tuple(slice(start, start + side) for start, side in zip(corner, sides[0], strict=True))
    slabs = [ids[(*map(slice, whole[:axis]), slice(whole[axis], None))] for axis in range(ids.ndim)]
    parts = [_visit(ids[inside(corner)], sides[1:]) for corner in corners]
    return np.concatenate([*parts, *(slab.ravel() for slab in slabs)])


def inverse(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes `order`: x[order][inverse(order)] == x."""
    return np.argsort(order).astype(np.int32)
