"""FLUX.1: the tables of its two layouts, and its config from shapes.

"original" is Black Forest Labs' single file (flux1-dev.safetensors, also with the prefix of ComfyUI), "diffusers" the
transformer/ folder of the Hugging Face repository. Sources: black-forest-labs/flux model.py; diffusers
scripts/convert_flux_to_diffusers.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from chipmunk_jax.convert.naming import (
    OneOf,
    Sizes,
    check_stated,
    count_layers,
    linear,
    measure,
    mlp,
    stated_size,
    stated_sizes,
)
from chipmunk_jax.convert.rules import Layout, Rule, swap_halves
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.mmdit import MMDiTConfig


def single_output(source: str) -> list[Rule]:
    """The linear layer on [attention, MLP]; its one bias is the MLP's."""
    return [
        Rule((f"{source}.weight",), ("single_blocks.proj.kernel.T", "single_blocks.mlp.fc2.T"), axis=1),
        Rule((f"{source}.bias",), ("single_blocks.mlp.b2",)),
    ]


def original_stream(name: str) -> list[Rule]:
    """One modality of the double blocks: "img" or "txt"."""
    source, target = f"double_blocks.*.{name}", f"double_blocks.{name}"
    return [
        *linear(f"{source}_mod.lin", f"{target}.modulation.linear"),
        *linear(f"{source}_attn.qkv", f"{target}.attention.linear"),
        Rule((f"{source}_attn.norm.query_norm.scale",), (f"{target}.attention.query_norm",)),
        Rule((f"{source}_attn.norm.key_norm.scale",), (f"{target}.attention.key_norm",)),
        *linear(f"{source}_attn.proj", f"{target}.proj"),
        *mlp(f"{source}_mlp.0", f"{source}_mlp.2", f"{target}.mlp"),
    ]


def diffusers_stream(
    target: str, norm: str, qkv: tuple[str, str, str], q_norm: str, k_norm: str, out: str, ff: str
) -> list[Rule]:
    """One modality of the double blocks, whose names follow no pattern."""
    source, target = "transformer_blocks.*", f"double_blocks.{target}"
    return [
        *linear(f"{source}.{norm}.linear", f"{target}.modulation.linear"),
        *linear(tuple(f"{source}.attn.{name}" for name in qkv), f"{target}.attention.linear"),
        Rule((f"{source}.attn.{q_norm}.weight",), (f"{target}.attention.query_norm",)),
        Rule((f"{source}.attn.{k_norm}.weight",), (f"{target}.attention.key_norm",)),
        *linear(f"{source}.attn.{out}", f"{target}.proj"),
        *mlp(f"{source}.{ff}.net.0.proj", f"{source}.{ff}.net.2", f"{target}.mlp"),
    ]


EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}

ORIGINAL = (
    *linear("img_in", "img_in"),
    *linear("txt_in", "txt_in"),
    *(rule for ours in EMBEDDERS for layer in LAYERS for rule in linear(f"{ours}.{layer}", f"{ours}.{layer}")),
    *original_stream("img"),
    *original_stream("txt"),
    *linear("single_blocks.*.modulation.lin", "single_blocks.modulation.linear"),
    Rule(("single_blocks.*.linear1.weight",), ("single_blocks.qkv.linear.kernel.T", "single_blocks.mlp.fc1")),
    Rule(("single_blocks.*.linear1.bias",), ("single_blocks.qkv.linear.bias", "single_blocks.mlp.b1")),
    Rule(("single_blocks.*.norm.query_norm.scale",), ("single_blocks.qkv.query_norm",)),
    Rule(("single_blocks.*.norm.key_norm.scale",), ("single_blocks.qkv.key_norm",)),
    *single_output("single_blocks.*.linear2"),
    *linear("final_layer.adaLN_modulation.1", "final.linear"),
    *linear("final_layer.linear", "img_out"),
)

DIFFUSERS_BLOCKS = (
    *diffusers_stream("img", "norm1", ("to_q", "to_k", "to_v"), "norm_q", "norm_k", "to_out.0", "ff"),
    *diffusers_stream(
        "txt",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "norm_added_q",
        "norm_added_k",
        "to_add_out",
        "ff_context",
    ),
    *linear("single_transformer_blocks.*.norm.linear", "single_blocks.modulation.linear"),
    *linear(tuple(f"single_transformer_blocks.*.attn.to_{x}" for x in "qkv"), "single_blocks.qkv.linear"),
    Rule(("single_transformer_blocks.*.attn.norm_q.weight",), ("single_blocks.qkv.query_norm",)),
    Rule(("single_transformer_blocks.*.attn.norm_k.weight",), ("single_blocks.qkv.key_norm",)),
    Rule(("single_transformer_blocks.*.proj_mlp.weight",), ("single_blocks.mlp.fc1",)),
    Rule(("single_transformer_blocks.*.proj_mlp.bias",), ("single_blocks.mlp.b1",)),
    *single_output("single_transformer_blocks.*.proj_out"),
    Rule(("norm_out.linear.weight",), ("final.linear.kernel.T",), transform=swap_halves),
    Rule(("norm_out.linear.bias",), ("final.linear.bias",), transform=swap_halves),
    *linear("proj_out", "img_out"),
)
DIFFUSERS = (
    *linear("x_embedder", "img_in"),
    *linear("context_embedder", "txt_in"),
    *(
        rule
        for ours, theirs in EMBEDDERS.items()
        for layer, name in LAYERS.items()
        for rule in linear(f"time_text_embed.{theirs}.{name}", f"{ours}.{layer}")
    ),
    *DIFFUSERS_BLOCKS,
)

ORIGINAL_SIZES: Sizes = {
    "in_channels": (("img_in.weight", 1),),
    "vec_in_dim": (("vector_in.in_layer.weight", 1),),
    "context_in_dim": (("txt_in.weight", 1),),
    "hidden_size": (("img_in.bias", 0), ("txt_in.bias", 0), ("double_blocks.*.img_mlp.2.bias", 0)),
    "mlp_width": (("double_blocks.*.img_mlp.0.weight", 0), ("double_blocks.*.txt_mlp.0.weight", 0)),
    "head_dim": (("double_blocks.*.img_attn.norm.key_norm.scale", 0), ("single_blocks.*.norm.key_norm.scale", 0)),
}
DIFFUSERS_SIZES: Sizes = {
    "in_channels": (("x_embedder.weight", 1),),
    "vec_in_dim": (("time_text_embed.text_embedder.linear_1.weight", 1),),
    "context_in_dim": (("context_embedder.weight", 1),),
    "hidden_size": (("x_embedder.bias", 0), ("context_embedder.bias", 0), ("transformer_blocks.*.ff.net.2.bias", 0)),
    "mlp_width": (
        ("transformer_blocks.*.ff.net.0.proj.weight", 0),
        ("transformer_blocks.*.ff_context.net.0.proj.weight", 0),
    ),
    "head_dim": (("transformer_blocks.*.attn.norm_k.weight", 0), ("single_transformer_blocks.*.attn.norm_k.weight", 0)),
}
DEFAULT_AXES = {128: (16, 56, 56)}  # head dim -> axes_dim; every published FLUX.1 and HunyuanVideo


def configure(
    sizes: Sizes,
    double: str,
    single: str,
    guidance: str,
    shapes: Mapping[str, tuple[int, ...]],
    stated: Mapping[str, Any],
):
    """FluxConfig of a checkpoint.

    Args:
        sizes: which tensor has which size.
        double, single: prefixes of the two kinds of blocks.
        guidance: prefix of the guidance embedder, which schnell lacks.
        shapes: of all tensors.
        stated: diffusers' config.json; empty where there is none.

    Raises:
        InputError: the config says other than the tensors, or neither tells.
    """
    width, mlp_width, head_dim = (measure(shapes, sizes[name]) for name in ("hidden_size", "mlp_width", "head_dim"))
    depth, depth_single = count_layers(shapes, double), count_layers(shapes, single)
    if not (width and mlp_width and head_dim and depth and depth_single) or width % head_dim:
        raise InputError(
            f"no FLUX model has width {width}, MLP width {mlp_width}, head width {head_dim}, {depth} double and "
            f"{depth_single} single blocks, as the tensors say"
        )
    told = {name: measure(shapes, sizes[name]) for name in EMBEDDED}
    # A size that no tensor tells belongs to a missing tensor, which the match will name.
    embedded = {name: told[name] or stated_size(stated, names, 1) for name, names in EMBEDDED.items()}
    axes = rotary_axes(stated, ("axes_dims_rope", "axes_dim"), head_dim)
    config = FluxConfig(
        **embedded,
        hidden_size=width,
        mlp_ratio=mlp_width / width,
        num_heads=width // head_dim,
        depth=depth,
        depth_single_blocks=depth_single,
        axes_dim=axes,
        guidance_embed=any(name.startswith(guidance) for name in shapes),
    )
    tensors = {field: told[name] for name, fields in EMBEDDED.items() for field in fields} | stated_blocks(config)
    channels = told["in_channels"] and OneOf((None, told["in_channels"]))  # None: as many out as in
    network = {"patch_size": 1, "theta": float(config.theta), "qkv_bias": True}
    check_stated(stated, tensors | {"out_channels": channels}, network)
    return config


# Our field -> config.json's: diffusers', then the original's.
EMBEDDED = {
    "in_channels": ("in_channels",),
    "vec_in_dim": ("pooled_projection_dim", "vec_in_dim"),
    "context_in_dim": ("joint_attention_dim", "context_in_dim"),
}


def stated_blocks(config: MMDiTConfig) -> dict[str, Any]:
    """What config.json says of a network's blocks, under diffusers' names and the original's: FLUX's and HunyuanVideo's alike."""
    return {
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dim,
        "hidden_size": config.hidden_size,
        "mlp_ratio": config.mlp_ratio,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "depth_single_blocks": config.depth_single_blocks,
        "axes_dim": config.axes_dim,
        "guidance_embed": config.guidance_embed,
    }


def rotary_axes(stated: Mapping[str, Any], names: tuple[str, ...], head_dim: int) -> tuple[int, ...]:
    """How RoPE splits a head, as config.json states under one of `names` or as all published models do.

    Raises:
        InputError: neither tells, or what config.json states is no split of this head.
    """
    axes = stated_sizes(stated, names, DEFAULT_AXES.get(head_dim, ()))
    if not axes:
        raise InputError(
            f"the tensors do not tell how RoPE splits a head of {head_dim}: expected a config.json with {names[0]}"
        )
    if sum(axes) != head_dim:
        said = f"{names[0]}={list(axes)} where the tensors have heads of {head_dim}"
        raise InputError(f"config.json does not fit the tensors: {said}")
    return axes


LAYOUTS = (
    Layout(
        model="flux",
        class_name="FluxTransformer2DModel",
        name="original",
        marks=("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.weight"),
        rules=ORIGINAL,
        configure=partial(configure, ORIGINAL_SIZES, "double_blocks.", "single_blocks.", "guidance_in."),
    ),
    Layout(
        model="flux",
        class_name="FluxTransformer2DModel",
        name="diffusers",
        marks=("context_embedder.weight", "x_embedder.weight"),
        rules=DIFFUSERS,
        configure=partial(
            configure,
            DIFFUSERS_SIZES,
            "transformer_blocks.",
            "single_transformer_blocks.",
            "time_text_embed.guidance_embedder.",
        ),
    ),
)
