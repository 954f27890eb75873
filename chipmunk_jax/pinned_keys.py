"""Keys that every head of a group of queries attends to whatever their scores: a text, and what lies near the group."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.order import patch_order, patch_sides
from chipmunk_jax.sparsity import AttentionSparsity, Sparsity
from pallas_kernels import PinnedKeys
from pallas_kernels.groups import group_count

Box = tuple[np.ndarray, np.ndarray]  # least and greatest place on every axis, both in it
# Of an AttentionSparsity, those that matter here.
SETTINGS = ("group", "local_voxels", "local_1d_window", "text_keys", "text_queries")
Near = Callable[[slice], np.ndarray]


def pinned_keys(
    config: AttentionSparsity,
    grid: Sequence[int],
    patches: Sequence[int | Sequence[int]],
    text: tuple[int, int] = (0, 0),
) -> PinnedKeys | None:
    """The pinned keys of a sequence of the tokens of a grid and of a text; None where there are none.

    NumPy arrays that nobody can write to: the same ones for the same arguments, as those of a long video take a second.

    Args:
        config: which keys.
        grid: of the tokens, which stand in patch_order(grid, patches).
        patches: the largest are the voxels of config.local_voxels.
        text: rows of the sequence that are text instead, from the first to before the second.

    Raises:
        InputError: a neighbourhood of no voxels, or of more than the grid has.
    """
    # Of the config what matters alone: a sweep over shares of keys makes them once.
    chosen = dataclasses.replace(AttentionSparsity(), **{name: getattr(config, name) for name in SETTINGS})
    grid, patches = tuple(map(int, grid)), tuple(p if isinstance(p, int) else tuple(p) for p in patches)
    return _pinned_keys(chosen, grid, patches, tuple(map(int, text)))


@functools.lru_cache(maxsize=4)  # 38 MB each for Wan 14B
def _pinned_keys(config: AttentionSparsity, grid: tuple, patches: tuple, text: tuple[int, int]) -> PinnedKeys | None:
    start, stop = text
    total = math.prod(grid) + stop - start
    groups = [
        range(g * config.group, min((g + 1) * config.group, total)) for g in range(group_count(total, config.group))
    ]
    rows = np.concatenate([np.arange(start), np.arange(stop, total)])  # of the sequence that are tokens of the grid
    nearby = []  # functions: a run of such tokens -> those that its group keeps for being near
    if config.local_voxels:
        nearby.append(_voxels(config.local_voxels, grid, patches))
    if config.local_1d_window:
        nearby.append(_window(config.local_1d_window, len(rows)))
    if not (nearby or (stop > start and (config.text_keys or config.text_queries))):
        return None

    def of_group(group: range) -> np.ndarray:
        has_text = group.start < stop and group.stop > start
        if config.text_queries and has_text:
            return np.arange(total)
        keep = np.zeros(total, bool)
        keep[start:stop] = config.text_keys
        members = slice(*np.searchsorted(rows, (group.start, group.stop)))
        for near in nearby if members.start < members.stop else ():
            keep[rows[near(members)]] = True
        return np.flatnonzero(keep)

    ids = [of_group(group) for group in groups]
    heavy = sum(group.stop > start for group in groups) if config.text_queries and stop == total > start else 0
    arrays = np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)]).astype(np.int32)
    for array in arrays:
        array.flags.writeable = False
    return PinnedKeys(*arrays, heavy)


def check_grid(sparsity: Sparsity, grid: Sequence[int]) -> None:
    """Raises InputError where it is no Sparsity, its patches have other axes than the grid, or a neighbourhood is larger."""
    if not isinstance(sparsity, Sparsity):
        raise InputError(f"sparsity={sparsity!r}: expected a Sparsity, as load_sparsity() makes, or None")
    patch_sides(grid, sparsity.patches)
    if sparsity.attention and sparsity.attention.local_voxels:
        check_voxels(sparsity.attention.local_voxels, grid, sparsity.patches)


def fitted(sparsity: Sparsity, grid: Sequence[int]) -> Sparsity:
    """The sparsity with neighbourhoods of no more voxels than a grid has."""
    attention = sparsity.attention
    if not attention or not attention.local_voxels or not sparsity.patches:
        return sparsity
    side = min(attention.local_voxels, _most_voxels(grid, sparsity.patches))
    return dataclasses.replace(sparsity, attention=dataclasses.replace(attention, local_voxels=side))


def check_voxels(side: int, grid: Sequence[int], patches: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    """Sides, in tokens, of the voxels of which a neighbourhood has `side` along each axis.

    Raises:
        InputError: no voxels, or more than the grid has.
    """
    if not patches:
        raise InputError(f"local_voxels={side} with tokens in rows: expected patches, such as [[4,4,8]]")
    voxel = patch_sides(grid, patches)[0]
    if side > (odd := _most_voxels(grid, patches)):
        voxels = _voxels_of(grid, voxel)
        fits = f"--sparsity.attention.local-voxels {odd} fits (in Python attention.local_voxels)"
        raise InputError(
            f"local_voxels={side}: expected at most {odd}, as the grid has {voxels} voxels of {voxel}; {fits}"
        )
    return voxel


def _most_voxels(grid: Sequence[int], patches: Sequence[int | Sequence[int]]) -> int:
    """Along each axis of the largest neighbourhood, an odd number, as it has a middle."""
    most = max(_voxels_of(grid, patch_sides(grid, patches)[0]))
    return most - 1 + most % 2


def _voxels_of(grid: Sequence[int], voxel: Sequence[int]) -> list[int]:
    """How many a grid has along each axis."""
    return [group_count(n, sides) for n, sides in zip(grid, voxel, strict=True)]


def _voxels(side: int, grid: Sequence[int], patches: Sequence[int | Sequence[int]]) -> Near:
    voxel = check_voxels(side, grid, patches)
    places = np.stack(np.unravel_index(patch_order(grid, patches), grid), -1) // np.array(voxel)
    voxels = places.max(0) + 1
    number = np.ravel_multi_index(tuple(places.T), voxels)
    tokens_of = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])

    def near(members: slice) -> np.ndarray:
        low, high = _widened(places[members].min(0), places[members].max(0), side // 2, voxels - 1)
        boxed = np.ix_(*(range(a, b + 1) for a, b in zip(low, high, strict=True)))
        return np.concatenate([tokens_of[n] for n in np.ravel_multi_index(boxed, voxels).ravel()])

    return near


def _window(fraction: float, total: int) -> Near:
    def near(members: slice) -> np.ndarray:
        ends = np.array([members.start]), np.array([members.stop - 1])
        low, high = _widened(*ends, round(fraction * total / 2), np.array([total - 1]))
        return np.arange(low[0], high[0] + 1)

    return near


def _widened(low: np.ndarray, high: np.ndarray, reach: int, last: np.ndarray) -> Box:
    """The box from low to high with `reach` more places on every side: at a border those that are missing on the other side."""
    low, high = low - reach, high + reach
    low, high = low - np.maximum(high - last, 0), high + np.maximum(-low, 0)
    return np.maximum(low, 0), np.minimum(high, last)
