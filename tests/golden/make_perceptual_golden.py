"""Distances between the features of EfficientNet-Lite0 as PyTorch computes them, for tests/test_perceptual.py; prints them.

usage: python make_perceptual_golden.py [WEIGHTS.pth]        needs torch; without a file, the narrow random network of the test
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_perceptual import narrow_weights, pictures

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]


def convolve(x, weight, stride=1):
    """As TensorFlow pads: what is odd at the end."""
    size = weight.shape[-1]
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[:1:-1]]
    x = F.pad(x, [side for both in total for side in (both // 2, both - both // 2)])
    return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])


def norm(p, name, x):
    values = (p[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *values, eps=1e-3)


def features(p, image):
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    x = F.relu6(norm(p, "_bn0", convolve((255 * x - 127) / 128, p["_conv_stem.weight"], 2)))
    for i, stride in enumerate(STRIDES):
        q, y = f"_blocks.{i}.", x
        if q + "_expand_conv.weight" in p:
            y = F.relu6(norm(p, q + "_bn0", convolve(y, p[q + "_expand_conv.weight"])))
        y = F.relu6(norm(p, q + "_bn1", convolve(y, p[q + "_depthwise_conv.weight"], stride)))
        y = norm(p, q + "_bn2", convolve(y, p[q + "_project_conv.weight"]))
        x = x + y if stride == 1 and x.shape == y.shape else y
        if i in (0, 2, 4, 10, 15):
            yield F.normalize(x, dim=1)


p = torch.load(sys.argv[1]) if sys.argv[1:] else {n: torch.from_numpy(a) for n, a in narrow_weights().items()}
first, *others = pictures()
for other in others:
    taps = zip(features(p, first), features(p, other), strict=True)
    print(f"{sum((a - b).square().sum(1).mean().item() for a, b in taps) / 5:.6f}")
