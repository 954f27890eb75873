"""Wan2.1: the tables of its two layouts, and its config from shapes.

"original" is the release of the Wan team (safetensors), "diffusers" the transformer/ folder of the Hugging Face repository.
Sources: Wan-Video/Wan2.1 wan/modules/model.py; diffusers scripts/convert_wan_to_diffusers.py.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from chipmunk_jax.convert.naming import (
    ANY,
    OneOf,
    check_stated,
    count_layers,
    linear,
    measure,
    mlp,
    patches_of,
    stated_size,
    stated_sizes,
)
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
THEIRS = {"in_dim": ("in_channels",), "out_dim": ("out_channels",)}  # our field -> diffusers'
LATENTS = (16, 48)  # channels of the VAEs of Wan2.1 and of Wan2.2's 5B
HEAD_DIM = 128  # of every published model; no tensor tells


def configure(n: dict[str, str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> WanConfig:
    """WanConfig of a checkpoint.

    Args:
        n: names of the layout.
        shapes: of all tensors.
        stated: config.json, of diffusers or of the original; empty where there is none.

    Raises:
        InputError: the tensors are of no Wan model, or config.json says other than they or the network.
    """
    size = lambda name, axis: measure(shapes, ((name, axis),))
    width = ((f"{n['patch']}.bias", 0), (f"blocks.*.{n['fc2']}.bias", 0))
    dim, layers = measure(shapes, width) or 1, count_layers(shapes, "blocks.")
    heads = stated_size(stated, ("num_attention_heads", "num_heads"), max(1, dim // HEAD_DIM))
    if not layers or dim % heads:
        raise InputError(f"no Wan model has width {dim}, {layers} blocks and {heads} heads")
    stated_patch = stated_sizes(stated, ("patch_size",), WanConfig.patch_size)
    in_dim, patch = patches_of(f"{n['patch']}.weight", shapes, stated_patch)
    head = size(f"{n['head']}.bias", 0)
    out_dim = head and max(1, head // math.prod(patch))
    check_channels(in_dim, out_dim)
    sizes = {
        "ffn_dim": size(f"blocks.*.{n['fc1']}.bias", 0),
        "freq_dim": size(f"{n['time']}{n['time_1']}.weight", 1),
        "in_dim": in_dim,
        "out_dim": out_dim,
        "text_dim": size(f"{n['text']}{n['text_1']}.weight", 1),
    }
    config = WanConfig(
        # A size that no tensor tells belongs to a missing tensor, which the match will name.
        **{
            name: value or stated_size(stated, (name, *THEIRS.get(name, ())), out_dim or 1)
            for name, value in sizes.items()
        },
        dim=dim,
        patch_size=patch,
        num_heads=heads,
        num_layers=layers,
        image_dim=size(f"{n['image']}{n['image_1']}.weight", 1),
    )
    check_stated(stated, sizes | stated_sizes_of(config, sizes), stated_network(config))
    return config


def check_channels(in_dim: int | None, out_dim: int | None) -> None:
    """Raises InputError where a network takes more than a video, or other than a video, an image and the four masks of a token."""
    if in_dim and out_dim:
        image = 2 * out_dim + 4
        if in_dim not in ((out_dim, image) if out_dim in LATENTS else range(image + 1)):
            raise InputError(
                f"a Wan model of {in_dim} channels in and {out_dim} out, as one that takes other videos: expected {out_dim} in, "
                f"from text to video, or {image}, from image to video"
            )


def stated_sizes_of(config: WanConfig, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """What config.json says of the tensors, under the original's names and diffusers', but for `sizes` themselves."""
    c = config
    return {
        "dim": c.dim,
        "num_heads": c.num_heads,
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_dim,
        "num_layers": c.num_layers,
        "patch_size": c.patch_size,
        **{name: sizes[ours] for ours, names in THEIRS.items() for name in names},
        "image_dim": OneOf((c.image_dim,)),
        "added_kv_proj_dim": OneOf((c.image_dim and c.dim,)),
        "model_type": OneOf(("i2v",) if c.in_dim > c.out_dim else ("t2v", "ti2v")),
    }


def stated_network(config: WanConfig) -> dict[str, Any]:
    """What config.json says that no tensor tells, and every Wan network computes with."""
    return {
        "eps": 1e-6,
        "qk_norm": OneOf(("rms_norm_across_heads", True)),
        "cross_attn_norm": True,
        "window_size": (-1, -1),
        "rope_theta": float(config.theta),
        "pos_embed_seq_len": OneOf((None,)),
        "text_len": 512 if config.text_rows[1] else ANY,
        "rope_max_seq_len": ANY,  # of a table of angles: ours has as many as there are positions
    }


def views(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """The patch embedding, the same name in both layouts, as the convolution that it may be a matrix of."""
    return {"patch_embedding.weight": (config.dim, config.in_dim, *config.patch_size)}


LAYOUTS = (
    Layout(
        model="wan",
        class_name="WanModel",
        name="original",
        marks=("time_projection.1.weight", "blocks.0.self_attn.q.weight"),
        rules=ORIGINAL,
        configure=partial(configure, ORIGINAL_NAMES),
        views=views,
    ),
    Layout(
        model="wan",
        class_name="WanTransformer3DModel",
        name="diffusers",
        marks=("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
        rules=DIFFUSERS,
        configure=partial(configure, DIFFUSERS_NAMES),
        views=views,
    ),
)
