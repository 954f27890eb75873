"""How near a sample is to the one it should equal."""

import numpy as np

from chipmunk_jax.errors import InputError

TAPS, DEVIATION = 11, 1.5  # pixels, of the Gaussian of SSIM
STABILISERS = 0.01**2, 0.03**2  # of SSIM, for values in [0, 1]


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images of any shape with values in [0, 1]; inf where they are equal."""
    error = np.mean(np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity, 1 where equal, of images [H, W, C] or videos [T, H, W, C] in [0, 1]; mean of frames and channels.

    Wang et al., "Image quality assessment", IEEE TIP 2004: a Gaussian window of 11 taps, wherever all of it lies in the frame.

    Raises:
        InputError: frames smaller than the window.
    """
    x, y = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    check_window(*x.shape[-3:-1])
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    light, contrast = STABILISERS
    likeness = (2 * mean_x * mean_y + light) / (mean_x**2 + mean_y**2 + light)
    return float(np.mean(likeness * (2 * covariance + contrast) / (variance_x + variance_y + contrast)))


def check_window(height: int, width: int) -> None:
    """Raises InputError where frames of so many pixels are smaller than the window of ssim()."""
    if min(height, width) < TAPS:
        raise InputError(f"{height} x {width} pixels: SSIM needs at least {TAPS} along each side")


def _blurred(x: np.ndarray) -> np.ndarray:
    """Means under the window, [.., H - 10, W - 10, C]."""
    weights = np.exp(-0.5 * (np.arange(TAPS) - TAPS // 2) ** 2 / DEVIATION**2)
    weights /= weights.sum()
    for axis in (-3, -2):
        length = x.shape[axis] - TAPS + 1
        x = sum(weight * np.take(x, range(tap, tap + length), axis) for tap, weight in enumerate(weights))
    return x


def relative_l2(x: np.ndarray, reference: np.ndarray) -> float:
    """|x - reference| / |reference|."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
