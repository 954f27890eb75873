"""Says in one sentence what a file is that is no checkpoint of ours, by names and sizes of its tensors and by its configs.

RELATED kinds have an architecture of ours and could pass for it; STRANGERS are looked for only where no layout fits.

Names are those of the originals, of ComfyUI (comfy/model_detection.py) and of diffusers (loaders/single_file_utils.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chipmunk_jax.convert.prefix import PREFIXES

PREFIX = re.compile(f"^({'|'.join(map(re.escape, PREFIXES))})+")
Places = Mapping[str, tuple[int, int]]  # tensor -> (axis, size)

NOT_YET = "it cannot be read yet"
INSTEAD = "expected the transformer that it belongs to"


@dataclass(frozen=True)
class Kind:
    """A kind of file. Any one mark is enough to recognise it."""

    what: str
    verdict: str  # whether it can be read, or what to take in its place
    names: str = ""  # regular expression of a part of a tensor's name
    sizes: tuple[Places, ...] = ()  # of tensors; one mapping is a mark, if all of its sizes are there
    classes: tuple[str, ...] = ()  # _class_name in config.json or model_index.json
    fields: tuple[str, ...] = ()  # of config.json, not null, that no other kind has
    files: str = ""  # regular expression of a part of a file's name, where nothing else tells


RELATED = (
    Kind(
        "a model in 4 bits for nunchaku (SVDQuant)",
        "expected the weights in bfloat16, float16, float32 or float8",
        names=r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_orig|smooth|lowrank_down|proj_down)$",
    ),
    Kind(
        "a model in 4 bits, NF4 or FP4 of bitsandbytes",
        "expected the weights in bfloat16, float16, float32 or float8",
        names=r"\.quant_state\.bitsandbytes__|\.(absmax|nested_absmax|quant_map|nested_quant_map)$",
    ),
    Kind(
        "a model in 8 bits of bitsandbytes",
        "expected the weights in bfloat16, float16, float32 or float8",
        names=r"\.(SCB|weight_format)$",
    ),
    Kind(
        "a model quantised by GPTQ or AWQ",
        "expected the weights in bfloat16, float16, float32 or float8",
        names=r"\.(qweight|qzeros|g_idx)$",
    ),
    Kind(
        "a quantised model",
        "expected the weights in bfloat16, float16, float32 or float8",
        names=r"\.weight\._(data|scale|scale_and_zero|shift)$|\.weight_scale_2$|\.weight_(packed|zero_point|qtype)$",
        fields=("quantization_config",),
    ),
    Kind(
        "a LoRA, which changes a checkpoint and is none",
        f"{NOT_YET}; expected the checkpoint that it is made for",
        names=r"(^|[._])lora(_|\d?\.(down|up|weight))|\.(lokr|hada)_[wt][12]|\.dora_scale$|\.diff(_b|_m)?$",
    ),
    Kind(
        "an OFT or BOFT adapter, which changes a checkpoint and is none",
        f"{NOT_YET}; expected the checkpoint that it is made for",
        names=r"(^|[._])b?oft_\w",
    ),
    Kind(
        "a ControlNet, which steers a checkpoint and is none",
        NOT_YET,
        names=r"^(control_model|controlnet)\.|(^|\.)(controlnet_\w+|input_hint_block|control_proj)\.",
        classes=("FluxControlNetModel", "HunyuanVideoControlNetModel", "WanControlNetModel", "ControlNetModel"),
    ),
    Kind(
        "an IP-Adapter, which adds images to a checkpoint and is none",
        NOT_YET,
        names=r"^(ip_adapter|image_proj)\.|ip_adapter_|\.to_[kv]_ip\.",
    ),
    Kind("FLUX.1-Redux, which turns an image into rows of text", NOT_YET, names=r"(^|\.)redux_(up|down)\."),
    Kind(
        "FLUX.1-Fill, which takes a mask and an image (384 channels in)",
        f"{NOT_YET}; expected FLUX.1-dev or FLUX.1-schnell",
        sizes=(
            {"img_in.weight": (1, 384), "final_layer.linear.weight": (0, 64)},
            {"x_embedder.weight": (1, 384), "proj_out.weight": (0, 64)},
        ),
        classes=("FluxFillPipeline",),
    ),
    Kind(
        "FLUX.1-Depth or FLUX.1-Canny, which take a second image (128 channels in)",
        f"{NOT_YET}; expected FLUX.1-dev or FLUX.1-schnell",
        sizes=(
            {"img_in.weight": (1, 128), "final_layer.linear.weight": (0, 64)},
            {"x_embedder.weight": (1, 128), "proj_out.weight": (0, 64)},
        ),
        classes=("FluxControlPipeline",),
    ),
    Kind(
        "FLUX.1-Kontext, which edits an image that it is given",
        f"{NOT_YET}; expected FLUX.1-dev or FLUX.1-schnell",
        classes=("FluxKontextPipeline",),
        files=r"kontext",
    ),
    Kind(
        "FLUX.2, whose blocks are others than FLUX.1's",
        NOT_YET,
        names=r"^double_stream_modulation_(img|txt)\.",
        classes=("Flux2Transformer2DModel",),
    ),
    Kind(
        "Chroma, whose modulation is other than FLUX.1's",
        NOT_YET,
        names=r"^distilled_guidance_layer\.",
        classes=("ChromaTransformer2DModel",),
    ),
    Kind(
        "a Wan VACE, which takes videos to edit",
        NOT_YET,
        names=r"^vace_(blocks|patch_embedding)\.",
        classes=("WanVACETransformer3DModel", "VaceWanModel", "WanVACEPipeline"),
        fields=("vace_layers", "vace_in_dim", "vace_in_channels"),
    ),
    Kind(
        "a Wan FLF2V, which takes a first and a last frame",
        NOT_YET,
        names=r"^(img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed)$",
        fields=("pos_embed_seq_len",),
    ),
    Kind(
        "a Wan Fun-Control, which takes a second video",
        NOT_YET,
        names=r"^(ref_conv|control_adapter)\.",
        sizes=tuple(
            {"patch_embedding.weight": (1, size), head: (0, 64)}
            for head in ("head.head.weight", "proj_out.weight")
            for size in (48, 52)
        ),
    ),
    Kind(
        "a Wan-S2V or another Wan that takes speech",
        NOT_YET,
        names=r"^(casual_audio_encoder|audio_injector|audio_proj|audio_model)\.",
        classes=("WanModel_S2V", "WanS2VTransformer3DModel"),
    ),
    Kind(
        "a Wan-Animate, which takes a face and a pose",
        NOT_YET,
        names=r"^(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.",
        classes=("WanAnimateModel", "WanAnimateTransformer3DModel"),
    ),
    Kind(
        "a HunyuanVideo from image to video",
        f"{NOT_YET}; expected the one from text to video",
        sizes=tuple({f"{name}.proj.weight": (1, size)} for name in ("img_in", "x_embedder") for size in (32, 33)),
        classes=("HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        fields=("image_condition_type",),
    ),
    Kind(
        "a FramePack, a HunyuanVideo that looks back at earlier frames",
        NOT_YET,
        names=r"^clean_x_embedder\.",
        classes=("HunyuanVideoTransformer3DModelPacked", "HunyuanVideoFramepackTransformer3DModel"),
    ),
    Kind(
        "the VAE of Wan2.2-TI2V-5B, of 48 channels",
        f"{NOT_YET}; expected that of Wan2.1, which Wan2.2-A14B has too",
        names=r"^(encoder\.downsamples|decoder\.upsamples)\.\d+\.(down|up)samples\.|"
        r"^encoder\.down_blocks\.\d+\.resnets\.\d+\.norm1\.gamma$",
        sizes=({"conv2.weight": (0, 48), "decoder.conv1.weight": (1, 48)}, {"post_quant_conv.weight": (0, 48)}),
    ),
    Kind(
        "the VAE of a Stable Diffusion, of 4 channels",
        f"{NOT_YET}; expected that of FLUX.1",
        sizes=tuple(
            {"decoder.conv_in.weight": (1, 4), norm: (0, 512)}
            for norm in ("decoder.mid.attn_1.norm.weight", "decoder.mid_block.attentions.0.group_norm.weight")
        ),
    ),
    Kind(
        "HunyuanImage or HunyuanVideo 1.5",
        NOT_YET,
        names=r"^(byt5_in|vision_in|cond_type_embedding|context_embedder_2)\.",
    ),
)

STRANGERS = (
    Kind("Qwen-Image", NOT_YET, names=r"^transformer_blocks\.\d+\.(img|txt)_mod\.1\."),
    Kind("Stable Diffusion 3", NOT_YET, names=r"^joint_blocks\.\d+\.(context|x)_block\."),
    Kind("LTX-Video", NOT_YET, names=r"^patchify_proj\."),
    Kind("PixArt", NOT_YET, names=r"^adaln_single\."),
    Kind("Mochi", NOT_YET, names=r"^t5_yproj\."),
    Kind(
        "a U-Net of Stable Diffusion",
        f"{NOT_YET}; expected a diffusion transformer",
        names=r"^(input_blocks|output_blocks|middle_block)\.\d|^down_blocks\.\d+\.attentions\.|^mid_block\.attentions\.0\.proj_in",
    ),
    Kind(
        "a file of several networks, none of which is a known transformer",
        "expected FLUX.1, HunyuanVideo or Wan",
        names=r"^model\.diffusion_model\.",
    ),
    Kind(
        "HunyuanVideo's VAE",
        NOT_YET,
        names=r"^(vae\.)?(encoder|decoder)\.conv_in\.conv\.",
    ),
    Kind(
        "a VAE that is none of those known",
        f"{NOT_YET}; expected that of FLUX.1 or Wan2.1",
        names=r"^(vae\.|first_stage_model\.)?(encoder|decoder)\."
        r"(conv_in|conv1|mid|mid_block|middle|down|up|down_blocks|up_blocks|downsamples|upsamples)\.",
    ),
    Kind(
        "a small VAE for previews (TAESD, TAEHV)",
        f"it cannot be had by itself; {INSTEAD}",
        names=r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(conv\.\d+\.)?weight$",
    ),
    Kind(
        "a SigLIP alone",
        f"it cannot be had by itself; {INSTEAD}",
        names=r"(^|\.)vision_model\.head\.",
    ),
    Kind(
        "a CLIP image encoder",
        NOT_YET,
        names=r"(^|\.)vision_model\.|(^|\.)embeddings\.(class|patch)_embedding\b|^visual\.",
    ),
    Kind(
        "a CLIP text encoder in other names than those of transformers",
        f"{NOT_YET}; expected one as in FLUX.1's text_encoder/",
        names=r"(^|\.)resblocks\.\d|^textual\.|\.text_model\.(encoder|embeddings)\.",
    ),
    Kind(
        "a T5 or UMT5 without its encoder, or in other names than those of transformers and Wan",
        f"{NOT_YET}; expected one as in FLUX.1's text_encoder_2/ or Wan's text_encoder/",
        names=r"\.encoder\.block\.\d+\.layer\.|(^|\.)decoder\.block\.\d+\.layer\.|^enc\.blk\.\d+\.",
    ),
    Kind(
        "a language model alone, as HunyuanVideo's text encoder is",
        f"it cannot be had by itself; {INSTEAD}",
        names=r"(^|(?<!encoder)\.)layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.",
    ),
)


def recognise(
    kinds: Iterable[Kind],
    shapes: Mapping[str, tuple[int, ...]],
    stated: Mapping[str, Any] = {},
    index: Mapping[str, Any] = {},
    files: Iterable[str] = (),
) -> str | None:
    """A sentence on the first of the kinds that fits a file: what it is, and its verdict; None where none fits.

    Args:
        kinds: RELATED or STRANGERS.
        shapes: of all tensors.
        stated: config.json beside them.
        index: model_index.json of the folder above.
        files: names of the files that hold the tensors.
    """
    # One name per line, with prefixes and without: one search for each kind, whatever the number of names.
    lines = "\n".join([*shapes, *(PREFIX.sub("", name) for name in shapes)])
    classes = {str(content.get("_class_name")) for content in (stated, index)}
    for kind in kinds:
        named = kind.names and re.search(kind.names, lines, re.MULTILINE)
        told = classes & set(kind.classes) or any(stated.get(field) is not None for field in kind.fields)
        told = told or (kind.files and re.search(kind.files, " ".join(files), re.IGNORECASE))
        if named or told or any(has(shapes, places) for places in kind.sizes):
            return f"{kind.what}: {kind.verdict}"
    return None


def has(shapes: Mapping[str, tuple[int, ...]], places: Places) -> bool:
    """Whether the tensors have all of these sizes."""
    return all(shapes.get(name, ())[axis : axis + 1] == (size,) for name, (axis, size) in places.items())
