"""Golden data of the FLUX transformer and of its sampler's schedules, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_flux_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1, accelerate)

Writes beside itself, for two tiny random models, flux_dev/ and flux_schnell/:
    transformer/    the model as diffusers saves it, float32; that of dev in two shards
    original/       the same weights in one file under Black Forest Labs' names, bf16 as their release
    io.safetensors  inputs "in.*", activations after every block, output "out"
and schedules.safetensors. Nothing is downloaded.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROWS, COLUMNS, TEXT_TOKENS, BATCH = 8, 6, 7, 2
SIZES = dict(
    in_channels=16,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=48,
    pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
)


def main():
    torch.set_grad_enabled(False)
    make_model("dev", num_layers=2, num_single_layers=2, guidance_embeds=True, shards=2)
    make_model("schnell", num_layers=1, num_single_layers=2, guidance_embeds=False, shards=1)
    save_file(schedules(), HERE / "schedules.safetensors")


def make_model(name: str, *, shards: int, **config):
    folder = HERE / f"flux_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model = redraw(FluxTransformer2DModel(**SIZES, **config))
    size = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(folder / "transformer", max_shard_size=int(size / shards * 1.1))
    assert len(list(folder.glob("transformer/*.safetensors"))) == shards
    (folder / "original").mkdir()
    save_file(original(model.state_dict(), **config), folder / f"original/flux1-{name}.safetensors")
    # Released models have heads of 128, which tell the rotary axes; for ours no tensor's shape does.
    shutil.copy(folder / "transformer/config.json", folder / "original")
    save_file(run(model), folder / "io.safetensors")


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """The model with new parameters, exact in bf16: no zero gate, no norm of ones that could hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 2:
            value = noise / p.shape[1] ** 0.5
        elif name.endswith("weight"):  # of a norm
            value = 1 + 0.2 * noise
        else:
            value = 0.1 * noise
        p.copy_(value.bfloat16())
    return model.eval()


def run(model: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """Inputs, activations and output of one call."""
    inputs, tensors = make_inputs(model.config.guidance_embeds), {}

    def keep_double(i):
        def hook(_, __, streams):
            tensors[f"double.{i}.txt"], tensors[f"double.{i}.img"] = streams

        return hook

    def keep_single(i):
        def hook(_, __, streams):
            tensors[f"single.{i}"] = torch.cat(streams, dim=1)

        return hook

    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(keep_double(i))
    for i, block in enumerate(model.single_transformer_blocks):
        block.register_forward_hook(keep_single(i))
    tensors["out"] = model(
        hidden_states=inputs["img"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text"],
        pooled_projections=inputs["pooled"],
        img_ids=inputs["positions"],
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        guidance=inputs.get("guidance"),
    ).sample
    tensors |= {f"in.{name}": a for name, a in inputs.items()}
    return {name: a.contiguous().clone() for name, a in tensors.items()}


def make_inputs(guided: bool) -> dict[str, torch.Tensor]:
    """A batch whose items share nothing, on a grid that is not square; the index axis is 1 in its lower half."""
    generator = torch.Generator().manual_seed(1)
    row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    positions = torch.stack([row // (ROWS // 2), row, column], dim=-1).reshape(-1, 3).float()
    inputs = dict(
        img=torch.randn(BATCH, ROWS * COLUMNS, SIZES["in_channels"], generator=generator),
        text=torch.randn(BATCH, TEXT_TOKENS, SIZES["joint_attention_dim"], generator=generator),
        pooled=torch.randn(BATCH, SIZES["pooled_projection_dim"], generator=generator),
        t=torch.tensor([0.7, 0.15]),
        positions=positions,
    )
    return inputs | ({"guidance": torch.tensor([3.5, 1.25])} if guided else {})


def original(
    ours: dict[str, torch.Tensor], *, num_layers: int, num_single_layers: int, guidance_embeds: bool
) -> dict[str, torch.Tensor]:
    """The weights under Black Forest Labs' names: q, k, v in one, in single blocks with the MLP's first layer too."""
    theirs = {}

    def join(target, *sources):
        for kind in ("weight", "bias"):
            theirs[f"{target}.{kind}"] = torch.cat([ours[f"{source}.{kind}"] for source in sources])

    def norms(target, source, query, key):
        theirs[f"{target}.query_norm.scale"] = ours[f"{source}.{query}.weight"]
        theirs[f"{target}.key_norm.scale"] = ours[f"{source}.{key}.weight"]

    join("img_in", "x_embedder")
    join("txt_in", "context_embedder")
    embedders = {"time_in": "timestep", "vector_in": "text"} | ({"guidance_in": "guidance"} if guidance_embeds else {})
    for target, source in embedders.items():
        join(f"{target}.in_layer", f"time_text_embed.{source}_embedder.linear_1")
        join(f"{target}.out_layer", f"time_text_embed.{source}_embedder.linear_2")

    for i in range(num_layers):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        join(f"{a}.img_mod.lin", f"{b}.norm1.linear")
        join(f"{a}.txt_mod.lin", f"{b}.norm1_context.linear")
        join(f"{a}.img_attn.qkv", *(f"{b}.attn.to_{x}" for x in "qkv"))
        join(f"{a}.txt_attn.qkv", *(f"{b}.attn.add_{x}_proj" for x in "qkv"))
        norms(f"{a}.img_attn.norm", f"{b}.attn", "norm_q", "norm_k")
        norms(f"{a}.txt_attn.norm", f"{b}.attn", "norm_added_q", "norm_added_k")
        join(f"{a}.img_attn.proj", f"{b}.attn.to_out.0")
        join(f"{a}.txt_attn.proj", f"{b}.attn.to_add_out")
        for target, source in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            join(f"{a}.{target}.0", f"{b}.{source}.net.0.proj")
            join(f"{a}.{target}.2", f"{b}.{source}.net.2")

    for i in range(num_single_layers):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        join(f"{a}.modulation.lin", f"{b}.norm.linear")
        join(f"{a}.linear1", *(f"{b}.attn.to_{x}" for x in "qkv"), f"{b}.proj_mlp")
        join(f"{a}.linear2", f"{b}.proj_out")
        norms(f"{a}.norm", f"{b}.attn", "norm_q", "norm_k")

    for kind in ("weight", "bias"):  # diffusers has (scale, shift) here, the original (shift, scale)
        scale, shift = ours[f"norm_out.linear.{kind}"].chunk(2)
        theirs[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    join("final_layer.linear", "proj_out")
    assert sum(a.numel() for a in theirs.values()) == sum(a.numel() for a in ours.values())
    return {name: a.bfloat16().contiguous() for name, a in theirs.items()}


def schedules() -> dict[str, torch.Tensor]:
    """Noise levels "dev.<steps>.<tokens>" and "schnell.4", [steps + 1], 1 to 0; one Euler path, [steps + 1, ..]."""
    (low, low_shift), (high, high_shift) = (256, 0.5), (4096, 1.15)  # tokens and mu of FLUX.1-dev
    dev = dict(base_image_seq_len=low, base_shift=low_shift, max_image_seq_len=high, max_shift=high_shift)
    tensors = {}
    for steps, tokens in ((28, 1024), (50, 3840), (10, 4096)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **dev)
        mu = calculate_shift(tokens, low, high, low_shift, high_shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        tensors[f"dev.{steps}.{tokens}"] = scheduler.sigmas
    schnell = FlowMatchEulerDiscreteScheduler(shift=1.0)
    schnell.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))
    tensors["schnell.4"] = schnell.sigmas

    # The last of the dev schedules, along dx/dsigma = tanh(x) (1/2 + sigma).
    path = [torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(2))]
    for t in scheduler.timesteps:
        velocity = torch.tanh(path[-1]) * (0.5 + t / 1000)
        path.append(scheduler.step(velocity, t, path[-1]).prev_sample)
    return tensors | {"euler.dev.10.4096": torch.stack(path)}


if __name__ == "__main__":
    main()
