"""The encoders of T5 v1.1 and UMT5: the tables of their layouts, and their config from shapes.

"transformers" is diffusers' text_encoder_2/ of FLUX.1, and t5xxl_fp16.safetensors; "transformers-umt5" is diffusers'
text_encoder/ of Wan, and umt5_xxl_fp16.safetensors; "original" is the Wan team's models_t5_umt5-xxl-enc-bf16.pth. Sources:
transformers models/t5/modeling_t5.py, models/umt5/modeling_umt5.py; Wan-Video/Wan2.1 wan/modules/t5.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from chipmunk_jax.convert.naming import ANY, TRANSFORMERS, check_stated, count_layers, measure, stated_size
from chipmunk_jax.convert.rules import Layout, Rule
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.t5 import T5Config

TRANSFORMERS_NAMES = {
    "tokens": "shared", "blocks": "encoder.block.", "final": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm", "attention": "layer.0.SelfAttention", "bias": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm", "gate": "layer.1.DenseReluDense.wi_0", "fc1": "layer.1.DenseReluDense.wi_1",
    "fc2": "layer.1.DenseReluDense.wo",
}  # fmt: skip
ORIGINAL_NAMES = {
    "tokens": "token_embedding", "blocks": "blocks.", "final": "norm", "norm1": "norm1", "attention": "attn",
    "bias": "pos_embedding.embedding", "norm2": "norm2", "gate": "ffn.gate.0", "fc1": "ffn.fc1", "fc2": "ffn.fc2",
}  # fmt: skip


def table(names: dict[str, str]) -> tuple[Rule, ...]:
    """Rules from the names of a layout, of an encoder with one position bias and of one with a bias in every layer."""
    n, layer = names, f"{names['blocks']}*."
    rules = {
        (n["tokens"],): "token_embedding",
        (f"{n['blocks']}0.{n['bias']}",): "relative_bias",
        (layer + n["bias"],): "blocks.relative_bias",
        (layer + n["norm1"],): "blocks.norm1",
        tuple(f"{layer}{n['attention']}.{x}" for x in "qkv"): "blocks.qkv.kernel.T",
        (f"{layer}{n['attention']}.o",): "blocks.proj.kernel.T",
        (layer + n["norm2"],): "blocks.norm2",
        (layer + n["gate"], layer + n["fc1"]): "blocks.fc1.kernel.T",
        (layer + n["fc2"],): "blocks.fc2.kernel.T",
        (n["final"],): "final_norm",
    }
    return tuple(Rule(tuple(f"{source}.weight" for source in sources), (target,)) for sources, target in rules.items())


def configure(
    names: dict[str, str], bias_in_every_layer: bool, shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]
) -> T5Config:
    """T5Config of a checkpoint.

    Args:
        names: of the layout.
        bias_in_every_layer: whether it is a UMT5.
        shapes: of all tensors.
        stated: config.json of transformers; empty where there is none.

    Raises:
        InputError: the tensors are of no such encoder, or config.json says other than they or the network.
    """
    n, layer = names, f"{names['blocks']}*."
    size = lambda *places: measure(shapes, tuple((f"{name}.weight", axis) for name, axis in places))
    heads, inner = size((layer + n["bias"], 1)), size((f"{layer}{n['attention']}.q", 0))
    sizes = {
        "vocab_size": size((n["tokens"], 0), ("encoder.embed_tokens", 0)),
        "d_model": size((n["final"], 0), (layer + n["norm1"], 0)),
        "d_ff": size((layer + n["fc1"], 0)),
        "num_heads": heads,
        "relative_attention_num_buckets": size((layer + n["bias"], 0)),
    }
    # A size that no tensor tells belongs to a missing tensor, which the match will name.
    told = {name: value or stated_size(stated, (name,), getattr(T5Config, name)) for name, value in sizes.items()}
    layers = count_layers(shapes, n["blocks"])
    if not layers or (inner and inner % told["num_heads"]):
        raise InputError(f"no T5 has queries of width {inner}, {layers} layers and {heads} heads, as the tensors say")
    config = T5Config(
        **told,
        d_kv=inner // told["num_heads"] if inner else T5Config.d_kv,
        num_layers=layers,
        relative_attention_max_distance=stated_size(
            stated, ("relative_attention_max_distance",), T5Config.relative_attention_max_distance
        ),
        bias_in_every_layer=bias_in_every_layer,
    )
    network = {
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "eos_token_id": ANY,
        "model_type": "umt5" if bias_in_every_layer else "t5",
        "architectures": (CLASSES[bias_in_every_layer],),
    }
    check_stated(stated, sizes | {"d_kv": inner and config.d_kv, "num_layers": layers}, TRANSFORMERS | network)
    return config


CLASSES = {False: "T5EncoderModel", True: "UMT5EncoderModel"}  # by bias_in_every_layer
MARKS = ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.final_layer_norm.weight")
OF_TRANSFORMERS = dict(
    model="t5",
    rules=table(TRANSFORMERS_NAMES),
    aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
    beside="spiece_model",  # the tokenizer, which ComfyUI puts into the file
)
LAYOUTS = (
    Layout(
        **OF_TRANSFORMERS,
        class_name=CLASSES[False],
        name="transformers",
        marks=MARKS,
        configure=partial(configure, TRANSFORMERS_NAMES, False),
    ),
    Layout(
        **OF_TRANSFORMERS,
        class_name=CLASSES[True],
        name="transformers-umt5",
        marks=(*MARKS, *(MARKS[0].replace("0", str(layer), 1) for layer in (1, 2))),
        configure=partial(configure, TRANSFORMERS_NAMES, True),
    ),
    Layout(
        model="t5",
        class_name="T5Encoder",
        name="original",
        marks=("blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight"),
        rules=table(ORIGINAL_NAMES),
        configure=partial(configure, ORIGINAL_NAMES, True),
    ),
)
