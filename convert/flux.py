"""FLUX.1: the tables of its two layouts, and its config from shapes.

"original" is Black Forest Labs' single file (flux1-dev.safetensors, also with the prefix of ComfyUI), "diffusers" the
transformer/ folder of the Hugging Face repository. Sources: black-forest-labs/flux model.py; diffusers
scripts/convert_flux_to_diffusers.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from chipmunk_jax.convert.naming import Sizes, count_layers, linear, measure, mlp
from chipmunk_jax.convert.rules import Layout, Rule, swap_halves
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.flux import FluxConfig


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
    axes = rotary_axes(stated, "axes_dims_rope", head_dim)
    derived = {
        "in_channels": measure(shapes, sizes["in_channels"]),
        "num_layers": depth,
        "num_single_layers": depth_single,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": measure(shapes, sizes["context_in_dim"]),
        "pooled_projection_dim": measure(shapes, sizes["vec_in_dim"]),
        "guidance_embeds": any(name.startswith(guidance) for name in shapes),
    }
    # A size that no tensor tells belongs to a missing tensor, which the match will name.
    derived = {name: stated.get(name, 1) if value is None else value for name, value in derived.items()}
    wrong = [
        f"{name}={stated[name]} where the tensors have {value}"
        for name, value in derived.items()
        if stated.get(name, value) != value
    ]
    if sum(axes) != head_dim:
        wrong.append(f"axes_dims_rope={list(axes)} where the tensors have heads of {head_dim}")
    if wrong:
        raise InputError(f"config.json does not fit the tensors: {', '.join(wrong)}")
    return FluxConfig(
        in_channels=derived["in_channels"],
        vec_in_dim=derived["pooled_projection_dim"],
        context_in_dim=derived["joint_attention_dim"],
        hidden_size=width,
        mlp_ratio=mlp_width / width,
        num_heads=width // head_dim,
        depth=depth,
        depth_single_blocks=depth_single,
        axes_dim=axes,
        guidance_embed=derived["guidance_embeds"],
    )


def rotary_axes(stated: Mapping[str, Any], name: str, head_dim: int) -> tuple[int, ...]:
    """How RoPE splits a head, as config.json states under `name` or as all published models do.

    Raises:
        InputError: neither tells.
    """
    axes = stated.get(name, DEFAULT_AXES.get(head_dim, ()))
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        raise InputError(f"{name}={axes!r} in config.json: expected a list of whole numbers")
    if not axes:
        raise InputError(
            f"the tensors do not tell how RoPE splits a head of {head_dim}: expected a config.json with {name}"
        )
    return tuple(axes)


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
