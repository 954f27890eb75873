"""Inputs of test_perceptual.py, and of the script that made its golden numbers."""

import numpy as np

WIDTHS = (
    8,
    8,
    12,
    12,
    16,
    16,
    20,
    20,
    20,
    24,
    24,
    24,
    28,
    28,
    28,
    28,
    32,
)  # channels after the stem and after each block
KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)


def narrow_weights() -> dict[str, np.ndarray]:
    """A random network of EfficientNet-Lite0's shape with few channels, f32."""
    rng, weights = np.random.default_rng(0), {}

    def layer(prefix: str, name: str, norm: str, outputs: int, inputs: int, size: int):
        shape = (outputs, inputs, size, size)
        weights[f"{prefix}{name}.weight"] = rng.standard_normal(shape) * (inputs * size * size) ** -0.5
        for part, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            weights[f"{prefix}{norm}.{part}"] = least + rng.random(outputs)

    layer("", "_conv_stem", "_bn0", WIDTHS[0], 3, 3)
    for block, (inputs, outputs, size) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], KERNELS, strict=True)):
        prefix, wide = f"_blocks.{block}.", inputs if block == 0 else 2 * inputs
        if block:
            layer(prefix, "_expand_conv", "_bn0", wide, inputs, 1)
        layer(prefix, "_depthwise_conv", "_bn1", wide, 1, size)
        layer(prefix, "_project_conv", "_bn2", outputs, wide, 1)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture [20, 28, 3] in 0..1, the same with some noise, and another, f32."""
    y, x, c = np.mgrid[:20, :28, :3]
    one = 0.5 + 0.4 * np.sin(0.4 * x + 0.9 * c) * np.cos(0.3 * y)
    noisy = one + 0.05 * np.random.default_rng(1).standard_normal(one.shape)
    other = 0.5 + 0.4 * np.sin(0.2 * x * y + c)
    return tuple(a.clip(0, 1).astype(np.float32) for a in (one, noisy, other))
