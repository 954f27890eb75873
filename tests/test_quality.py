"""Measures of likeness, in closed form."""

import math

import numpy as np
import pytest

from chipmunk_jax.errors import InputError
from chipmunk_jax.quality import psnr, relative_l2, ssim

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


def picture(height, width, noise):
    y, x, c = np.mgrid[:height, :width, :3]
    clean = 0.5 + 0.3 * np.sin(0.4 * x + 0.7 * c) * np.cos(0.25 * y)
    return clean, np.clip(clean + noise * np.sin(1.7 * x * y + c), 0, 1)


# structural_similarity of skimage 0.26.0 with data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5 and
# use_sample_covariance=False.
SKIMAGE = {(16, 21, 0.02): 0.985740, (40, 33, 0.1): 0.760736, (11, 13, 0.4): 0.177668}


@pytest.mark.parametrize(("size", "expected"), SKIMAGE.items(), ids=str)
def test_ssim_is_that_of_skimage(size, expected):
    assert ssim(*picture(*size)) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_a_video_is_the_mean_over_its_frames():
    frames = [picture(16, 21, noise) for noise in (0.02, 0.1, 0.4)]
    one, other = map(np.stack, zip(*frames, strict=True))
    assert ssim(one, other) == pytest.approx(0.628850, abs=1e-6)  # of skimage, frame by frame
    assert ssim(one, one) == 1.0


def test_frames_smaller_than_the_window_have_no_ssim():
    with pytest.raises(InputError, match="8 x 21 pixels: SSIM needs at least 11 along each side"):
        ssim(*picture(8, 21, 0.1))
