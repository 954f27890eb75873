"""Measures of likeness, in closed form."""

import math

import numpy as np
import pytest

from chipmunk_jax.quality import psnr, relative_l2

IMAGE = np.random.default_rng(0).random((2, 5, 7, 3)).astype(np.float32)


@pytest.mark.parametrize(("error", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.5, 6.020599913)])
def test_psnr_of_a_constant_error(error, expected):
    reference = np.zeros((3, 5, 3), np.float64)
    assert psnr(reference + error, reference) == pytest.approx(expected, abs=1e-8)  # float64 throughout
    assert psnr(reference, reference + error) == pytest.approx(expected, abs=1e-8)


def test_psnr_of_one_wrong_pixel():
    image = np.zeros((10, 10))
    image[3, 4] = 1
    assert psnr(image, np.zeros((10, 10))) == pytest.approx(20.0, abs=1e-9)  # a mean square of 1 / 100


def test_equal_images_have_an_infinite_psnr():
    assert psnr(IMAGE, IMAGE.copy()) == math.inf


def test_psnr_does_not_wrap_bytes_or_lose_small_errors():
    """Differences are taken in float64, whatever the dtype of the images."""
    assert psnr(np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)) == 0.0
    assert psnr(np.full(8, 1e-4, np.float16), np.zeros(8, np.float16)) == pytest.approx(80, abs=0.01)


def test_relative_l2_in_closed_form():
    assert relative_l2(IMAGE, IMAGE) == 0.0
    assert relative_l2(3 * IMAGE, IMAGE) == pytest.approx(2.0, rel=1e-7)  # 3 x rounds in float32
    assert relative_l2(np.float32([3, 4]), np.float32([0, 4])) == 0.75
