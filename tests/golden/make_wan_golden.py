"""Golden data of the Wan transformer, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_wan_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1)

Writes beside itself, for two tiny random models, wan_t2v/ and wan_i2v/:
    transformer/    the model as diffusers saves it, float32
    io.safetensors  inputs "in.*", activations after every block, output "out"
"""

import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from make_flux_golden import redraw
from safetensors.torch import save_file

HERE = Path(__file__).parent
SIZES = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
    freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 8, 12


def main():
    torch.set_grad_enabled(False)
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    times = torch.tensor([700, 31])
    text = draw(BATCH, 10, 24, seed=1)
    text[0, 6:] = 0  # a shorter prompt: its padded rows are attended to
    make(
        "wan_t2v",
        SIZES,
        hidden_states=draw(BATCH, 4, FRAMES, HEIGHT, WIDTH, seed=0),
        timestep=times,
        encoder_hidden_states=text,
    )
    # The 512 rows of text are written into diffusers' image attention: with fewer, the image would get no rows.
    make(
        "wan_i2v", SIZES | dict(in_channels=9, image_dim=20, added_kv_proj_dim=32),
        hidden_states=draw(BATCH, 9, FRAMES, HEIGHT, WIDTH, seed=0), timestep=times,
        encoder_hidden_states=draw(BATCH, 512, 24, seed=1), encoder_hidden_states_image=draw(BATCH, 5, 20, seed=3),
    )  # fmt: skip


def make(name: str, sizes: dict, **inputs):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = redraw(WanTransformer3DModel(**sizes))
    model.patch_embedding.weight.mul_(0.2)
    model.save_pretrained(folder / "transformer")
    tensors = {f"in.{key}": value for key, value in inputs.items()}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: tensors.update({f"block.{i}": out}))
    tensors["out"] = model(**inputs).sample
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "io.safetensors")


if __name__ == "__main__":
    main()
