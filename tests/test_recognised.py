"""A file that is no checkpoint of ours is named for what it is: one sentence, by convert and inspect alike."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert.recognised import RELATED, STRANGERS
from chipmunk_jax.convert.source import layouts, open_source
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import MODELS

GOLDEN = Path(__file__).parent / "golden"
FLUX = ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.weight")
WAN = ("time_projection.1.weight", "blocks.0.self_attn.q.weight")
WAN_VAE, FLUX_VAE = "decoder.middle.0.residual.0.gamma", "decoder.mid.attn_1.norm.weight"
WAN_DIFFUSERS = "blocks.0.attn1.to_q.weight"
WAN_SHAPES = dict.fromkeys(WAN, (32, 32)) | {"patch_embedding.bias": (32,), "head.head.bias": (64,)}
HUNYUAN = ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",)

NAMED = {
    "a LoRA": [
        ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.alpha"],
        ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
        ["transformer_blocks.0.attn.to_q.lora.down.weight"],
        ["double_blocks.0.processor.qkv_lora1.down.weight"],
        ["diffusion_model.blocks.0.self_attn.q.lora_B.default.weight"],
        ["lycoris_blocks_0_attn.lokr_w1"],
        [*FLUX, "double_blocks.0.img_attn.qkv.lora_B.weight"],  # Black Forest Labs' own, with norms beside
        ["blocks.0.self_attn.q.diff_b", *WAN[:1]],
    ],
    "an OFT or BOFT adapter": [
        ["oft_unet_double_blocks_0.oft_blocks"],
        ["transformer.transformer_blocks.0.attn.to_q.oft_R.weight", "context_embedder.weight"],
    ],
    "a ControlNet": [
        ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"],
        ["control_model.input_blocks.0.0.weight"],
        ["input_hint_block.0.weight", *FLUX],
    ],
    "an IP-Adapter": [
        ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"],
        ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    ],
    "bitsandbytes": [["transformer_blocks.0.attn.to_q.weight.quant_state.bitsandbytes__nf4", "context_embedder.weight"]],
    "8 bits": [["transformer_blocks.0.attn.to_q.SCB", "context_embedder.weight"]],
    "GPTQ or AWQ": [["blocks.0.attn1.to_q.qweight", "blocks.0.attn1.to_q.qzeros"]],
    "nunchaku": [["transformer_blocks.0.qkv_proj.wscales", "transformer_blocks.0.qkv_proj.qweight"]],
    "a quantised model": [["blocks.0.attn1.to_q.weight._data"], [*FLUX, "double_blocks.0.img_attn.qkv.weight_scale_2"]],
    "FLUX.1-Redux": [["redux_up.weight", "redux_down.weight"]],
    "FLUX.2": [[*FLUX, "double_stream_modulation_img.lin.weight"]],
    "Chroma": [[*FLUX, "distilled_guidance_layer.norms.0.scale"]],
    "a Wan VACE": [[*WAN, "vace_patch_embedding.weight"]],
    "a Wan FLF2V": [[*WAN, "img_emb.emb_pos"]],
    "a Wan Fun-Control": [[*WAN, "ref_conv.weight"], [*WAN, "control_adapter.conv.weight"]],
    "a Wan-S2V": [[*WAN, "casual_audio_encoder.encoder.final_linear.weight"]],
    "a Wan-Animate": [[*WAN, "face_adapter.fuser_blocks.0.k_norm.weight"]],
    "a FramePack": [["clean_x_embedder.proj.weight", "context_embedder.proj_in.weight"]],
    "HunyuanVideo 1.5": [[*HUNYUAN, "byt5_in.fc1.weight"]],
    "Qwen-Image": [["transformer_blocks.0.img_mod.1.weight", "img_in.weight"]],
    "Stable Diffusion 3": [
        ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.decoder.conv_in.weight"],
        ["joint_blocks.0.context_block.attn.qkv.weight"],
    ],
    "a U-Net of Stable Diffusion": [
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "conv_in.weight"],
    ],
    "a file of several networks": [["model.diffusion_model.new.weight", "first_stage_model.decoder.conv_in.weight"]],
    "LTX-Video": [["model.diffusion_model.patchify_proj.weight", "model.diffusion_model.adaln_single.linear.weight"]],
    "PixArt": [["adaln_single.linear.weight", "pos_embed.proj.weight"]],
    "a small VAE": [["encoder.layers.0.weight", "decoder.layers.3.conv.0.weight"], ["encoder.0.weight", "decoder.1.weight"]],
    "a SigLIP alone": [["vision_model.head.probe", "vision_model.encoder.layers.0.mlp.fc1.weight"]],
    "the VAE of Wan2.2-TI2V-5B": [
        [WAN_VAE, "encoder.downsamples.0.downsamples.0.residual.0.gamma"],
        ["decoder.mid_block.resnets.0.norm1.gamma", "encoder.down_blocks.0.resnets.0.norm1.gamma"],
    ],
    "HunyuanVideo's VAE": [["vae.decoder.conv_in.conv.weight"], ["encoder.conv_in.conv.bias", "quant_conv.weight"]],
    "a VAE that is none of those known": [
        ["encoder.conv_in.weight", "decoder.conv_in.weight"],
        ["first_stage_model.decoder.mid.block_1.conv1.weight"],
    ],
    "a CLIP image encoder": [
        ["vision_model.encoder.layers.0.mlp.fc1.weight"],
        ["embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight"],  # as transformers 5 writes it
        ["visual.transformer.0.attn.proj.weight", "textual.token_embedding.weight"],  # the Wan team's
    ],
    "a CLIP text encoder in other names": [
        ["transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"],
        ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"],
    ],
    "a T5 or UMT5": [
        ["enc.blk.0.attn_q.weight", "token_embd.weight"],
        ["decoder.block.0.layer.0.SelfAttention.q.weight"],
        ["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
    ],
    "a language model": [["model.layers.0.self_attn.q_proj.weight"]],
}  # fmt: skip
CASES = [(what, names) for what, lists in NAMED.items() for names in lists]


def write(folder, shapes, **files):
    """A folder of tensors of zeros, and JSON files beside them."""
    folder.mkdir()
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("what", "names"), CASES, ids=[f"{what}-{names[0]}" for what, names in CASES])
def test_a_file_is_named_for_what_it_is(what, names, tmp_path):
    folder = write(tmp_path / "source", dict.fromkeys(names, (2,)))
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(InputError) as error:
            open_source(path)
        assert what in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("what", "shapes"),
    [
        ("FLUX.1-Fill", {"img_in.weight": (2, 384), "final_layer.linear.weight": (64, 2), FLUX[0]: (2,)}),
        ("FLUX.1-Fill", {"x_embedder.weight": (2, 384), "proj_out.weight": (64, 2)}),
        ("FLUX.1-Depth or FLUX.1-Canny", {"img_in.weight": (2, 128), "final_layer.linear.weight": (64, 2), FLUX[0]: (2,)}),
        ("FLUX.1-Depth or FLUX.1-Canny", {"x_embedder.weight": (2, 128), "proj_out.weight": (64, 2)}),
        ("a Wan Fun-Control", {"patch_embedding.weight": (2, 48, 1, 2, 2), "head.head.weight": (64, 2), WAN[0]: (2,)}),
        ("a Wan Fun-Control", {"patch_embedding.weight": (2, 52, 1, 2, 2), "proj_out.weight": (64, 2), WAN_DIFFUSERS: (2,)}),
        ("a Wan model of 100 channels in and 16 out", WAN_SHAPES | {"patch_embedding.weight": (32, 100, 1, 2, 2)}),
        ("a Wan model of 32 channels in and 16 out", WAN_SHAPES | {"patch_embedding.weight": (32, 32, 1, 2, 2)}),
        ("a HunyuanVideo from image to video", {"img_in.proj.weight": (2, 33, 1, 2, 2), HUNYUAN[0]: (2,)}),
        ("a HunyuanVideo from image to video", {"x_embedder.proj.weight": (2, 33, 1, 2, 2)}),
        ("the VAE of a Stable Diffusion", {"decoder.conv_in.weight": (512, 4, 3, 3), FLUX_VAE: (512,)}),
        ("the VAE of a Stable Diffusion", {f"first_stage_model.{name}": shape for name, shape in {
            "decoder.conv_in.weight": (512, 4, 3, 3), FLUX_VAE: (512,)}.items()}),
        ("the VAE of Wan2.2-TI2V-5B", {WAN_VAE: (1024, 1, 1, 1), "conv2.weight": (48, 48), "decoder.conv1.weight": (1, 48)}),
        ("the VAE of Wan2.2-TI2V-5B", {WAN_VAE: (1024, 1, 1, 1), "post_quant_conv.weight": (48, 48, 1, 1, 1)}),
    ],
)  # fmt: skip
def test_models_that_take_more_channels_are_named(what, shapes, tmp_path):
    with pytest.raises(InputError, match=what):
        open_source(write(tmp_path / "source", shapes))


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("FLUX.1-Kontext", {"model_index": {"_class_name": "FluxKontextPipeline"}}),
        ("a quantised model", {"config": {"quantization_config": {"quant_method": "torchao"}}}),
        ("a HunyuanVideo from image to video", {"config": {"image_condition_type": "token_replace"}}),
        ("a Wan VACE", {"config": {"_class_name": "WanVACETransformer3DModel", "vace_layers": [0, 5]}}),
        ("a Wan FLF2V", {"config": {"pos_embed_seq_len": 514}}),
    ],
)
def test_configs_name_what_the_tensors_do_not_tell(what, files, tmp_path):
    folder = write(tmp_path / "transformer", dict.fromkeys(FLUX, (2,)))
    for name, content in files.items():
        (tmp_path if name == "model_index" else folder).joinpath(f"{name}.json").write_text(json.dumps(content))
    for path in (folder, tmp_path):
        with pytest.raises(InputError, match=what):
            open_source(path)


def test_a_name_tells_kontext_where_its_tensors_do_not(tmp_path):
    shutil.copy(GOLDEN / "flux_dev/original/flux1-dev.safetensors", tmp_path / "flux1-Kontext-dev.safetensors")
    shutil.copy(GOLDEN / "flux_dev/original/config.json", tmp_path)
    for path in (tmp_path, tmp_path / "flux1-Kontext-dev.safetensors"):
        with pytest.raises(InputError, match=r"FLUX\.1-Kontext"):
            open_source(path)


def test_inspect_and_convert_say_the_same_sentence(tmp_path, capsys):
    source = write(tmp_path / "lora", {"transformer.blocks.0.attn1.to_q.lora_A.weight": (2, 2)})
    assert main(["inspect", str(source)]) == 2
    said = capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == said
    assert said == (
        f"chipmunk: {source}: a LoRA, which changes a checkpoint and is none: it cannot be read yet; expected the checkpoint "
        "that it is made for\n"
    )


def test_a_vae_is_not_taken_for_the_pipeline_that_it_is_of(tmp_path):
    """That of FLUX.1-Kontext's is FLUX.1's."""
    tensors = load_file(GOLDEN / "flux_vae/original/ae.safetensors")
    save_file(tensors, tmp_path / "ae.safetensors")
    shutil.copy(GOLDEN / "flux_vae/original/config.json", tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    assert open_source(tmp_path / "ae.safetensors").layout.model == "flux_vae"


def test_no_name_of_our_own_checkpoints_is_taken_for_another():
    """Of all layouts, with the sizes of published models."""
    for layout in layouts():
        rules = layout.rules_of(MODELS[layout.model].config_class())
        names = [source.replace("*", "12") for rule in rules for source in rule.sources]
        # Strangers are asked for where no layout fits, and one of them is any other VAE.
        for kind in (*RELATED, *(STRANGERS if layout.model not in ("wan", "flux_vae", "wan_vae") else ())):
            assert not kind.names or not [name for name in names if re.search(kind.names, name)], (layout, kind)
