"""How near a sample is to the one it should equal."""

import numpy as np


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images of any shape with values in [0, 1]; inf where they are equal."""
    error = np.mean(np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def relative_l2(x: np.ndarray, reference: np.ndarray) -> float:
    """|x - reference| / |reference|."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
