"""HunyuanVideo: the tables of its three layouts, and its config from shapes.

"original" is Tencent's release (mp_rank_00_model_states.pt), "comfyui" the same in the names of FLUX as ComfyUI writes it,
"diffusers" the transformer/ folder of the Hugging Face repository. Sources: Tencent-Hunyuan/HunyuanVideo
hyvideo/modules/models.py, token_refiner.py; ComfyUI comfy/supported_models.py, comfy/ldm/hunyuan_video/model.py; diffusers
scripts/convert_hunyuan_video_to_diffusers.py.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from chipmunk_jax.convert.flux import DIFFUSERS_BLOCKS, rotary_axes, single_output, stated_blocks
from chipmunk_jax.convert.naming import (
    OneOf,
    check_stated,
    count_layers,
    linear,
    measure,
    mlp,
    patches_of,
    stated_number,
    stated_size,
)
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.hunyuan_video import HunyuanVideoConfig


def patches(weight: np.ndarray) -> np.ndarray:
    """A convolution [D, C, 1, p, p] over patches that do not overlap, as a linear layer [D, (channel, frame, row, column)]."""
    return weight.reshape(len(weight), -1)


def embedders(names: dict[str, tuple[str, str]]) -> list[Rule]:
    """Rules of every embedder: ours -> its two linear layers."""
    return [
        rule
        for ours, layers in names.items()
        for layer, theirs in zip(("in_layer", "out_layer"), layers, strict=True)
        for rule in linear(theirs, f"{ours}.{layer}")
    ]


def refiner(source: str, qkv: tuple[str, ...], proj: str, fc1: str, fc2: str, modulation: str) -> list[Rule]:
    """The blocks of the token refiner."""
    target, layers = "txt_in.blocks", {"proj": proj, "fc1": fc1, "fc2": fc2, "modulation.linear": modulation}
    return [
        *linear(tuple(f"{source}.{name}" for name in qkv), f"{target}.qkv"),
        *(rule for ours, theirs in layers.items() for rule in linear(f"{source}.{theirs}", f"{target}.{ours}")),
        *(
            Rule((f"{source}.{norm}.{kind}",), (f"{target}.{norm}{mine}",))
            for norm in ("norm1", "norm2")
            for kind, mine in (("weight", ""), ("bias", "_bias"))
        ),
    ]


def original_stream(name: str) -> list[Rule]:
    """One modality of the double blocks: "img" or "txt"."""
    source, target = f"double_blocks.*.{name}", f"double_blocks.{name}"
    return [
        *linear(f"{source}_mod.linear", f"{target}.modulation.linear"),
        *linear(f"{source}_attn_qkv", f"{target}.attention.linear"),
        Rule((f"{source}_attn_q_norm.weight",), (f"{target}.attention.query_norm",)),
        Rule((f"{source}_attn_k_norm.weight",), (f"{target}.attention.key_norm",)),
        *linear(f"{source}_attn_proj", f"{target}.proj"),
        *mlp(f"{source}_mlp.fc1", f"{source}_mlp.fc2", f"{target}.mlp"),
    ]


ORIGINAL_EMBEDDERS = {
    "time_in": ("time_in.mlp.0", "time_in.mlp.2"),
    "guidance_in": ("guidance_in.mlp.0", "guidance_in.mlp.2"),
    "vector_in": ("vector_in.in_layer", "vector_in.out_layer"),
    "txt_in.time_in": ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2"),
    "txt_in.mean_in": ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"),
}
DIFFUSERS_EMBEDDERS = {
    ours: (f"{theirs}.linear_1", f"{theirs}.linear_2")
    for ours, theirs in {
        "time_in": "time_text_embed.timestep_embedder",
        "guidance_in": "time_text_embed.guidance_embedder",
        "vector_in": "time_text_embed.text_embedder",
        "txt_in.time_in": "context_embedder.time_text_embed.timestep_embedder",
        "txt_in.mean_in": "context_embedder.time_text_embed.text_embedder",
    }.items()
}
ORIGINAL_NAMES = {
    "patch": "img_in.proj", "text": "txt_in.input_embedder", "pooled": "vector_in.in_layer", "guidance": "guidance_in.",
    "refiner": "txt_in.individual_token_refiner.blocks.", "double": "double_blocks.", "single": "single_blocks.",
    "fc1": "img_mlp.fc1", "fc2": "img_mlp.fc2", "norm": "img_attn_k_norm.weight", "out": "final_layer.linear",
}  # fmt: skip
DIFFUSERS_NAMES = {
    "patch": "x_embedder.proj", "text": "context_embedder.proj_in", "pooled": "time_text_embed.text_embedder.linear_1",
    "guidance": "time_text_embed.guidance_embedder.", "refiner": "context_embedder.token_refiner.refiner_blocks.",
    "double": "transformer_blocks.", "single": "single_transformer_blocks.",
    "fc1": "ff.net.0.proj", "fc2": "ff.net.2", "norm": "attn.norm_k.weight", "out": "proj_out",
}  # fmt: skip

ORIGINAL = (
    Rule(("img_in.proj.weight",), ("img_in.kernel.T",), transform=patches),
    Rule(("img_in.proj.bias",), ("img_in.bias",)),
    *linear("txt_in.input_embedder", "txt_in.linear"),
    *embedders(ORIGINAL_EMBEDDERS),
    *refiner(
        f"{ORIGINAL_NAMES['refiner']}*",
        ("self_attn_qkv",),
        "self_attn_proj",
        "mlp.fc1",
        "mlp.fc2",
        "adaLN_modulation.1",
    ),
    *original_stream("img"),
    *original_stream("txt"),
    *linear("single_blocks.*.modulation.linear", "single_blocks.modulation.linear"),
    Rule(("single_blocks.*.linear1.weight",), ("single_blocks.qkv.linear.kernel.T", "single_blocks.mlp.fc1")),
    Rule(("single_blocks.*.linear1.bias",), ("single_blocks.qkv.linear.bias", "single_blocks.mlp.b1")),
    Rule(("single_blocks.*.q_norm.weight",), ("single_blocks.qkv.query_norm",)),
    Rule(("single_blocks.*.k_norm.weight",), ("single_blocks.qkv.key_norm",)),
    *single_output("single_blocks.*.linear2"),
    *linear("final_layer.adaLN_modulation.1", "final.linear"),
    *linear("final_layer.linear", "img_out"),
)
# What ComfyUI writes in place of a part of the original's names, in this order.
COMFYUI_PARTS = {
    "_in.mlp.0": "_in.in_layer", "_in.mlp.2": "_in.out_layer",
    "t_embedder.mlp.0": "t_embedder.in_layer", "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer", "c_embedder.linear_2": "c_embedder.out_layer",
    "_mod.linear": "_mod.lin", ".modulation.linear": ".modulation.lin", "_attn_qkv": "_attn.qkv", "_attn_proj": "_attn.proj",
    "_attn_q_norm.weight": "_attn.norm.query_norm.scale", "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
    ".q_norm.weight": ".norm.query_norm.scale", ".k_norm.weight": ".norm.key_norm.scale",
    "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
}  # fmt: skip


def comfyui(name: str) -> str:
    """ComfyUI's name of what the original calls `name`."""
    for part, theirs in COMFYUI_PARTS.items():
        name = name.replace(part, theirs)
    return name


COMFYUI = tuple(replace(rule, sources=tuple(map(comfyui, rule.sources))) for rule in ORIGINAL)
COMFYUI_NAMES = {part: comfyui(name) for part, name in ORIGINAL_NAMES.items()}
DIFFUSERS = (
    Rule(("x_embedder.proj.weight",), ("img_in.kernel.T",), transform=patches),
    Rule(("x_embedder.proj.bias",), ("img_in.bias",)),
    *linear("context_embedder.proj_in", "txt_in.linear"),
    *embedders(DIFFUSERS_EMBEDDERS),
    *refiner(
        f"{DIFFUSERS_NAMES['refiner']}*",
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "norm_out.linear",
    ),
    *DIFFUSERS_BLOCKS,
)


def configure(
    n: dict[str, str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]
) -> HunyuanVideoConfig:
    """HunyuanVideoConfig of a checkpoint.

    The release from image to video with 16 channels has the tensors of the one from text to video: in the original layout, which
    has no config.json, nothing tells it.

    Args:
        n: names of the layout.
        shapes: of all tensors.
        stated: diffusers' config.json; empty where there is none.

    Raises:
        InputError: the tensors are of no HunyuanVideo model, or of one from image to video, or config.json says other than they.
    """
    size = lambda *places: measure(shapes, places)
    double = lambda name: f"{n['double']}*.{n[name]}"
    width = size((f"{n['patch']}.bias", 0), (f"{double('fc2')}.bias", 0)) or 1
    mlp_width, head_dim = size((f"{double('fc1')}.bias", 0)) or 1, size((double("norm"), 0)) or 1
    depth, depth_single, refiner_depth = (count_layers(shapes, n[name]) for name in ("double", "single", "refiner"))
    if not (depth and depth_single and refiner_depth) or width % head_dim:
        raise InputError(
            f"no HunyuanVideo model has width {width}, head width {head_dim}, {depth} double, {depth_single} single and "
            f"{refiner_depth} refiner blocks, as the tensors say"
        )
    side = stated_size(stated, ("patch_size",), HunyuanVideoConfig.patch_size[1])
    stated_patch = (stated_size(stated, ("patch_size_t",), HunyuanVideoConfig.patch_size[0]), side, side)
    channels, patch = patches_of(f"{n['patch']}.weight", shapes, stated_patch)
    out = size((f"{n['out']}.bias", 0))
    if channels and out not in (None, channels * math.prod(patch)):
        raise InputError(
            f"a HunyuanVideo model of {channels} latent channels in and {out // math.prod(patch)} out, as from image to video: "
            "expected one from text to video"
        )
    sizes = {
        "in_channels": channels,
        "pooled_projection_dim": size((f"{n['pooled']}.weight", 1)),
        "text_embed_dim": size((f"{n['text']}.weight", 1)),
    }
    # A size that no tensor tells belongs to a missing tensor, which the match will name.
    told = {name: value or stated_size(stated, (name,), 1) for name, value in sizes.items()}
    config = HunyuanVideoConfig(
        in_channels=told["in_channels"],
        patch_size=patch,
        vec_in_dim=told["pooled_projection_dim"],
        context_in_dim=told["text_embed_dim"],
        hidden_size=width,
        mlp_ratio=mlp_width / width,
        num_heads=width // head_dim,
        depth=depth,
        depth_single_blocks=depth_single,
        refiner_depth=refiner_depth,
        axes_dim=rotary_axes(stated, ("rope_axes_dim",), head_dim),
        theta=stated_number(stated, "rope_theta", HunyuanVideoConfig.theta),
        guidance_embed=any(name.startswith(n["guidance"]) for name in shapes),
    )
    tensors = {
        "out_channels": channels and OneOf((None, channels)),  # None: as many out as in
        "num_refiner_layers": refiner_depth,
        "patch_size": OneOf((patch[1], patch)) if patch[1] == patch[2] else patch,
        "patch_size_t": patch[0],
        "rope_axes_dim": config.axes_dim,
    }
    network = {"qk_norm": "rms_norm", "rope_theta": float(config.theta), "image_condition_type": OneOf((None,))}
    check_stated(stated, stated_blocks(config) | sizes | tensors, network)
    return config


LAYOUTS = (
    Layout(
        model="hunyuan_video",
        class_name="HunyuanVideoTransformer3DModel",
        name="original",
        marks=(
            "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
            "txt_in.input_embedder.weight",
            "double_blocks.0.img_attn_qkv.weight",
            "double_blocks.0.img_attn_k_norm.weight",
        ),
        rules=ORIGINAL,
        configure=partial(configure, ORIGINAL_NAMES),
    ),
    Layout(
        model="hunyuan_video",
        class_name="HunyuanVideoTransformer3DModel",
        name="comfyui",
        marks=(
            "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
            "txt_in.input_embedder.weight",
            "double_blocks.0.img_attn.qkv.weight",
            "double_blocks.0.img_attn.norm.key_norm.scale",
        ),
        rules=COMFYUI,
        configure=partial(configure, COMFYUI_NAMES),
    ),
    Layout(
        model="hunyuan_video",
        class_name="HunyuanVideoTransformer3DModel",
        name="diffusers",
        marks=(
            "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear.bias",
            "context_embedder.proj_in.weight",
        ),
        rules=DIFFUSERS,
        configure=partial(configure, DIFFUSERS_NAMES),
    ),
)
