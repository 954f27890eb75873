"""Golden data of whole pipelines, from prompts to pixels, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_pipeline_golden.py
    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1, transformers 5.23.0, accelerate, ftfy)

Writes beside itself, for four tiny random pipelines, {flux_dev, flux_schnell, wan21, wan22}_pipeline:
    <name>/             as diffusers saves it, weights in bf16 (every one is exact in it), without the parts of shared.json
    <name>.safetensors  calls of it: initial noise, embedded prompts, final latents, pixels; their arguments in the metadata
The tokenizers are those of make_tokenizer_golden.py.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.t5 import T5Config, T5EncoderModel, T5Tokenizer
from transformers.models.umt5 import UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden_pipelines import PIXEL_LEVELS, assemble  # noqa: E402

HEIGHT, WIDTH = 32, 48  # pixels
LATENT = (HEIGHT // 8, WIDTH // 8)
CHANNELS = 4  # of latents
ROWS = 40  # max_sequence_length
T5_SIZES = dict(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
FLUX_SIZES = dict(
    in_channels=4 * CHANNELS, attention_head_dim=16, num_attention_heads=2, num_layers=1, num_single_layers=1,
    joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
WAN_SIZES = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
    text_dim=24, freq_dim=32, ffn_dim=48, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip
FLOW = dict(
    prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, solver_order=2, solver_type="bh2"
)
LONG = (
    "a photo of a chipmunk in a red scarf, sitting on a mossy log in the rain, golden hour, 35 mm film, "
    "highly detailed; two cats are boxing on a stage with bright lights, and the camera moves slowly from left to right"
)
PROMPTS = ["A «café» by the SEA,  naïve style – it's 1,234 dollars 🐿️ 雨!", LONG]
NEGATIVE = ["blurry, LOW quality", "an astronaut"]
# What ftfy and html mend, blanks of several kinds, and scripts.
WAN_PROMPTS = ["  A cafÃ© &amp;amp; two   cats\n\tboxing &lt;slowly&gt; \u201cnow\u201d 一只花栗鼠坐在雨中 🐿️", LONG]
WAN_NEGATIVE = ["静态，细节模糊不清，最差质量", "shaky &amp; blurry"]


def main():
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    make_flux_dev()
    make_flux_schnell()
    make_wan21()
    make_wan22()


def make_flux_dev():
    dynamic = dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **dynamic),
        transformer=redraw(FluxTransformer2DModel(**FLUX_SIZES, guidance_embeds=True), seed=1),
        **flux_parts(),
    )
    save("flux_dev_pipeline", pipeline, tokenizer="tokenizers/clip", tokenizer_2="tokenizers/t5")
    as_version_4(HERE / "flux_dev_pipeline/text_encoder")
    usual = dict(prompt=PROMPTS, height=HEIGHT, width=WIDTH, max_sequence_length=ROWS)
    run(
        FluxPipeline,
        "flux_dev_pipeline",
        distilled=usual | dict(num_inference_steps=5, guidance_scale=3.5),
        true_guidance=usual
        | dict(num_inference_steps=4, guidance_scale=2.0, negative_prompt=NEGATIVE, true_cfg_scale=2.5),
        second_prompt=usual | dict(num_inference_steps=4, guidance_scale=3.5, prompt_2=PROMPTS[::-1]),
    )


def make_flux_schnell():
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        transformer=redraw(FluxTransformer2DModel(**FLUX_SIZES, guidance_embeds=False), seed=2),
        **flux_parts(),
    )
    own = {part: f"flux_dev_pipeline/{part}" for part in ("text_encoder", "text_encoder_2", "vae")}
    save("flux_schnell_pipeline", pipeline, tokenizer="tokenizers/clip", tokenizer_2="tokenizers/t5", **own)
    usual = dict(prompt=PROMPTS, height=HEIGHT, width=WIDTH, max_sequence_length=ROWS)
    run(FluxPipeline, "flux_schnell_pipeline", usual=usual | dict(num_inference_steps=4, guidance_scale=0.0))


def flux_parts() -> dict:
    clip = CLIPTokenizer.from_pretrained(HERE / "tokenizers/clip")
    t5 = T5Tokenizer.from_pretrained(HERE / "tokenizers/t5")
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 8, 8, 8), layers_per_block=2, latent_channels=CHANNELS, norm_num_groups=2, sample_size=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
    )  # fmt: skip
    # The end token's id is 2 in published configs, which stands for the largest of all.
    config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    rows = 32 * (len(t5) // 32 + 1)  # more than there are tokens, as in published encoders
    encoder = redraw(T5EncoderModel(T5Config(vocab_size=rows, **T5_SIZES)), seed=5)
    return dict(
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=redraw(CLIPTextModel(config), seed=3),
        text_encoder_2=encoder,
        vae=redraw(vae, seed=4, out="decoder.conv_out"),
    )


def make_wan21():
    pipeline = WanPipeline(
        scheduler=UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
        transformer=wan_transformer(seed=6, num_layers=2),
        **wan_parts(),
    )
    save("wan21_pipeline", pipeline, tokenizer="tokenizers/umt5")
    usual = dict(prompt=WAN_PROMPTS, height=HEIGHT, width=WIDTH, num_frames=9, max_sequence_length=ROWS)
    guided = dict(num_inference_steps=5, guidance_scale=5.0, negative_prompt=WAN_NEGATIVE)
    run(WanPipeline, "wan21_pipeline", usual=usual | guided)


def make_wan22():
    pipeline = WanPipeline(
        scheduler=UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
        transformer=wan_transformer(seed=9, num_layers=1),
        transformer_2=wan_transformer(seed=10, num_layers=1),
        boundary_ratio=0.875,
        **wan_parts(),
    )
    own = {part: f"wan21_pipeline/{part}" for part in ("text_encoder", "vae")}
    save("wan22_pipeline", pipeline, tokenizer="tokenizers/umt5", **own)
    usual = dict(prompt=WAN_PROMPTS, height=HEIGHT, width=WIDTH, num_frames=5, max_sequence_length=ROWS)
    guided = dict(num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=3.0, negative_prompt=WAN_NEGATIVE)
    run(WanPipeline, "wan22_pipeline", usual=usual | guided)


def wan_transformer(*, seed: int, num_layers: int) -> WanTransformer3DModel:
    return redraw(WanTransformer3DModel(**WAN_SIZES, num_layers=num_layers), seed=seed)


def wan_parts() -> dict:
    umt5 = T5Tokenizer.from_pretrained(HERE / "tokenizers/umt5")
    assert umt5.model_max_length == 512
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=2, temperal_downsample=[False, True, True],
        latents_mean=[-0.7571, 0.9653, 0.1075, -0.2921], latents_std=[2.8184, 1.4541, 0.7744, 1.9160],
    )  # fmt: skip
    rows = 32 * (len(umt5) // 32 + 1)
    encoder = redraw(UMT5EncoderModel(UMT5Config(vocab_size=rows, **T5_SIZES)), seed=7)
    return dict(tokenizer=umt5, text_encoder=encoder, vae=redraw(vae, seed=8, out="decoder.conv_out"))


def redraw(model: torch.nn.Module, *, seed: int, out: str | None = None) -> torch.nn.Module:
    """The model with new parameters, exact in bf16: no zero gate, no norm of ones that could hide a mistake.

    The layer called `out`, the last before pixels, is made small enough that few are clamped.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("gamma") or (p.ndim == 1 and name.endswith("weight")):  # of a norm
            value = 1 + 0.2 * noise
        elif p.ndim == 1 or name.endswith("scale_shift_table"):
            value = 0.1 * noise
        elif "embed_tokens" in name or "shared" in name or "relative_attention_bias" in name:
            value = noise
        else:
            value = noise / p[0].numel() ** 0.5
        p.copy_((value * (0.4 if out and name.startswith(out) else 1)).bfloat16())
    return model.to(torch.bfloat16).eval()


def save(name: str, pipeline, **shared: str):
    """Saves the pipeline without the parts that are those of another folder, by name."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    for part, other in shared.items():
        compare(folder / part, HERE / other)
        shutil.rmtree(folder / part)
    if (encoder := folder / "text_encoder_2").exists():  # in two shards, as published
        shutil.rmtree(encoder)
        pipeline.text_encoder_2.save_pretrained(encoder, max_shard_size="26KB")
        assert len(list(encoder.glob("*.safetensors"))) == 2
    (folder / "shared.json").write_text(json.dumps(shared, indent=2) + "\n")
    index = folder / "model_index.json"  # published ones name the class of transformers 4
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"') + "\n")


def compare(one: Path, other: Path):
    """Raises AssertionError unless both folders have the same weights; tokenizers are compared by what they make."""
    weights = lambda folder: {k: a for file in folder.glob("*.safetensors") for k, a in load_file(file).items()}
    a, b = weights(one), {key.removeprefix("text_model."): value for key, value in weights(other).items()}
    assert {key.removeprefix("text_model.") for key in a} == b.keys()
    assert all((value == b[key.removeprefix("text_model.")]).all() for key, value in a.items())


def as_version_4(folder: Path):
    """CLIP's folder as transformers 4 wrote it, which is how it is published: names with text_model., torch_dtype."""
    file = folder / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def run(kind: type, name: str, **cases: dict):
    """Calls the pipeline of the folder, as anyone would load it, and stores what came of it."""
    with tempfile.TemporaryDirectory() as place:
        pipeline = kind.from_pretrained(assemble(name, Path(place) / name), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in modules for p in part.parameters()} == {torch.float32}
    tensors = {}
    for case, settings in cases.items():
        made = {"noise": draw(settings)} | embed(pipeline, settings)
        call = lambda settings, noise=made["noise"], **more: pipeline(
            **settings, latents=noise.clone(), return_dict=False, **more
        )[0]
        made["latents"] = call(settings, output_type="latent")
        pixels = torch.as_tensor(call(settings, output_type="np"))
        clamped = ((pixels == 0) | (pixels == 1)).float().mean().item()
        print(f"{name} {case}: latents {made['latents'].std():.2f}, pixels {pixels.std():.2f}, clamped {clamped:.1%}")
        assert clamped < 0.1 and pixels.std() > 0.1, "pixels tell too little"
        check_influence(call, settings, pixels)
        made["pixels"] = (pixels * PIXEL_LEVELS).round().to(torch.uint16)
        tensors |= {f"{case}.{key}": value.contiguous().clone() for key, value in made.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"cases": json.dumps(cases, ensure_ascii=False)})


def draw(settings: dict) -> torch.Tensor:
    """Initial noise as the pipeline takes it: packed [B, N, 4 C] of an image, [B, C, T, h, w] of a video."""
    generator, batch = torch.Generator().manual_seed(0), len(settings["prompt"])
    if frames := settings.get("num_frames"):
        return torch.randn(batch, CHANNELS, (frames - 1) // 4 + 1, *LATENT, generator=generator)
    noise = torch.randn(batch, CHANNELS, *LATENT, generator=generator)
    return FluxPipeline._pack_latents(noise, batch, CHANNELS, *LATENT)


def embed(pipeline, settings: dict) -> dict[str, torch.Tensor]:
    """Conditions of the prompts and, as "negative_", of the negative ones."""
    prompt, negative, rows = settings["prompt"], settings.get("negative_prompt"), settings["max_sequence_length"]
    if isinstance(pipeline, WanPipeline):
        text, negative = pipeline.encode_prompt(prompt, negative, max_sequence_length=rows)
        return {"text": text, "negative_text": negative}
    text, pooled, _ = pipeline.encode_prompt(prompt, settings.get("prompt_2"), max_sequence_length=rows)
    made = {"text": text, "pooled": pooled}
    if negative:
        text, pooled, _ = pipeline.encode_prompt(negative, max_sequence_length=rows)
        made |= {"negative_text": text, "negative_pooled": pooled}
    return made


def check_influence(call, settings: dict, pixels: torch.Tensor):
    """Raises AssertionError unless pixels tell every setting: each one, changed a little, moves the largest by 5e-3."""
    change = lambda prompts: [prompts[0].replace("A", "I"), prompts[1].replace("photo", "phota")]
    changed = {"prompt": change(settings["prompt"]), "num_inference_steps": settings["num_inference_steps"] + 1}
    changed |= {"max_sequence_length": settings["max_sequence_length"] - 1}
    for key in ("guidance_scale", "guidance_scale_2", "true_cfg_scale"):
        if settings.get(key):
            changed[key] = settings[key] + 0.25
    if negative := settings.get("negative_prompt"):
        changed["negative_prompt"] = [prompt + "s" for prompt in negative]
    moved = {}
    for key, value in changed.items():
        other = torch.as_tensor(call(settings | {key: value}, output_type="np"))
        moved[key] = min((a - b).abs().max().item() for a, b in zip(other, pixels, strict=True))
    print("   ", {key: round(value, 4) for key, value in moved.items()})
    assert min(moved.values()) > 5e-3, moved


if __name__ == "__main__":
    main()
