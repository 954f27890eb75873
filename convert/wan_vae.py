"""The VAE of Wan2.1 and Wan2.2-A14B: the tables of its two layouts, and its config from shapes.

"original" is the Wan team's Wan2.1_VAE.pth, "diffusers" the vae/ folder of the Hugging Face repository. Sources: Wan-Video/Wan2.1
wan/modules/vae.py; diffusers loaders/single_file_utils.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from chipmunk_jax.convert.naming import (
    ANY,
    OneOf,
    brief,
    check_stated,
    convolution,
    count_layers,
    measure,
    pointwise,
    stated_numbers,
    stated_size,
)
from chipmunk_jax.convert.prefix import VAES
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.wan_vae import CHANNELS, WanVaeConfig

# A place counts blocks and ways to the next level in one list: the encoder's in both layouts, the decoder's in the original.
ORIGINAL_NAMES = {
    "conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2", "encoder_quant": "conv1", "decoder_quant": "conv2",
    "down": "encoder.downsamples.{place}", "up": "decoder.upsamples.{place}", "upsample": "decoder.upsamples.{place}",
    "block_1": "middle.0", "attention": "middle.1", "block_2": "middle.2",
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "shortcut": "shortcut",
}  # fmt: skip
DIFFUSERS_NAMES = {
    "conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out",
    "encoder_quant": "quant_conv", "decoder_quant": "post_quant_conv",
    "down": "encoder.down_blocks.{place}", "up": "decoder.up_blocks.{level}.resnets.{block}",
    "upsample": "decoder.up_blocks.{level}.upsamplers.0",
    "block_1": "mid_block.resnets.0", "attention": "mid_block.attentions.0", "block_2": "mid_block.resnets.1",
    "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut",
}  # fmt: skip


def table(n: dict[str, str], config: WanVaeConfig) -> tuple[Rule, ...]:
    """Rules from the names of a layout."""
    rules = []
    for half in ("encoder", "decoder"):
        rules += convolution(f"{half}.{n['conv_in']}", f"{half}.conv_in")
        rules += block(n, f"{half}.{n['block_1']}", f"{half}.mid.block_1")
        rules += attention(f"{half}.{n['attention']}", f"{half}.mid.attention")
        rules += block(n, f"{half}.{n['block_2']}", f"{half}.mid.block_2")
        rules += norm(f"{half}.{n['norm_out']}", f"{half}.norm_out")
        rules += convolution(f"{half}.{n['conv_out']}", f"{half}.conv_out")
        rules += pointwise(n[f"{half}_quant"], f"{half}.quant")
    for half, names, way, blocks in (
        ("encoder", n["down"], n["down"], config.num_res_blocks),
        ("decoder", n["up"], n["upsample"], config.num_res_blocks + 1),
    ):
        for level in range(len(config.dim_mult)):
            first = level * (blocks + 1)
            for i in range(blocks):
                source = names.format(place=first + i, level=level, block=i)
                rules += block(n, source, f"{half}.levels.{level}.blocks.{i}")
            rules += resample(way.format(place=first + blocks, level=level), f"{half}.levels.{level}.resample")
    return tuple(rules)


def block(n: dict[str, str], source: str, target: str) -> list[Rule]:
    """A residual block, with a shortcut or without."""
    return [
        *norm(f"{source}.{n['norm1']}", f"{target}.norm1"),
        *convolution(f"{source}.{n['conv1']}", f"{target}.conv1"),
        *norm(f"{source}.{n['norm2']}", f"{target}.norm2"),
        *convolution(f"{source}.{n['conv2']}", f"{target}.conv2"),
        *pointwise(f"{source}.{n['shortcut']}", f"{target}.shortcut"),
    ]


def attention(source: str, target: str) -> list[Rule]:
    """The attention, named alike in both layouts."""
    return [
        *norm(f"{source}.norm", f"{target}.norm"),
        *pointwise(f"{source}.to_qkv", f"{target}.qkv"),
        *pointwise(f"{source}.proj", f"{target}.proj"),
    ]


def resample(source: str, target: str) -> list[Rule]:
    """The way to the next level, named alike in both layouts."""
    return [
        *convolution(f"{source}.resample.1", f"{target}.conv"),
        *convolution(f"{source}.time_conv", f"{target}.time_conv"),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """A norm, whose weight is [C, 1, 1] or [C, 1, 1, 1]."""
    return [Rule((f"{source}.gamma",), (f"{target}.scale",), transform=np.ravel)]


def configure(n: dict[str, str], shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> WanVaeConfig:
    """WanVaeConfig of a checkpoint.

    Args:
        n: names of the layout.
        shapes: of all tensors.
        stated: diffusers' config.json; empty where there is none.

    Raises:
        InputError: the tensors are of no such VAE, or config.json says other than they or the network.
    """
    start = n["down"].partition("{")[0]
    parts = {tuple(name.removeprefix(start).split(".")[:2]) for name in shapes if name.startswith(start)}
    count = count_layers(shapes, start)
    ways = [i for i in range(count) if (str(i), "resample") in parts]
    blocks = ways[0] if ways else count
    levels = [range(first, min(first + blocks, count)) for first in range(0, count, blocks + 1)]
    biases = lambda i: ((f"{start}{i}.{n[conv]}.bias", 0) for conv in ("conv1", "conv2"))
    widths = [measure(shapes, tuple(place for i in level for place in biases(i))) for level in levels]
    base = measure(shapes, ((f"encoder.{n['conv_in']}.bias", 0),)) or (widths and widths[0])
    if not base or count != len(levels) * (blocks + 1) - 1 or any(not width or width % base for width in widths):
        raise InputError(f"no VAE of Wan has {count} blocks {brief(widths)} wide, from pixels to latents")
    z_dim = measure(shapes, ((f"{n['decoder_quant']}.bias", 0), (f"{n['decoder_quant']}.weight", 0)))
    told = {
        "base_dim": base,
        "z_dim": z_dim,
        "dim_mult": tuple(width // base for width in widths),
        "num_res_blocks": blocks,
        "temperal_downsample": tuple((str(i), "time_conv") in parts for i in ways),
    }
    z_dim = z_dim or stated_size(stated, ("z_dim",), WanVaeConfig.z_dim)
    config = WanVaeConfig(
        **told | {"z_dim": z_dim}, **{name: latents(stated, name, z_dim) for name in ("latents_mean", "latents_std")}
    )
    check_stated(stated, told, stated_network(config))
    return config


def latents(stated: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """The means or deviations of the latents that config.json has, or Wan2.1's.

    Raises:
        InputError: there are not as many as channels.
    """
    values = stated_numbers(stated, name, getattr(WanVaeConfig, name))
    if len(values) != channels:
        where = "in config.json" if name in stated else "of Wan2.1, as no config.json tells"
        raise InputError(f"{name} of {len(values)} values {where}: expected {channels}, as the tensors have channels")
    return values


def stated_network(config: WanVaeConfig) -> dict[str, Any]:
    """What config.json says that no tensor tells."""
    frames, side = config.compression
    return {
        "latents_mean": config.latents_mean,
        "latents_std": config.latents_std,
        "decoder_base_dim": OneOf((None, config.base_dim)),
        "attn_scales": (),
        "dropout": ANY,  # of training
        "is_residual": False,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": OneOf((None, 1)),
        "scale_factor_temporal": frames,
        "scale_factor_spatial": side,
    }


LAYOUTS = (
    Layout(
        model="wan_vae",
        class_name="AutoencoderKLWan",
        name="original",
        marks=("decoder.middle.0.residual.0.gamma", "encoder.downsamples.0.residual.0.gamma"),
        rules=partial(table, ORIGINAL_NAMES),
        configure=partial(configure, ORIGINAL_NAMES),
        parts=VAES,
    ),
    Layout(
        model="wan_vae",
        class_name="AutoencoderKLWan",
        name="diffusers",
        marks=("decoder.mid_block.resnets.0.norm1.gamma", "encoder.down_blocks.0.norm1.gamma"),
        rules=partial(table, DIFFUSERS_NAMES),
        configure=partial(configure, DIFFUSERS_NAMES),
        parts=VAES,
    ),
)
