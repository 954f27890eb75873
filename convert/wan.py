"""Wan2.1: the tables of its two layouts, and its config from shapes.

"original" is the release of the Wan team (safetensors), "diffusers" the transformer/ folder of the Hugging Face repository.
Sources: Wan-Video/Wan2.1 wan/modules/model.py; diffusers scripts/convert_wan_to_diffusers.py.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from chipmunk_jax.convert.naming import count_layers, linear, measure, mlp
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.wan import WanConfig


def patches(weight: np.ndarray) -> np.ndarray:
    """A convolution [D, C, 1, p, p] over patches that do not overlap, as a linear layer [D, (row, column, channel)]."""
    return weight.transpose(0, 2, 3, 4, 1).reshape(len(weight), -1)


def table(names: dict[str, str], qkv: dict[str, tuple[str, ...]], image_norms: dict[str, str]) -> tuple[Rule, ...]:
    """Rules from the names of a layout."""
    n = names
    return (
        Rule((f"{n['patch']}.weight",), ("patch_in.kernel.T",), transform=patches),
        Rule((f"{n['patch']}.bias",), ("patch_in.bias",)),
        *linear(n["text"] + n["text_1"], "text_in"),
        *linear(n["text"] + n["text_2"], "text_out"),
        *linear(n["time"] + n["time_1"], "time_in.in_layer"),
        *linear(n["time"] + n["time_2"], "time_in.out_layer"),
        *linear(n["projection"], "time_projection"),
        *linear(n["image"] + n["image_1"], "image_in.fc1"),
        *linear(n["image"] + n["image_2"], "image_in.fc2"),
        *(
            Rule((f"{n['image']}{theirs}.{kind}",), (f"image_in.{ours}.{mine}",))
            for ours, theirs in image_norms.items()
            for kind, mine in (("weight", "scale"), ("bias", "bias"))
        ),
        Rule((n["final"],), ("final",), transform=np.squeeze),
        *linear(n["head"], "head"),
        Rule((f"blocks.*.{n['modulation']}",), ("blocks.modulation",), transform=np.squeeze),
        *(
            rule
            for ours, theirs in qkv.items()
            for rule in linear(tuple(f"blocks.*.{x}" for x in theirs), f"blocks.{ours}")
        ),
        *(Rule((f"blocks.*.{n[ours]}.weight",), (f"blocks.qkv.{ours}",)) for ours in ("query_norm", "key_norm")),
        *(
            Rule((f"blocks.*.{n[ours]}.weight",), (f"blocks.{ours}",))
            for ours in ("cross_norm", "cross_query_norm", "cross_key_norm", "image_key_norm")
        ),
        Rule((f"blocks.*.{n['cross_norm']}.bias",), ("blocks.cross_norm_bias",)),
        *mlp(f"blocks.*.{n['fc1']}", f"blocks.*.{n['fc2']}", "blocks.mlp"),
    )


def attentions(
    own: str, cross: str, q: str, k: str, v: str, out: str, image_k: str, image_v: str
) -> dict[str, tuple[str, ...]]:
    """Linear layers of both attentions: ours -> theirs, several beside one another as one."""
    return {
        "qkv.linear": (f"{own}.{q}", f"{own}.{k}", f"{own}.{v}"),
        "proj": (f"{own}.{out}",),
        "cross_q": (f"{cross}.{q}",),
        "cross_kv": (f"{cross}.{k}", f"{cross}.{v}"),
        "cross_proj": (f"{cross}.{out}",),
        "image_kv": (f"{cross}.{image_k}", f"{cross}.{image_v}"),
    }


ORIGINAL_NAMES = {
    "patch": "patch_embedding", "text": "text_embedding.", "text_1": "0", "text_2": "2",
    "time": "time_embedding.", "time_1": "0", "time_2": "2", "projection": "time_projection.1",
    "image": "img_emb.proj.", "image_1": "1", "image_2": "3", "final": "head.modulation", "head": "head.head",
    "modulation": "modulation", "query_norm": "self_attn.norm_q", "key_norm": "self_attn.norm_k",
    "cross_norm": "norm3", "cross_query_norm": "cross_attn.norm_q", "cross_key_norm": "cross_attn.norm_k",
    "image_key_norm": "cross_attn.norm_k_img", "fc1": "ffn.0", "fc2": "ffn.2",
}  # fmt: skip
DIFFUSERS_NAMES = {
    "patch": "patch_embedding", "text": "condition_embedder.text_embedder.", "text_1": "linear_1", "text_2": "linear_2",
    "time": "condition_embedder.time_embedder.", "time_1": "linear_1", "time_2": "linear_2",
    "projection": "condition_embedder.time_proj", "image": "condition_embedder.image_embedder.",
    "image_1": "ff.net.0.proj", "image_2": "ff.net.2", "final": "scale_shift_table", "head": "proj_out",
    "modulation": "scale_shift_table", "query_norm": "attn1.norm_q", "key_norm": "attn1.norm_k",
    "cross_norm": "norm2", "cross_query_norm": "attn2.norm_q", "cross_key_norm": "attn2.norm_k",
    "image_key_norm": "attn2.norm_added_k", "fc1": "ffn.net.0.proj", "fc2": "ffn.net.2",
}  # fmt: skip
ORIGINAL = table(
    ORIGINAL_NAMES,
    attentions("self_attn", "cross_attn", "q", "k", "v", "o", "k_img", "v_img"),
    {"norm_in": "0", "norm_out": "4"},
)
DIFFUSERS = table(
    DIFFUSERS_NAMES,
    attentions("attn1", "attn2", "to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    {"norm_in": "norm1", "norm_out": "norm2"},
)
HEAD_DIM = 128  # of every published model; no tensor tells


def configure(n: dict[str, str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> WanConfig:
    """WanConfig of a checkpoint.

    Args:
        n: names of the layout.
        shapes: of all tensors.
        stated: config.json, of diffusers or of the original; empty where there is none.

    Raises:
        InputError: the tensors are of no Wan model.
    """
    size = lambda name, axis: measure(shapes, ((name, axis),)) or 1  # a missing tensor is named by the match
    dim, layers = size(f"{n['patch']}.bias", 0), count_layers(shapes, "blocks.")
    patch = tuple(size(f"{n['patch']}.weight", axis) for axis in (2, 3, 4))
    heads = stated.get("num_attention_heads", stated.get("num_heads", dim // HEAD_DIM))
    if not layers or not isinstance(heads, int) or heads < 1 or dim % heads:
        raise InputError(f"no Wan model has width {dim}, {layers} blocks and {heads} heads, as the tensors say")
    return WanConfig(
        dim=dim,
        ffn_dim=size(f"blocks.*.{n['fc1']}.bias", 0),
        freq_dim=size(f"{n['time']}{n['time_1']}.weight", 1),
        in_dim=size(f"{n['patch']}.weight", 1),
        out_dim=max(1, size(f"{n['head']}.bias", 0) // math.prod(patch)),
        patch_size=patch,
        text_dim=size(f"{n['text']}{n['text_1']}.weight", 1),
        num_heads=heads,
        num_layers=layers,
        image_dim=measure(shapes, ((f"{n['image']}{n['image_1']}.weight", 1),)),
    )


LAYOUTS = (
    Layout(
        model="wan",
        class_name="WanModel",
        name="original",
        marks=("time_projection.1.weight", "blocks.0.self_attn.q.weight"),
        rules=ORIGINAL,
        configure=partial(configure, ORIGINAL_NAMES),
    ),
    Layout(
        model="wan",
        class_name="WanTransformer3DModel",
        name="diffusers",
        marks=("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        rules=DIFFUSERS,
        configure=partial(configure, DIFFUSERS_NAMES),
    ),
)
