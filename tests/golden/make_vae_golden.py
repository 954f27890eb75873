"""Golden data of the VAEs of FLUX.1 and Wan2.1, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_vae_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1, accelerate)

Writes beside itself, for tiny random models, flux_vae/ and wan_vae/:
    vae/            the model as diffusers saves it, bf16, in which every weight is exact
    original/       the same weights in one file under the original's names
    io.safetensors  inputs and outputs, and parts of activations
    tensors.txt     of the published model: a tensor a line, its name in the original, in diffusers, and both shapes
The names of the originals are written here by hand, and must be those that diffusers' own converter takes.
"""

import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

HERE = Path(__file__).parent
FLUX = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32, sample_size=1024,
    scaling_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip
TINY_FLUX = FLUX | dict(block_out_channels=(4, 8, 8), layers_per_block=1, latent_channels=3, norm_num_groups=2)
TINY_WAN = dict(
    base_dim=4, z_dim=3, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3], latents_std=[1.0, 2.0, 0.5]
)  # fmt: skip


def main():
    torch.set_grad_enabled(False)
    make_flux()
    make_wan()


def make_flux():
    with torch.device("meta"):
        published = flux(FLUX)
    levels = len(FLUX["block_out_channels"])
    write_names("flux_vae", published, lambda name: flux_name(name, levels))
    config = published.config
    theirs = {original: value for original, _, value in renamed(published, lambda name: flux_name(name, levels))}
    check(convert_ldm_vae_checkpoint(theirs, config), published)

    model, levels = redraw(flux(TINY_FLUX)), len(TINY_FLUX["block_out_channels"])
    tensors = {"in.pixels": draw(2, 3, 20, 12, seed=1), "in.latents": draw(2, 3, 5, 3, seed=2)}
    keep(model, tensors)
    tensors["latents"] = (model.encode(tensors["in.pixels"]).latent_dist.mean - 0.1159) * 0.3611
    tensors["pixels"] = model.decode(tensors["in.latents"] / 0.3611 + 0.1159).sample
    write("flux_vae", model, tensors)
    bf16 = {new: value.bfloat16() for new, _, value in renamed(model, lambda name: flux_name(name, levels))}
    save_file({name: value.contiguous() for name, value in bf16.items()}, HERE / "flux_vae/original/ae.safetensors")
    # Of the published model the sizes tell all; the number of groups of a tiny one no tensor tells.
    shutil.copy(HERE / "flux_vae/vae/config.json", HERE / "flux_vae/original")


def make_wan():
    with torch.device("meta"):
        published = AutoencoderKLWan()
    write_names("wan_vae", published, lambda name: wan_name(name, 2))
    theirs = {original: value for original, _, value in renamed(published, lambda name: wan_name(name, 2))}
    check(convert_wan_vae_to_diffusers(theirs), published)

    model = redraw(AutoencoderKLWan(**TINY_WAN))
    mean, std = (torch.tensor(TINY_WAN[f"latents_{x}"]).view(1, -1, 1, 1, 1) for x in ("mean", "std"))
    tensors = {"in.video": draw(1, 3, 9, 24, 40, seed=1), "in.latents": draw(1, 3, 3, 3, 5, seed=2)}
    keep(model, tensors)
    for frames in (1, 5, 9):  # the activations are of the last
        kept = {name: [] for name in tensors if name.startswith(("encoder", "decoder"))}
        tensors |= kept
        video, latents = tensors["in.video"][:, :, :frames], tensors["in.latents"][:, :, : 1 + frames // 4]
        tensors[f"latents.{frames}"] = (model.encode(video).latent_dist.mean - mean) / std
        tensors[f"video.{frames}"] = model.decode(latents * std + mean).sample
    # The activations come a chunk at a time.
    tensors = {name: torch.cat(value, 2) if isinstance(value, list) else value for name, value in tensors.items()}
    write("wan_vae", model, tensors)
    torch.save(
        {new: value.bfloat16() for new, _, value in renamed(model, lambda name: wan_name(name, 1))},
        HERE / "wan_vae/original/Wan2.1_VAE.pth",
    )
    shutil.copy(HERE / "wan_vae/vae/config.json", HERE / "wan_vae/original")


def flux(sizes: dict) -> AutoencoderKL:
    levels = len(sizes["block_out_channels"])
    types = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return AutoencoderKL(**types, **sizes, use_quant_conv=False, use_post_quant_conv=False)


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """The model with new parameters, exact in bf16: no norm of ones and no bias of zeros that could hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("gamma") or (p.ndim == 1 and name.endswith("weight")):  # of a norm
            value = 1 + 0.2 * noise
        elif p.ndim > 1:
            value = noise / p[0].numel() ** 0.5
        else:
            value = 0.1 * noise
        # Most of what comes out lies in -1..1, beyond which Wan's is clamped.
        p.copy_((value * (0.6 if name.startswith("decoder.conv_out") else 1)).bfloat16())
    return model.eval()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep(model: torch.nn.Module, tensors: dict) -> None:
    """Puts what the middle and every level of both halves give, in every third row and column, into tensors from now on."""

    def kept(name):
        def hook(_, __, out):
            value = out[..., ::3, ::3].clone()
            tensors[name].append(value) if isinstance(tensors.get(name), list) else tensors.update({name: value})

        return hook

    for half in ("encoder", "decoder"):
        module = getattr(model, half)
        module.mid_block.register_forward_hook(kept(f"{half}.mid"))
        tensors[f"{half}.mid"] = []
        blocks = module.down_blocks if half == "encoder" else module.up_blocks
        # Wan's encoder has no levels, but a list in which each ends with a resampling.
        ends = [
            block
            for block in blocks
            if not isinstance(model, AutoencoderKLWan) or hasattr(block, "resample") or half == "decoder"
        ]
        for i, block in enumerate(ends):
            tensors[f"{half}.{i}"] = []
            block.register_forward_hook(kept(f"{half}.{i}"))


def write(folder: str, model: torch.nn.Module, tensors: dict) -> None:
    tensors = {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, HERE / folder / "io.safetensors")
    (HERE / folder / "original").mkdir(exist_ok=True)
    shutil.rmtree(HERE / folder / "vae", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(HERE / folder / "vae")
    model.float()


def renamed(model: torch.nn.Module, name_of):
    """(name in the original, in diffusers, tensor as the original has it)."""
    for name, value in model.state_dict().items():
        new = name_of(name)
        # Linear layers of diffusers are convolutions there.
        pixel = isinstance(model, AutoencoderKL) and ".attn_1." in new and value.ndim == 2
        yield new, name, value[:, :, None, None] if pixel else value


def flux_name(name: str, levels: int) -> str:
    """A tensor of diffusers as Black Forest Labs call it."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = lambda part: lambda found: f"up.{levels - 1 - int(found[1])}.{part}"
    name = re.sub(r"up_blocks\.(\d+)\.resnets", up("block"), name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", up("upsample"), name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        name = re.sub(r"to_([qkv])", r"\1", name).replace("to_out.0", "proj_out")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def wan_name(name: str, blocks: int) -> str:
    """A tensor of diffusers as the Wan team calls it, of a model with so many residual blocks a level of the encoder."""
    parts = {
        "norm1": "residual.0",
        "conv1": "residual.2",
        "norm2": "residual.3",
        "conv2": "residual.6",
        "conv_shortcut": "shortcut",
    }
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return {"quant_conv": "conv1", "post_quant_conv": "conv2"}[half] + f".{rest}"
    place = lambda found: f"upsamples.{int(found[1]) * (blocks + 2) + int(found[2])}"
    rest = re.sub(r"^up_blocks\.(\d+)\.resnets\.(\d+)", place, rest)
    rest = re.sub(
        r"^up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"upsamples.{(int(found[1]) + 1) * (blocks + 2) - 1}", rest
    )
    rest = re.sub(r"^down_blocks", "downsamples", rest)
    rest = re.sub(r"^mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}", rest)
    rest = rest.replace("mid_block.attentions.0", "middle.1")
    rest = re.sub(r"^conv_in", "conv1", rest).replace("norm_out", "head.0").replace("conv_out", "head.2")
    if rest.startswith(("upsamples", "downsamples", "middle")):
        rest = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda found: f".{parts[found[1]]}.", rest)
    return f"{half}.{rest}"


def check(converted: dict, model: torch.nn.Module) -> None:
    """Asserts that diffusers' converter makes the model's tensors of what are called the original's."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == expected


def write_names(folder: str, model: torch.nn.Module, name_of) -> None:
    (HERE / folder).mkdir(exist_ok=True)
    shape = lambda value: "x".join(map(str, value.shape))
    states = model.state_dict()
    lines = [f"{new} {name} {shape(value)} {shape(states[name])}" for new, name, value in renamed(model, name_of)]
    (HERE / folder / "tensors.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
