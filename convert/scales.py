"""float8 checkpoints with scales beside their weights: weight = stored * scale."""

import re
from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.convert.safetensors import Tensor, Weights
from chipmunk_jax.errors import InputError, listed

SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)")
# Scales of activations, which are never float8 here, and marks of the format.
UNUSED = re.compile(r"(?:.+\.)?(?:scale_input|input_scale|comfy_quant|scaled_fp8)")


def drop_marks(weights: Weights) -> Weights:
    """Weights without what says of float8 only how to compute with it; such a mark may lack the prefix of all other names."""
    kept = {name: tensor for name, tensor in weights.tensors.items() if not UNUSED.fullmatch(name)}
    return replace(weights, tensors=kept)


def attach_scales(weights: Weights) -> Weights:
    """Weights in which every scale is a part of the tensor that it scales; float8 without scales stays as it is.

    Raises:
        InputError: a scale without its weight, of a wrong shape, no positive number, or of a weight that is no float8; float8 whose
            scale is missing.
    """
    tensors = {**weights.tensors, **scales_beside(weights)}
    scales = {name: found[1] for name in tensors if (found := SCALE.fullmatch(name))}
    for name, layer in scales.items():
        scale = tensors.pop(name)
        weight = next((key for key in (f"{layer}.weight", layer) if key in tensors), None)
        fault = misfit(scale, tensors.get(weight))
        if fault:
            raise InputError(
                f"{weights.path}: {name} {list(scale.shape)} {scale.dtype} is the scale of {weight or layer}, {fault}"
            )
        tensors[weight] = replace(tensors[weight], scale=scale)
    check_scaled(weights, tensors)
    return replace(weights, tensors=tensors)


def misfit(scale: Tensor, weight: Tensor | None) -> str:
    """Why a scale does not fit its weight; empty where it does."""
    if weight is None:
        return "which is not there"
    if not is_float8(weight):
        return f"which is {weight.dtype}, expected float8"
    if weight.scale is not None:
        return "which has another scale"
    rows = weight.shape[:1]
    if scale.size != 1 and scale.shape not in (rows, (*rows, *(1,) * (len(weight.shape) - 1))):
        return f"which is {list(weight.shape)}, expected one number or one a row"
    if is_float8(scale) or not jnp.issubdtype(scale.dtype, jnp.floating):
        return "expected floats"
    values = scale.read().astype(np.float32)
    return "" if np.all((values > 0) & (values < np.inf)) else "expected finite numbers above 0"


def scales_beside(weights: Weights) -> dict[str, Tensor]:
    """The scales of HunyuanVideo's fp8 release, which are in a file of their own: layer -> factor."""
    stored = next((tensor for tensor in weights.tensors.values() if is_float8(tensor)), None)
    if not weights.pickled or stored is None:
        return {}
    file = stored.file.with_name(f"{stored.file.stem}_map{stored.file.suffix}")
    if not file.is_file():
        return {}
    return {f"{layer}.scale_weight": scale for layer, scale in read_weights(file).tensors.items()}


def check_scaled(weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError where a float8 tensor has lost its scale.

    In a file of torch.save every one has a scale. In .safetensors, float8 is a plain cast of the weights unless there are scales,
    and then every linear layer has one: a bias has none.
    """
    bare = [name for name, tensor in tensors.items() if is_float8(tensor) and tensor.scale is None]
    if weights.pickled and bare:
        raise InputError(
            f"{weights.path}: {bare[0]} is {tensors[bare[0]].dtype.name}, one of {len(bare)} such tensors whose scales are not in "
            "the file (HunyuanVideo's are in its _map.pt, expected beside it): expected them, or the checkpoint in bfloat16"
        )
    lost = [name for name in bare if len(tensors[name].shape) == 2]
    if lost and any(tensor.scale is not None for tensor in tensors.values()):
        raise InputError(
            f"{weights.path}: {len(lost)} float8 weights without a scale, which others have: {listed(lost)}"
        )


def is_float8(tensor: Tensor) -> bool:
    """Whether the tensor is stored in eight bits."""
    return tensor.dtype.name.startswith("float8")
