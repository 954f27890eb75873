"""Sheets of dense and sparse samples beside each other."""

import numpy as np

from chipmunk_jax.report import compare_frames, compare_images, compare_videos


def test_comparisons_show_every_frame_as_an_image_and_some_on_a_sheet():
    dense, sparse, rival = np.random.default_rng(0).random((3, 2, 9, 8, 4, 3))
    ways = {"dense": dense, "sparse": sparse, "4 of 8 steps": rival}
    given = ["one", "two"], ways, {"sparse": [30.0, 31.0], "4 of 8 steps": [32.0, 33.0]}
    film = compare_videos(*given)
    assert len(film) == 9
    at = {name: clips[:, 7] for name, clips in ways.items()}
    np.testing.assert_array_equal(film[7], compare_images(given[0], at, given[2]))
    sheet = compare_frames(*given)
    tall, wide = 3 * 8 + 40, 3 * 4 + 8  # a picture and its margins
    assert sheet.shape == (8 * tall + 24, 6 * wide + 8, 3)  # six frames, four rows a clip: the ways and the difference
    zoomed = np.repeat(np.repeat(np.round(255 * rival[1, 8]) / 255, 3, 0), 3, 1)
    top, left = 24 + 6 * tall + 16, 8 + 5 * wide  # the last shown frame of the second clip by the rival
    np.testing.assert_array_equal(sheet[top : top + 24, left : left + 12], zoomed)
