"""CLIP, T5 and UMT5 against transformers (golden/make_text_golden.py), and their files in every spelling."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_torch_pickle import write_tensors

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, inspect, load, open_source, read
from chipmunk_jax.convert import t5 as t5_tables
from chipmunk_jax.convert.naming import TRANSFORMERS
from chipmunk_jax.convert.source import layouts
from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import scan_layers
from chipmunk_jax.models import UMT5_XXL, ClipTextConfig, T5Config, clip, t5
from chipmunk_jax.models.checkpoint import abstract, leaves_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("clip_text", "t5", "umt5")
TOLERANCE = 1e-4  # float32 sums in another order; found: 9e-6
END = 50


def folder_of(name):
    return GOLDEN / name / "text_encoder"


def tensors_of(name):
    return load_file(folder_of(name) / "model.safetensors")


def stated_of(name):
    return json.loads((folder_of(name) / "config.json").read_text())


def write(folder, tensors, stated=None):
    """A folder of these tensors and this config.json."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if stated is not None:
        (folder / "config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def models():
    return {name: read(folder_of(name), "float32") for name in NAMES}


@pytest.fixture(scope="module")
def golden():
    return {name: load_file(GOLDEN / name / "io.safetensors") for name in NAMES}


run = jax.jit(lambda model, *given: model(*given))


def inputs(io):
    """ids, and mask where the model was given one."""
    masks = [io["in.attention_mask"] > 0] if "in.attention_mask" in io else []
    return [jnp.asarray(a) for a in (io["in.input_ids"], *masks)]


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def assert_same(found, expected):
    assert found.config == expected.config and found.dtype == expected.dtype
    jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(expected))


@pytest.mark.parametrize("name", NAMES)
def test_states_after_every_layer_equal_the_original(name, models, golden, monkeypatch):
    seen, model, io = [], models[name], golden[name]

    def scan_each(blocks, x, *args):
        for layer in range(2):
            x = scan_layers(jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], blocks), x, *args)
            seen.append(x)
        return x

    monkeypatch.setattr(clip, "scan_layers", scan_each)
    monkeypatch.setattr(t5, "scan_layers", scan_each)
    out = model(*(inputs(io)[:1] if name == "t5" else inputs(io)))
    out, pooled = out if name == "clip_text" else (out, None)
    assert len(seen) == 2
    for layer, state in enumerate(seen):
        assert_close(state, io[f"layer.{layer}"])
    assert_close(out, io["out"])
    if name == "clip_text":
        assert_close(pooled, io["pooled.2"])


def test_a_t5_that_is_masked_equals_the_original(models, golden):
    assert_close(run(models["t5"], *inputs(golden["t5"])), golden["t5"]["masked.out"])
    assert not np.allclose(golden["t5"]["masked.out"], golden["t5"]["out"], atol=1e-2)


def test_the_end_token_is_the_first_of_its_id(golden, tmp_path):
    """With id 2, as CLIP-L was published, it is the largest id of a row instead: another token of the first prompt."""
    io = golden["clip_text"]
    model = read(
        write(tmp_path / "end", tensors_of("clip_text"), stated_of("clip_text") | {"eos_token_id": END}), "float32"
    )
    assert model.config.eos_token_id == END
    assert_close(run(model, *inputs(io))[1], io[f"pooled.{END}"])
    assert not np.allclose(io["pooled.2"][0], io[f"pooled.{END}"][0], atol=1e-2)


def test_buckets_of_distances_are_those_of_the_original(golden):
    expected = golden["t5"]["buckets.32.128"]  # of distances from -300 to 300
    found = t5.relative_buckets(301, 32, 128)
    np.testing.assert_array_equal(found[0], expected[300:])
    np.testing.assert_array_equal(found[::-1, 0], expected[:301])


def test_padding_with_a_mask_does_not_change_the_states_of_a_prompt(models, golden):
    ids, mask = inputs(golden["umt5"])
    expected = run(models["umt5"], ids, mask)
    other = jnp.where(mask, ids, 7)
    np.testing.assert_array_equal(run(models["umt5"], other, mask)[mask], expected[mask])
    short = run(models["umt5"], ids[1:, :11], mask[1:, :11])
    np.testing.assert_allclose(short[0], expected[1, :11], atol=1e-5)
    assert jnp.isfinite(run(models["umt5"], ids, jnp.zeros_like(mask))).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_items(name, models, golden):
    given = inputs(golden[name])
    whole = jax.tree.leaves(run(models[name], *given))
    for i in range(len(given[0])):
        for one, all_of in zip(jax.tree.leaves(run(models[name], *(a[i : i + 1] for a in given))), whole, strict=True):
            np.testing.assert_allclose(one[0], all_of[i], atol=1e-5)


def test_no_token_of_clip_looks_at_a_later_one(models, golden):
    (ids,) = inputs(golden["clip_text"])
    later = ids.at[:, 9:].set(5)
    expected = run(models["clip_text"], ids)[0]
    np.testing.assert_array_equal(run(models["clip_text"], later)[0][:, :9], expected[:, :9])


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_the_states_are_close_and_norms_stay_in_float32(name, models, golden):
    model = read(folder_of(name), "bfloat16")
    for path, leaf in leaves_of(model).items():
        assert leaf.dtype == (jnp.float32 if "norm" in path else jnp.bfloat16), path
    found, expected = (jax.tree.leaves(run(one, *inputs(golden[name]))) for one in (model, models[name]))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)  # found: 0.015; steps of bf16 are 0.004 to 0.008


def test_what_does_not_fit_is_refused(models):
    with pytest.raises(InputError, match="17 tokens: expected at most 16"):
        models["clip_text"](jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(InputError, match="dtype=float16: T5's activations reach beyond it"):
        read(folder_of("t5"), "float16")
    for wrong in ({"num_attention_heads": 5}, {"num_attention_heads": 0}, {"eos_token_id": 49_408}):
        with pytest.raises(InputError, match="expected"):
            ClipTextConfig(**wrong)
    for wrong in (dict(buckets=5), dict(buckets=2), dict(buckets=32, max_distance=8)):
        with pytest.raises(InputError, match="expected an even number"):
            T5Config(**{f"relative_attention_{'num_' * (n == 'buckets')}{n}": x for n, x in wrong.items()})


# Files.


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_encoder_loads_as_it_was(name, models, tmp_path):
    convert(folder_of(name), tmp_path / name, dtype="float32", progress=False)
    assert_same(load(tmp_path / name), models[name])
    found = inspect(tmp_path / name)
    assert found.whole and found.model == ("t5" if "t5" in name else name)


def clip_of_transformers_4(buffer=False, images=False):
    tensors = {f"text_model.{name}": array for name, array in tensors_of("clip_text").items()}
    if buffer:
        tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    if images:
        names = (
            "vision_model.embeddings.class_embedding",
            "text_projection.weight",
            "visual_projection.weight",
            "logit_scale",
        )
        tensors |= dict.fromkeys(names, np.ones((2, 2), np.float16))
    return tensors


def t5_with(name, *tokens, **others):
    tensors = tensors_of(name)
    shared = tensors.pop("shared.weight")
    return tensors | dict.fromkeys(tokens, shared) | others


SPELLINGS = {
    "transformers 4": ("clip_text", clip_of_transformers_4(), ()),
    "with the buffer": ("clip_text", clip_of_transformers_4(buffer=True), ()),
    "a whole CLIP": (
        "clip_text",
        clip_of_transformers_4(images=True),
        ("logit_scale", "text_projection", "vision_model", "visual_projection"),
    ),
    "T5, the other name": ("t5", t5_with("t5", "encoder.embed_tokens.weight"), ()),
    "T5, both names": ("t5", t5_with("t5", "shared.weight", "encoder.embed_tokens.weight"), ()),
    "UMT5, both names": ("umt5", t5_with("umt5", "encoder.embed_tokens.weight", "shared.weight"), ()),
    "UMT5 of ComfyUI": (
        "umt5",
        t5_with("umt5", "shared.weight", spiece_model=np.zeros(9, np.uint8)),
        ("spiece_model",),
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(spelling, models, tmp_path):
    name, tensors, left_out = SPELLINGS[spelling]
    folder = write(tmp_path / "source", tensors, stated_of(name))
    for path in (folder, folder / "model.safetensors"):
        assert_same(read(path, "float32"), models[name])
    found = inspect(folder)
    assert found.whole and tuple(sorted(found.left_out)) == left_out
    assert found.parameters == sum(a.size for a in tensors_of(name).values())


def test_the_wan_team_s_file_gives_the_same_weights(models, tmp_path):
    """Its names for the same tensors, by the two tables rule for rule; without a config.json the distances are the usual ones."""
    tensors, renamed = tensors_of("umt5"), {}
    for theirs, original in zip(
        *map(t5_tables.table, (t5_tables.TRANSFORMERS_NAMES, t5_tables.ORIGINAL_NAMES)), strict=True
    ):
        for a, b in zip(theirs.sources, original.sources, strict=True):
            for layer in "01":
                renamed[b.replace("*", layer)] = tensors[a.replace("*", layer)]
    assert len(renamed) == len(tensors)
    assert {
        "token_embedding.weight", "blocks.1.norm1.weight", "blocks.0.attn.q.weight", "blocks.0.attn.o.weight",
        "blocks.1.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight", "blocks.0.ffn.fc1.weight",
        "blocks.1.ffn.fc2.weight", "norm.weight",
    } <= renamed.keys()  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"}))
    file = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    write_tensors(file, {key: array.astype(np.float32) for key, array in renamed.items()})
    model = read(file, "float32")
    jax.tree.map(np.testing.assert_array_equal, leaves_of(model), leaves_of(models["umt5"]))
    assert (model.config.d_kv, model.config.num_heads, model.config.relative_attention_max_distance) == (8, 3, 128)


def test_two_names_with_different_values_are_refused(tmp_path):
    tensors = t5_with("t5", "shared.weight")
    other = tensors["shared.weight"].copy()
    other[-1, -1] += 1
    source = write(tmp_path / "values", tensors | {"encoder.embed_tokens.weight": other}, stated_of("t5"))
    with pytest.raises(InputError, match=r"shared.weight and encoder.embed_tokens.weight differ, expected one tensor"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    source = write(tmp_path / "shapes", tensors | {"encoder.embed_tokens.weight": other[1:]}, stated_of("t5"))
    with pytest.raises(InputError, match=r"1 doubled: encoder.embed_tokens.weight"):
        convert(source, tmp_path / "out", progress=False)


def test_inspect_describes_an_encoder(capsys):
    assert main(["inspect", str(folder_of("umt5"))]) == 0
    said = capsys.readouterr().out
    assert "t5 (transformers-umt5)" in said and "d_model" in said and "sample" not in said


# config.json, as published in FLUX.1-dev, HunyuanVideo and Wan2.1 for diffusers.
CLIP_L = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "vocab_size": 49408,
}  # fmt: skip
T5_XXL = {
    "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240,
    "d_kv": 64, "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
UMT5 = T5_XXL | {
    "_name_or_path": "google/umt5-xxl", "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "scalable_attention": True,
    "tokenizer_class": "T5Tokenizer", "vocab_size": 256384,
}  # fmt: skip
PUBLISHED = {ClipTextConfig(): CLIP_L, T5Config(): T5_XXL, UMT5_XXL: UMT5}
PARAMETERS = (123_060_480, 4_762_310_656, 5_680_910_336)  # of the PyTorch models
LAYOUTS = {(layout.model, layout.name): layout for layout in layouts()}


def model_of(config):
    return "clip_text" if isinstance(config, ClipTextConfig) else "t5"


def shapes_of(config):
    """Shapes of the tensors that tell the sizes, in the names of transformers 4."""
    c = config
    if isinstance(c, ClipTextConfig):
        layers = {
            f"text_model.encoder.layers.{i}.mlp.fc1.bias": (c.intermediate_size,) for i in range(c.num_hidden_layers)
        }
        return layers | {
            "text_model.embeddings.token_embedding.weight": (c.vocab_size, c.hidden_size),
            "text_model.embeddings.position_embedding.weight": (c.max_position_embeddings, c.hidden_size),
            "text_model.final_layer_norm.weight": (c.hidden_size,),
        }
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    layers = {f"encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight": (c.d_ff, c.d_model) for i in range(c.num_layers)}
    return layers | {
        "shared.weight": (c.vocab_size, c.d_model), "encoder.final_layer_norm.weight": (c.d_model,),
        "encoder.block.3.layer.0.SelfAttention.q.weight": (c.num_heads * c.d_kv, c.d_model),
        f"encoder.block.0.{bias}": (c.relative_attention_num_buckets, c.num_heads),
    }  # fmt: skip


@pytest.mark.parametrize(("config", "stated"), PUBLISHED.items(), ids=NAMES)
def test_published_configs_fit(config, stated):
    """With their config.json, as transformers 4 or 5 writes it, and as a file alone."""
    layout = LAYOUTS[model_of(config), "transformers-umt5" if config == UMT5_XXL else "transformers"]
    assert layout.configure(shapes_of(config), {}) == config
    assert layout.configure(shapes_of(config), stated) == config
    newer = {name: value for name, value in stated.items() if name != "torch_dtype"} | {"dtype": "bfloat16"}
    assert layout.configure(shapes_of(config), newer) == config


def test_published_sizes_have_as_many_parameters():
    for config, expected in zip(PUBLISHED, PARAMETERS, strict=True):
        leaves = leaves_of(abstract(model_of(config), config)).values()
        assert sum(leaf.size for leaf in leaves) == expected


WRONG = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1e-5,
    2.0,
    512,
    "2",
    "relu",
    "",
    [],
    [2],
    ["UMT5"],
    {},
    {"a": 1},
    10**400,
    float("nan"),
)
# What no tensor tells, and is used.
USED = {
    "clip_text": {"num_attention_heads": [1], "eos_token_id": [1, 3]},
    "t5": {"relative_attention_max_distance": [3, 512]},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_of_any_field_is_refused(name):
    source, good = open_source(folder_of(name)), stated_of(name)
    shapes = {key: tensor.shape for key, tensor in source.weights.tensors.items()}
    model = source.layout.model
    for field in (*good, "stranger", "text_config", "num_labels"):
        if field in TRANSFORMERS or (field == "eos_token_id" and model == "t5"):
            continue
        for value in WRONG:
            fits = [good[field]] if field in good else []
            if json.dumps(value) in map(json.dumps, [*fits, *USED[model].get(field, ())]):
                source.layout.configure(shapes, good | {field: value})
                continue
            with pytest.raises(InputError) as error:
                source.layout.configure(shapes, good | {field: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 300, field


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("clip_text", "hidden_act", "gelu", "hidden_act='gelu' where the network has quick_gelu"),
        ("clip_text", "architectures", ["CLIPModel"], "config.json is of a CLIPModel, expected CLIPTextModel"),
        ("t5", "feed_forward_proj", "relu", "feed_forward_proj='relu' where the network has gated-gelu"),
        ("t5", "d_kv", 64, "d_kv=64 where the tensors have 8"),
        ("t5", "architectures", ["UMT5EncoderModel"], "config.json is of a UMT5EncoderModel, expected T5EncoderModel"),
        ("umt5", "architectures", ["T5EncoderModel"], "config.json is of a T5EncoderModel, expected UMT5EncoderModel"),
        ("umt5", "num_layers", 24, "num_layers=24 where the tensors have 2"),
    ],
)
def test_what_another_encoder_says_is_refused(name, field, value, said, tmp_path):
    source = write(tmp_path / "source", tensors_of(name), stated_of(name) | {field: value})
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "out", progress=False)
    assert said in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_or_unknown_is_named(name, tmp_path):
    tensors = tensors_of(name)
    lost = next(
        key for key in tensors if key.endswith((".1.self_attn.k_proj.bias", ".1.layer.0.SelfAttention.k.weight"))
    )
    tensors["encoder.stranger"] = tensors.pop(lost)
    found = inspect(write(tmp_path / "source", tensors, stated_of(name)))
    assert found.missing == [lost] and found.unknown == ["encoder.stranger"] and not found.whole
