"""Keys that groups always keep, against neighbourhoods looked up token by token."""

import dataclasses
import inspect
import itertools
import re
import sys

import numpy as np
import pytest

from chipmunk_jax import AttentionSparsity
from chipmunk_jax.order import patch_order
from chipmunk_jax.pinned_keys import check_voxels, pinned_keys

VOXEL = (4, 4, 8)


def lists_of(pinned):
    return [set(pinned.ids[a:b].tolist()) for a, b in itertools.pairwise(pinned.starts)]


def along(place, reach, size):
    """Places within reach of one, as many at a border as in the middle."""
    width = min(2 * reach + 1, size)
    low = min(max(place - reach, 0), size - width)
    return range(low, low + width)


@pytest.mark.parametrize(("grid", "side"), [((8, 16, 24), 1), ((8, 16, 24), 3), ((12, 20, 32), 3), ((20, 8, 16), 5)])
def test_a_group_that_is_a_voxel_keeps_the_voxels_around_it_and_no_others(grid, side):
    pinned = pinned_keys(AttentionSparsity(local_voxels=side, group=128), grid, (VOXEL,))
    voxels = [n // s for n, s in zip(grid, VOXEL, strict=True)]
    number = {voxel: n for n, voxel in enumerate(np.ndindex(*voxels))}
    kept = lists_of(pinned)
    assert len(kept) == len(number) and pinned.heavy == 0
    for voxel, g in number.items():
        near = itertools.product(*(along(p, side // 2, n) for p, n in zip(voxel, voxels, strict=True)))
        assert kept[g] == {128 * number[other] + i for other in near for i in range(128)}


def test_the_first_voxel_is_not_kept_by_all():
    pinned = pinned_keys(AttentionSparsity(local_voxels=3), (8, 40, 80), (VOXEL,))
    assert sum(0 in ids for ids in lists_of(pinned)) == 2 * 2 * 2  # those next to it alone


@pytest.mark.parametrize("grid", [(9, 18, 21), (5, 7, 17), (1, 9, 17)])
def test_groups_of_ragged_slabs_keep_what_is_near_any_of_their_tokens(grid):
    side, group = 3, 64
    pinned = pinned_keys(AttentionSparsity(local_voxels=side, group=group), grid, (VOXEL,))
    places = np.stack(np.unravel_index(patch_order(grid, (VOXEL,)), grid), -1) // np.array(VOXEL)
    sizes = places.max(0) + 1
    for g, kept in enumerate(lists_of(pinned)):
        rows = places[g * group : (g + 1) * group]
        near = [{q for p in set(rows[:, a]) for q in range(p - 1, p + 2)} & set(range(n)) for a, n in enumerate(sizes)]
        expected = {j for j, place in enumerate(places) if all(p in near[a] for a, p in enumerate(place))}
        assert expected <= kept
        assert all(np.ptp(places[list(kept), a]) + 1 >= min(3, sizes[a]) for a in range(3))


@pytest.mark.parametrize("text", [(0, 70), (256, 326)])  # in front as in FLUX, behind as in HunyuanVideo
def test_text_is_kept_by_all_and_keeps_all(text):
    start, stop = text
    config = AttentionSparsity(text_keys=True, text_queries=True, group=128)
    pinned = pinned_keys(config, (4, 8, 8), (VOXEL,), text)
    kept = lists_of(pinned)
    assert len(kept) == 3
    for g, ids in enumerate(kept):
        has_text = g * 128 < stop and (g + 1) * 128 > start
        assert ids == (set(range(326)) if has_text else set(range(start, stop)))
    assert pinned.heavy == (1 if start else 0)


def test_text_queries_alone_leave_the_text_to_its_scores():
    kept = lists_of(pinned_keys(AttentionSparsity(text_queries=True), (4, 8, 8), (VOXEL,), (256, 300)))
    assert kept == [set(), set(), set(range(300))]


def test_the_window_along_the_order_is_as_wide_for_all():
    config = AttentionSparsity(local_1d_window=0.25, group=64)
    pinned = pinned_keys(config, (8, 8, 16), (VOXEL,), (1024, 1034))
    for g, kept in enumerate(lists_of(pinned)):
        low = min(max(64 * g - 128, 0), 1024 - 320)
        assert kept == (set(range(low, low + 320)) if g < 16 else set())


@pytest.mark.parametrize("patches", [(), (VOXEL,)])
def test_nothing_pinned_is_none(patches):
    assert pinned_keys(AttentionSparsity(), (4, 8, 8), patches, (256, 300)) is None
    assert pinned_keys(AttentionSparsity(text_keys=True, text_queries=True), (4, 8, 8), patches) is None


def test_the_same_neighbourhood_is_made_once_and_nobody_can_change_it():
    config = AttentionSparsity(local_voxels=3)
    pinned = pinned_keys(config, (8, 16, 24), (VOXEL,))
    assert pinned_keys(config, [8, 16, 24], [list(VOXEL)]) is pinned
    assert pinned_keys(AttentionSparsity(local_voxels=3, top_keys=0.5), (8, 16, 24), (VOXEL,)) is pinned
    assert pinned_keys(AttentionSparsity(local_voxels=1), (8, 16, 24), (VOXEL,)) is not pinned
    for array in (pinned.ids, pinned.starts):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("field", dataclasses.fields(AttentionSparsity), ids=lambda field: field.name)
def test_neighbourhoods_that_differ_are_not_taken_for_each_other(field):
    """Whatever field is added: one that is left out of SETTINGS must not change what is made."""
    others = dict(group=64, local_voxels=1, local_1d_window=0.5, text_keys=True, text_queries=True)
    if field.name not in others:
        assert f"config.{field.name}" not in inspect.getsource(sys.modules[pinned_keys.__module__])
        return
    base = AttentionSparsity(local_voxels=3)
    lists = [lists_of(pinned_keys(config, (8, 16, 24), (VOXEL,), (3072, 3100))) for config in (
        base, dataclasses.replace(base, **{field.name: others[field.name]})
    )]  # fmt: skip
    assert lists[0] != lists[1]


@pytest.mark.parametrize(
    ("side", "patches", "message"),
    [
        (5, (VOXEL,), r"local_voxels=5: expected at most 3, as the grid has \[2, 3, 2\] voxels of \(4, 4, 8\)"),
        (3, (), r"local_voxels=3 with tokens in rows: expected patches, such as \[\[4,4,8\]\]"),
        (3, ((4, 4),), r"patch \(4, 4\): expected 3 sides"),
    ],
)
def test_neighbourhoods_that_are_not_there_are_refused(side, patches, message):
    with pytest.raises(ValueError, match=message):
        pinned_keys(AttentionSparsity(local_voxels=side), (8, 12, 16), patches)


@pytest.mark.parametrize("rows", range(1, 8))
def test_the_most_voxels_that_a_refusal_names_are_taken(rows):
    grid = (4, 4 * rows, 8)
    with pytest.raises(ValueError, match="expected at most") as error:
        check_voxels(99, grid, (VOXEL,))
    most = int(re.search(r"at most (\d+)", str(error.value))[1])
    pinned_keys(AttentionSparsity(local_voxels=most), grid, (VOXEL,))
    with pytest.raises(ValueError, match=f"local_voxels={most + 2}: expected at most {most}"):
        pinned_keys(AttentionSparsity(local_voxels=most + 2), grid, (VOXEL,))
