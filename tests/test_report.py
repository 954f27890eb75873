"""Sheets of dense and sparse samples beside each other."""

import numpy as np

from chipmunk_jax.report import compare_frames, compare_images, compare_videos


def test_comparisons_show_every_frame_as_an_image_and_some_on_a_sheet():
    dense, sparse = np.random.default_rng(0).random((2, 2, 9, 8, 4, 3))
    captions = ["one", "two"]
    film = compare_videos(captions, dense, sparse)
    assert len(film) == 9
    np.testing.assert_array_equal(film[7], compare_images(captions, dense[:, 7], sparse[:, 7]))
    sheet = compare_frames(captions, dense, sparse)
    assert sheet.shape == (6 * (3 * 8 + 24) + 24, 6 * (3 * 4 + 8) + 8, 3)  # six frames, three rows a clip
    zoomed = np.repeat(np.repeat(np.round(255 * sparse[1, 8]) / 255, 3, 0), 3, 1)
    top, left = 24 + 4 * 48, 8 + 5 * 20  # the last shown frame of the second clip
    np.testing.assert_array_equal(sheet[top : top + 24, left : left + 12], zoomed)
