"""CLIP's text encoder: the tables of its two layouts, and its config from shapes.

"transformers" is diffusers' text_encoder/ of FLUX.1 and text_encoder_2/ of HunyuanVideo, clip_l.safetensors, and the file of a
whole CLIP, whose image encoder is left out; "transformers-5" is the same as transformers 5 writes it, without a prefix. Source:
transformers models/clip/modeling_clip.py, configuration_clip.py.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from chipmunk_jax.convert.naming import TRANSFORMERS, check_stated, count_layers, linear, measure, stated_size
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.clip import ClipTextConfig

HEAD_DIM = 64  # of every published CLIP; no tensor tells


def norm(source: str, target: str) -> list[Rule]:
    """A LayerNorm with weight and bias."""
    return [Rule((f"{source}.weight",), (target,)), Rule((f"{source}.bias",), (f"{target}_bias",))]


def table(prefix: str) -> tuple[Rule, ...]:
    """Rules of names with this prefix."""
    layer = f"{prefix}encoder.layers.*"
    return (
        Rule((f"{prefix}embeddings.token_embedding.weight",), ("token_embedding",)),
        Rule((f"{prefix}embeddings.position_embedding.weight",), ("position_embedding",)),
        *norm(f"{layer}.layer_norm1", "blocks.norm1"),
        *linear(tuple(f"{layer}.self_attn.{x}_proj" for x in "qkv"), "blocks.qkv"),
        *linear(f"{layer}.self_attn.out_proj", "blocks.proj"),
        *norm(f"{layer}.layer_norm2", "blocks.norm2"),
        *linear(f"{layer}.mlp.fc1", "blocks.fc1"),
        *linear(f"{layer}.mlp.fc2", "blocks.fc2"),
        *norm(f"{prefix}final_layer_norm", "final_norm"),
    )


def configure(prefix: str, shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> ClipTextConfig:
    """ClipTextConfig of a checkpoint.

    Args:
        prefix: of all names.
        shapes: of all tensors.
        stated: config.json of transformers; empty where there is none.

    Raises:
        InputError: the tensors are of no CLIP, or config.json says other than they or the network.
    """
    size = lambda *places: measure(shapes, tuple((f"{prefix}{name}", axis) for name, axis in places))
    layer = "encoder.layers.*"
    sizes = {
        "vocab_size": size(("embeddings.token_embedding.weight", 0)),
        "hidden_size": size(("final_layer_norm.weight", 0), (f"{layer}.layer_norm1.weight", 0)),
        "intermediate_size": size((f"{layer}.mlp.fc1.bias", 0)),
        "max_position_embeddings": size(("embeddings.position_embedding.weight", 0)),
    }
    layers, width = count_layers(shapes, f"{prefix}encoder.layers."), sizes["hidden_size"] or 1
    heads = stated_size(stated, ("num_attention_heads",), max(1, width // HEAD_DIM))
    if not layers or width % heads:
        raise InputError(f"no CLIP text encoder has width {width}, {layers} layers and {heads} heads")
    config = ClipTextConfig(
        # A size that no tensor tells belongs to a missing tensor, which the match will name.
        **{name: value or stated_size(stated, (name,), getattr(ClipTextConfig, name)) for name, value in sizes.items()},
        num_hidden_layers=layers,
        num_attention_heads=heads,
        # transformers leaves out fields that have its defaults; without a config.json it is a published CLIP-L.
        eos_token_id=stated_size(stated, ("eos_token_id",), 49_407 if stated else ClipTextConfig.eos_token_id),
    )
    network = {
        "num_attention_heads": heads,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "model_type": "clip_text_model",
        "architectures": ("CLIPTextModel",),
    }
    check_stated(stated, sizes | {"num_hidden_layers": layers}, TRANSFORMERS | network)
    return config


LAYOUTS = tuple(
    Layout(
        model="clip_text",
        class_name="CLIPTextModel",
        name=name,
        marks=(f"{prefix}embeddings.token_embedding.weight", f"{prefix}final_layer_norm.weight"),
        rules=table(prefix),
        configure=partial(configure, prefix),
        # Numbers from 0 on that PyTorch kept as a buffer; and what projects the pooled state, scales it, and encodes images.
        beside=rf"{re.escape(prefix)}embeddings\.position_ids|(text_projection|visual_projection|vision_model)\..+|logit_scale",
    )
    for name, prefix in (("transformers", "text_model."), ("transformers-5", ""))
)
