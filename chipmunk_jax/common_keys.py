"""Keys that every head of a group of queries attends to whatever their scores: a text, and what lies near the group."""

import math
from collections.abc import Sequence

import numpy as np

from chipmunk_jax.order import patch_order
from chipmunk_jax.sparsity import AttentionSparsity
from pallas_kernels import Common
from pallas_kernels.groups import group_count

Box = tuple[np.ndarray, np.ndarray]  # least and greatest place on every axis, both in it


def common_keys(
    config: AttentionSparsity,
    grid: Sequence[int],
    patches: Sequence[int | Sequence[int]],
    text: tuple[int, int] = (0, 0),
) -> Common | None:
    """The common keys of a sequence of the tokens of a grid and of a text, as NumPy arrays; None where there are none.

    Args:
        config: which keys.
        grid: of the tokens, which stand in patch_order(grid, patches).
        patches: the largest are the voxels of config.local_voxels.
        text: rows of the sequence that are text instead, from the first to before the second.

    Raises:
        ValueError: a neighbourhood of no voxels, or of more than the grid has.
    """
    start, stop = text
    total = math.prod(grid) + stop - start
    groups = [
        range(g * config.group, min((g + 1) * config.group, total)) for g in range(group_count(total, config.group))
    ]
    rows = np.concatenate([np.arange(start), np.arange(stop, total)])  # of the sequence that are tokens of the grid
    windows = []  # (place of every token [n, axes], how far a group sees on each axis, in places)
    if config.local_voxels:
        windows.append(_voxels(config.local_voxels, grid, patches))
    if config.local_1d_window:
        windows.append((np.arange(len(rows))[:, None], np.array([round(config.local_1d_window * len(rows) / 2)])))
    if not (windows or (stop > start and (config.text_keys or config.text_queries))):
        return None

    def of_group(group: range) -> np.ndarray:
        has_text = group.start < stop and group.stop > start
        if config.text_queries and has_text:
            return np.arange(total)
        keep = np.zeros(total, bool)
        keep[start:stop] = config.text_keys
        members = (rows >= group.start) & (rows < group.stop)
        for places, reach in windows if members.any() else ():
            low, high = _widened(places[members].min(0), places[members].max(0), reach, places.max(0))
            keep[rows[((places >= low) & (places <= high)).all(1)]] = True
        return np.flatnonzero(keep)

    ids = [of_group(group) for group in groups]
    heavy = sum(group.stop > start for group in groups) if config.text_queries and stop == total > start else 0
    return Common(np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)]).astype(np.int32), heavy)


def _voxels(side: int, grid: Sequence[int], patches: Sequence[int | Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    if not patches:
        raise ValueError(f"local_voxels={side} with tokens in rows: expected patches, such as [[4,4,8]]")
    order = patch_order(grid, patches)
    voxel = (patches[0],) * len(grid) if isinstance(patches[0], int) else patches[0]
    voxels = [group_count(n, sides) for n, sides in zip(grid, voxel, strict=True)]
    if side > max(voxels):
        raise ValueError(
            f"local_voxels={side}: expected at most {max(voxels)}, as the grid has {voxels} voxels of {voxel}"
        )
    places = np.stack(np.unravel_index(order, grid), -1) // np.array(voxel)
    return places, np.full(len(grid), side // 2)


def _widened(low: np.ndarray, high: np.ndarray, reach: np.ndarray, last: np.ndarray) -> Box:
    """The box from low to high with `reach` more places on every side: at a border those that are missing on the other side."""
    low, high = low - reach, high + reach
    low, high = low - np.maximum(high - last, 0), high + np.maximum(-low, 0)
    return np.maximum(low, 0), np.minimum(high, last)
