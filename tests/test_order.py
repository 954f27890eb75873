"""Token orders: by hand on small grids, and as permutations on any."""

import numpy as np
import pytest

from chipmunk_jax.order import inverse, patch_order

GRIDS = [(1, 1), (1, 9), (9, 1), (3, 5), (4, 4), (7, 8), (8, 8), (16, 24), (17, 13), (9, 31), (30, 48)]
PATCHES = [(), (1,), (2,), (3,), (8, 4), (4, 2, 1), (8, 4, 2), (64,)]


def naive_order(rows, columns, patches, top=0, left=0, width=None):
    """The order, token by token."""
    width = columns if width is None else width
    place = lambda r, c: (top + r) * width + left + c
    if not patches:
        return [place(r, c) for r in range(rows) for c in range(columns)]
    side, order = patches[0], []
    for r in range(0, rows - side + 1, side):
        for c in range(0, columns - side + 1, side):
            order += naive_order(side, side, patches[1:], top + r, left + c, width)
    seen = set(order)
    below = [place(r, c) for r in range(rows - rows % side, rows) for c in range(columns)]
    right = [place(r, c) for r in range(rows) for c in range(columns - columns % side, columns)]
    return order + below + [token for token in right if token not in seen and token not in below]


def test_two_by_two_patches_of_a_ragged_grid_by_hand():
    #  0  1 |  2  3 |  4
    #  5  6 |  7  8 |  9
    # ----------------
    # 10 11   12 13   14
    expected = [0, 1, 5, 6, 2, 3, 7, 8, 10, 11, 12, 13, 14, 4, 9]
    np.testing.assert_array_equal(patch_order((3, 5), (2,)), expected)


def test_nested_patches_by_hand():
    #  0  1 |  2  3
    #  4  5 |  6  7
    #  8  9 | 10 11
    # 12 13 | 14 15
    expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    np.testing.assert_array_equal(patch_order((4, 4), (4, 2)), expected)
    np.testing.assert_array_equal(patch_order((4, 4), (2,)), expected)


def test_whole_patches_of_8_stand_first_then_4_inside_them_in_raster_order():
    rows, columns = 19, 26  # 2 x 3 whole patches
    order = patch_order((rows, columns), (8, 4))
    position = 0
    for r in range(0, 16, 8):
        for c in range(0, 24, 8):
            for inner_r in range(r, r + 8, 4):
                for inner_c in range(c, c + 8, 4):
                    for y in range(inner_r, inner_r + 4):
                        for x in range(inner_c, inner_c + 4):
                            assert order[position] == y * columns + x
                            position += 1
    assert position == 6 * 64
    below = [y * columns + x for y in range(16, 19) for x in range(26)]
    right = [y * columns + x for y in range(16) for x in range(24, 26)]
    np.testing.assert_array_equal(order[position:], below + right)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_patches_is_raster_order(grid):
    np.testing.assert_array_equal(patch_order(grid, ()), np.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("patches", PATCHES)
def test_every_order_is_a_permutation_with_an_exact_inverse(grid, patches):
    order = patch_order(grid, patches)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(grid[0] * grid[1]))
    np.testing.assert_array_equal(order, naive_order(*grid, patches))
    tokens = np.random.default_rng(0).standard_normal(len(order))
    np.testing.assert_array_equal(tokens[order][inverse(order)], tokens)
    np.testing.assert_array_equal(tokens[inverse(order)][order], tokens)
    assert inverse(order).dtype == np.int32


def test_voxels_of_a_ragged_video_by_hand():
    # Frames of 2 x 3: 0 1 2 / 3 4 5, then 6 .. 11, then 12 .. 17; voxels of 2 x 2 x 2.
    expected = [0, 1, 3, 4, 6, 7, 9, 10, *range(12, 18), 2, 5, 8, 11]
    np.testing.assert_array_equal(patch_order((3, 2, 3), ((2, 2, 2),)), expected)
    np.testing.assert_array_equal(patch_order((3, 2, 3), (2,)), expected)


@pytest.mark.parametrize("grid", [(33, 45, 80), (21, 45, 80), (4, 6, 9), (1, 5, 7), (5, 3, 8)])
@pytest.mark.parametrize("voxel", [(4, 4, 8), (4, 6, 8), (1, 1, 1)])
def test_whole_voxels_come_first_and_then_a_slab_for_each_axis(grid, voxel):
    order = patch_order(grid, (voxel,))
    np.testing.assert_array_equal(np.sort(order), np.arange(np.prod(grid)))
    np.testing.assert_array_equal(order[inverse(order)], np.arange(order.size))
    places = np.stack(np.unravel_index(order, grid), -1)
    whole = np.array(grid) - np.array(grid) % voxel
    size, inside = int(np.prod(voxel)), int(whole.prod())
    voxels = places[:inside].reshape(-1, size, 3)
    corners = voxels[:, 0]
    assert not (corners % voxel).any() and (np.diff(np.ravel_multi_index(corners.T, grid)) > 0).all()
    np.testing.assert_array_equal(voxels - corners[:, None], np.broadcast_to(list(np.ndindex(voxel)), voxels.shape))
    behind = (places[inside:] >= whole).argmax(-1)  # the first axis on which a token is behind the whole voxels
    assert (np.diff(behind) >= 0).all()
    for axis in range(3):
        assert (np.diff(order[inside:][behind == axis]) > 0).all()


def test_a_patch_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"patch \(4, 4\): expected 3 sides for the grid \(8, 8, 8\)"):
        patch_order((8, 8, 8), ((4, 4),))
