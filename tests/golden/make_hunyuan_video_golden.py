"""Golden data of the HunyuanVideo transformer, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_hunyuan_video_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1)

Writes beside itself, for one tiny random model, hunyuan_video/:
    transformer/    the model as diffusers saves it, bf16 (every weight is exact in it)
    io.safetensors  inputs "in.*", activations after every block, output "out"
"""

import shutil
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from make_flux_golden import redraw
from safetensors.torch import save_file

HERE = Path(__file__).parent
# The refiner's MLPs are 4 wide whatever the ratio of the others; 2 tells them apart.
SIZES = dict(
    in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    num_refiner_layers=2, mlp_ratio=2.0, text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
BATCH, FRAMES, HEIGHT, WIDTH, TEXT_TOKENS = 2, 3, 6, 8, 7


def main():
    torch.set_grad_enabled(False)
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(BATCH, TEXT_TOKENS, dtype=torch.int64)
    mask[1, 4:] = 0  # the second prompt is shorter; its padded rows hold noise like the others
    inputs = dict(
        hidden_states=draw(BATCH, 3, FRAMES, HEIGHT, WIDTH, seed=0),
        timestep=torch.tensor([718.75, 31.25]),
        encoder_hidden_states=draw(BATCH, TEXT_TOKENS, 20, seed=1),
        encoder_attention_mask=mask,
        pooled_projections=draw(BATCH, 12, seed=2),
        guidance=torch.tensor([2000.0, 1250.0]),
    )
    folder = HERE / "hunyuan_video"
    shutil.rmtree(folder, ignore_errors=True)
    model = redraw(HunyuanVideoTransformer3DModel(**SIZES))
    patch = model.x_embedder.proj.weight
    patch.copy_((patch - 1).bfloat16())  # a convolution, drawn like a norm
    assert all((p == p.bfloat16()).all() for p in model.parameters())
    tensors = run(model, inputs)
    model.to(torch.bfloat16).save_pretrained(folder / "transformer")
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "io.safetensors")


def run(model: HunyuanVideoTransformer3DModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs, activations and output of one call."""
    tensors = {f"in.{name}": a for name, a in inputs.items()}

    def keep(module, *names):
        def hook(_, __, out):
            tensors.update(zip(names, out if isinstance(out, tuple) else (out,), strict=True))

        module.register_forward_hook(hook)

    for i, block in enumerate(model.context_embedder.token_refiner.refiner_blocks):
        keep(block, f"refiner.{i}")
    for i, block in enumerate(model.transformer_blocks):
        keep(block, f"double.{i}.video", f"double.{i}.text")
    for i, block in enumerate(model.single_transformer_blocks):
        keep(block, f"single.{i}.video", f"single.{i}.text")
    tensors["out"] = model(**inputs).sample
    return tensors


if __name__ == "__main__":
    main()
