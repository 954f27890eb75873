"""Golden data of the text encoders CLIP, T5 and UMT5, by transformers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_text_golden.py    (Python 3.11, torch 2.13.0 CPU, transformers 5.23.0)

Writes beside itself, for three tiny random models, clip_text/, t5/ and umt5/:
    text_encoder/   the model as transformers 5 saves it, bf16 (every weight is exact in it)
    io.safetensors  inputs "in.*", states after every layer "layer.<i>" and at the end "out"
"""

import shutil
from pathlib import Path

import torch
from make_flux_golden import redraw
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).parent
VOCABULARY, LAYERS = 64, 2
BEGIN, END, LARGER = 49, 50, 55  # tokens of CLIP
# Heads times their width is not the width of the model, and sequences are longer than the largest distance.
T5_SIZES = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=3, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip
CLIP_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
    max_position_embeddings=16, hidden_act="quick_gelu", bos_token_id=BEGIN, eos_token_id=2, pad_token_id=1,
)  # fmt: skip


def main():
    torch.set_grad_enabled(False)
    draw = lambda *shape, seed: torch.randint(3, BEGIN, shape, generator=torch.Generator().manual_seed(seed))

    # Three prompts: full, with a token larger than the end's; short and padded with the end token; empty, with another end after.
    ids = draw(3, 14, seed=0)
    ids[:, 0] = BEGIN
    ids[0, -1], ids[1, 6:], ids[2, [1, 9]] = END, END, END
    ids[0, 5] = LARGER
    clip = redraw(CLIPTextModel(CLIPTextConfig(**CLIP_SIZES)))
    tensors, out = run(clip, clip.encoder.layers, input_ids=ids)
    tensors |= {"pooled.2": out.pooler_output}
    clip.eos_token_id = END
    tensors |= {f"pooled.{END}": clip(ids).pooler_output}
    write("clip_text", clip, tensors)

    # Three prompts: full, short, and of one token; padded with 0.
    ids, mask = draw(3, 30, seed=1), torch.ones(3, 30, dtype=torch.int64)
    mask[1, 11:], mask[2, 1:] = 0, 0
    ids = ids * mask
    t5 = redraw(T5EncoderModel(T5Config(**T5_SIZES)))
    tensors, _ = run(t5, t5.encoder.block, input_ids=ids)
    tensors |= {"masked.out": t5(ids, attention_mask=mask)[0], "in.attention_mask": mask}
    distances = torch.arange(-300, 301)  # of a key from its query
    tensors |= {"buckets.32.128": T5Attention._relative_position_bucket(distances, True, 32, 128)}
    write("t5", t5, tensors)

    umt5 = redraw(UMT5EncoderModel(UMT5Config(**T5_SIZES)))
    write("umt5", umt5, run(umt5, umt5.encoder.block, input_ids=ids, attention_mask=mask)[0])


def run(model: torch.nn.Module, layers: torch.nn.ModuleList, **inputs: torch.Tensor):
    """Inputs and states of one call, and what it returned."""
    tensors = {f"in.{name}": array for name, array in inputs.items()}
    for i, layer in enumerate(layers):
        keep = lambda _, __, out, i=i: tensors.update({f"layer.{i}": out[0] if isinstance(out, tuple) else out})
        layer.register_forward_hook(keep)
    out = model(**inputs)
    tensors = dict(tensors)  # later calls add to the other one
    return tensors | {"out": out.last_hidden_state}, out


def write(name: str, model: torch.nn.Module, tensors: dict[str, torch.Tensor]):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    assert all((p == p.bfloat16()).all() for p in model.parameters())
    model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    whole = {key: a.to(torch.int32) if a.dtype == torch.int64 else a for key, a in tensors.items()}
    save_file({key: a.contiguous().clone() for key, a in whole.items()}, folder / "io.safetensors")


if __name__ == "__main__":
    main()
