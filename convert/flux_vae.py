"""FLUX.1's VAE: the tables of its two layouts, and its config from shapes.

"original" is Black Forest Labs' ae.safetensors, also beside other models in one file; "diffusers" the vae/ folder of the Hugging
Face repository. The VAE of Stable Diffusion 3 has the same tensors and another scale: its config.json tells, and no tensor does.
Sources: black-forest-labs/flux autoencoder.py; diffusers loaders/single_file_utils.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from chipmunk_jax.convert.naming import (
    ANY,
    brief,
    check_stated,
    convolution,
    count_layers,
    is_number,
    measure,
    norm,
    pointwise,
    stated_size,
)
from chipmunk_jax.convert.prefix import VAES
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.flux_vae import FluxVaeConfig

# A level is counted as it runs; in the original the decoder's are counted from the last.
ORIGINAL_NAMES = {
    "down": "encoder.down.{level}.block.{block}", "downsample": "encoder.down.{level}.downsample.conv",
    "up": "decoder.up.{from_last}.block.{block}", "upsample": "decoder.up.{from_last}.upsample.conv",
    "block_1": "mid.block_1", "block_2": "mid.block_2", "attention": "mid.attn_1", "attention_norm": "norm",
    "q": "q", "k": "k", "v": "v", "proj": "proj_out", "norm_out": "norm_out", "shortcut": "nin_shortcut",
}  # fmt: skip
DIFFUSERS_NAMES = {
    "down": "encoder.down_blocks.{level}.resnets.{block}", "downsample": "encoder.down_blocks.{level}.downsamplers.0.conv",
    "up": "decoder.up_blocks.{level}.resnets.{block}", "upsample": "decoder.up_blocks.{level}.upsamplers.0.conv",
    "block_1": "mid_block.resnets.0", "block_2": "mid_block.resnets.1", "attention": "mid_block.attentions.0",
    "attention_norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0", "norm_out": "conv_norm_out",
    "shortcut": "conv_shortcut",
}  # fmt: skip


def table(n: dict[str, str], config: FluxVaeConfig) -> tuple[Rule, ...]:
    """Rules from the names of a layout."""
    rules = []
    for half in ("encoder", "decoder"):
        rules += convolution(f"{half}.conv_in", f"{half}.conv_in")
        rules += block(n, f"{half}.{n['block_1']}", f"{half}.mid.block_1")
        rules += attention(n, f"{half}.{n['attention']}", f"{half}.mid.attention")
        rules += block(n, f"{half}.{n['block_2']}", f"{half}.mid.block_2")
        rules += norm(f"{half}.{n['norm_out']}", f"{half}.norm_out")
        rules += convolution(f"{half}.conv_out", f"{half}.conv_out")
    levels, blocks = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):
        numbers = dict(level=level, from_last=levels - 1 - level)
        for i in range(blocks):
            rules += block(n, n["down"].format(**numbers, block=i), f"encoder.levels.{level}.blocks.{i}")
        for i in range(blocks + 1):
            rules += block(n, n["up"].format(**numbers, block=i), f"decoder.levels.{level}.blocks.{i}")
        rules += convolution(n["downsample"].format(**numbers), f"encoder.levels.{level}.resample.conv")
        rules += convolution(n["upsample"].format(**numbers), f"decoder.levels.{level}.resample.conv")
    return tuple(rules)


def block(n: dict[str, str], source: str, target: str) -> list[Rule]:
    """A residual block, with a shortcut or without."""
    return [
        *norm(f"{source}.norm1", f"{target}.norm1"),
        *convolution(f"{source}.conv1", f"{target}.conv1"),
        *norm(f"{source}.norm2", f"{target}.norm2"),
        *convolution(f"{source}.conv2", f"{target}.conv2"),
        *pointwise(f"{source}.{n['shortcut']}", f"{target}.shortcut"),
    ]


def attention(n: dict[str, str], source: str, target: str) -> list[Rule]:
    """The attention: convolutions of one pixel in the original, linear layers in diffusers."""
    return [
        *norm(f"{source}.{n['attention_norm']}", f"{target}.norm"),
        *pointwise(tuple(f"{source}.{n[part]}" for part in "qkv"), f"{target}.qkv"),
        *pointwise(f"{source}.{n['proj']}", f"{target}.proj"),
    ]


def configure(n: dict[str, str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> FluxVaeConfig:
    """FluxVaeConfig of a checkpoint.

    Args:
        n: names of the layout.
        shapes: of all tensors.
        stated: diffusers' config.json; empty where there is none.

    Raises:
        InputError: the tensors are of no such VAE, or config.json says other than they or the network.
    """
    levels = count_layers(shapes, n["down"].partition("{")[0])
    blocks = count_layers(shapes, n["down"].partition("{block}")[0].format(level=0))
    wide = lambda level: tuple((f"{n['down'].format(level=level, block='*')}.conv{i}.bias", 0) for i in (1, 2))
    widths = tuple(measure(shapes, wide(level)) for level in range(levels))
    if not levels or not blocks or not all(widths):
        raise InputError(f"no VAE of FLUX has {levels} levels of {blocks} blocks, as the tensors say")
    told = {
        "in_channels": measure(shapes, (("encoder.conv_in.weight", 1),)),
        "out_channels": measure(shapes, (("decoder.conv_out.bias", 0),)),
        "latent_channels": measure(shapes, (("decoder.conv_in.weight", 1),)),
    }
    config = FluxVaeConfig(
        # A size that no tensor tells belongs to a missing tensor, which the match will name.
        **{name: size or stated_size(stated, (name,), getattr(FluxVaeConfig, name)) for name, size in told.items()},
        block_out_channels=widths,
        layers_per_block=blocks,
        norm_num_groups=stated_size(stated, ("norm_num_groups",), FluxVaeConfig.norm_num_groups),
        **{name: stated_factor(stated, name) for name in ("scaling_factor", "shift_factor")},
    )
    tensors = told | {"block_out_channels": widths, "layers_per_block": blocks}
    check_stated(stated, tensors, stated_network(config))
    return config


def stated_factor(stated: Mapping[str, Any], name: str) -> float:
    """A factor that config.json has, or FLUX.1's.

    Raises:
        InputError: it is no number.
    """
    value = stated.get(name, getattr(FluxVaeConfig, name))
    if name == "shift_factor" and value is None:  # as diffusers writes that there is none
        return 0.0
    if not is_number(value):
        raise InputError(f"{name}={brief(value)} in config.json: expected a number")
    return float(value)


def stated_network(config: FluxVaeConfig) -> dict[str, Any]:
    """What config.json says that no tensor tells."""
    levels = len(config.block_out_channels)
    return {
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": ANY,  # used
        "act_fn": "silu",
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
        "latents_std": None,
        "sample_size": ANY,  # of images that are not cut into tiles, which ours never are
        "force_upcast": ANY,  # to float32: the dtype is the user's choice
    }


LAYOUTS = (
    Layout(
        model="flux_vae",
        class_name="AutoencoderKL",
        name="original",
        marks=("decoder.mid.attn_1.norm.weight", "decoder.up.0.block.0.conv1.weight"),
        rules=partial(table, ORIGINAL_NAMES),
        configure=partial(configure, ORIGINAL_NAMES),
        parts=VAES,
    ),
    Layout(
        model="flux_vae",
        class_name="AutoencoderKL",
        name="diffusers",
        # HunyuanVideo's has another ".conv" in these.
        marks=("encoder.down_blocks.0.downsamplers.0.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
        rules=partial(table, DIFFUSERS_NAMES),
        configure=partial(configure, DIFFUSERS_NAMES),
        parts=VAES,
    ),
)
