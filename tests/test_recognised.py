"""A file that is no checkpoint of ours is named for what it is: one sentence, by convert and inspect alike."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert.recognised import RELATED, STRANGERS
from chipmunk_jax.convert.source import layouts, open_source
from chipmunk_jax.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
FLUX = ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.weight")
WAN = ("time_projection.1.weight", "blocks.0.self_attn.q.weight")
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
    "a VAE alone": [
        ["encoder.conv_in.weight", "decoder.conv_in.weight"],  # FLUX's ae.safetensors, diffusers', HunyuanVideo's
        ["decoder.middle.0.residual.0.gamma", "conv1.weight"],  # Wan's
        ["first_stage_model.decoder.mid.block_1.conv1.weight"],
    ],
    "a CLIP alone": [["text_model.encoder.layers.0.mlp.fc1.weight"], ["visual.transformer.0.attn.proj.weight"]],
    "a T5 or UMT5": [["encoder.block.0.layer.0.SelfAttention.q.weight"], ["blocks.0.pos_embedding.embedding.weight"]],
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


def test_no_name_of_our_own_checkpoints_is_taken_for_another():
    """Of all layouts, whatever their sizes."""
    for layout in layouts():
        names = [source.replace("*", "12") for rule in layout.rules for source in rule.sources]
        for kind in (*RELATED, *(STRANGERS if layout.model != "wan" else ())):
            assert not kind.names or not [name for name in names if re.search(kind.names, name)], (layout, kind)
