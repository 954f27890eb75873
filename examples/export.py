"""Trained weights and their vocabulary as diffusers reads them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from procgen_shapes import save_vocabulary
from safetensors.numpy import save_file

SHARD_BYTES = 9_000_000  # small files travel better


def write_checkpoint(tensors: dict[str, np.ndarray], config: dict[str, Any], out: Path) -> None:
    """Write tensors in bf16, config.json and the vocabulary, for from_pretrained of the class that config names."""
    tensors = {name: np.asarray(array, jnp.bfloat16) for name, array in tensors.items()}
    shards, room = [], 0
    for name in sorted(tensors):
        if tensors[name].nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = np.ascontiguousarray(tensors[name])
        room -= tensors[name].nbytes
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (out / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_vocabulary(out)


def linear(name: str, layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer {"kernel": [in, out], "bias": [out]} as PyTorch's Linear of that name."""
    return {f"{name}.weight": layer["kernel"].T, f"{name}.bias": layer["bias"]}


def linears(names: tuple[str, ...], layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer of several side by side as PyTorch's Linears of these names."""
    kernels, biases = (np.split(layer[part], len(names), axis=-1) for part in ("kernel", "bias"))
    tensors = {}
    for name, kernel, bias in zip(names, kernels, biases, strict=True):
        tensors |= linear(name, {"kernel": kernel, "bias": bias})
    return tensors
