"""config.json against the tensors and the network: every field is used, compared, known not to matter, or refused."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chipmunk_jax.convert import convert, inspect, open_source, read
from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.convert.naming import LAYERS
from chipmunk_jax.convert.source import layout_of, layouts
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import FluxConfig, HunyuanVideoConfig, WanConfig
from chipmunk_jax.models.leaves import leaves_of

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = (
    *(f"{name}/transformer" for name in ("flux_dev", "flux_schnell", "hunyuan_video", "wan_t2v", "wan_i2v")),
    "flux_vae/vae",
    "wan_vae/vae",
)
WAN_14B = dict(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)

# As published. The first word of a name is the network, the last the layout.
DIFFUSERS_FLUX = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev",
    "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
DIFFUSERS_HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel", "_diffusers_version": "0.32.0.dev0", "attention_head_dim": 128,
    "guidance_embeds": True, "in_channels": 16, "mlp_ratio": 4.0, "num_attention_heads": 24, "num_layers": 20,
    "num_refiner_layers": 2, "num_single_layers": 40, "out_channels": 16, "patch_size": 2, "patch_size_t": 1,
    "pooled_projection_dim": 768, "qk_norm": "rms_norm", "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0,
    "text_embed_dim": 4096,
}  # fmt: skip
DIFFUSERS_WAN = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "image_dim": None,
    "in_channels": 16, "num_attention_heads": 12, "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
DIFFUSERS_WAN_14B = DIFFUSERS_WAN | {"ffn_dim": 13_824, "num_attention_heads": 40, "num_layers": 40}
ORIGINAL_WAN = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256,
    "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512,
}  # fmt: skip
ORIGINAL_WAN_14B = ORIGINAL_WAN | WAN_14B
PUBLISHED = {
    "FLUX.1-dev": ("flux", FluxConfig(), DIFFUSERS_FLUX),
    "FLUX.1-schnell": (
        "flux",
        FluxConfig(guidance_embed=False),
        DIFFUSERS_FLUX | {"guidance_embeds": False, "out_channels": None, "axes_dims_rope": [16, 56, 56]},
    ),
    "HunyuanVideo": ("hunyuan", HunyuanVideoConfig(), DIFFUSERS_HUNYUAN),
    "HunyuanVideo, newer": ("hunyuan", HunyuanVideoConfig(), DIFFUSERS_HUNYUAN | {"image_condition_type": None}),
    "Wan2.1-T2V-1.3B-Diffusers": ("wan-diffusers", WanConfig(), DIFFUSERS_WAN),
    "Wan2.1-T2V-14B-Diffusers": ("wan-diffusers", WanConfig(**WAN_14B), DIFFUSERS_WAN_14B),
    "Wan2.1-I2V-14B-Diffusers": (
        "wan-diffusers",
        WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
        DIFFUSERS_WAN_14B
        | {"added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36, "pos_embed_seq_len": None},
    ),
    "Wan2.2-I2V-A14B-Diffusers": (
        "wan-diffusers",
        WanConfig(**WAN_14B, in_dim=36),
        DIFFUSERS_WAN_14B | {"in_channels": 36, "pos_embed_seq_len": None},
    ),
    "Wan2.1-T2V-1.3B": ("wan-original", WanConfig(), ORIGINAL_WAN),
    "Wan2.1-T2V-14B": ("wan-original", WanConfig(**WAN_14B), ORIGINAL_WAN_14B),
    "Wan2.1-I2V-14B": (
        "wan-original",
        WanConfig(**WAN_14B, in_dim=36, image_dim=1280),
        ORIGINAL_WAN_14B | {"in_dim": 36, "model_type": "i2v"},
    ),
    "Wan2.2-I2V-A14B": (
        "wan-original",
        WanConfig(**WAN_14B, in_dim=36),
        ORIGINAL_WAN_14B | {"in_dim": 36, "model_type": "i2v"},
    ),
    "Wan2.2-TI2V-5B": (
        "wan-original",
        WanConfig(dim=3072, ffn_dim=14_336, num_heads=24, in_dim=48, out_dim=48),
        ORIGINAL_WAN
        | {"dim": 3072, "ffn_dim": 14_336, "num_heads": 24, "in_dim": 48, "out_dim": 48, "model_type": "ti2v"},
    ),
}


def flux_shapes(c):
    """What tells the sizes of a FLUX in diffusers' layout."""
    d = c.hidden_size
    blocks = {f"transformer_blocks.{i}.ff.net.0.proj.weight": (4 * d, d) for i in range(c.depth)}
    blocks |= {f"single_transformer_blocks.{i}.attn.norm_k.weight": (128,) for i in range(c.depth_single_blocks)}
    guidance = {"time_text_embed.guidance_embedder.linear_1.weight": (d, 256)} if c.guidance_embed else {}
    return blocks | guidance | {
        "x_embedder.weight": (d, c.in_channels), "x_embedder.bias": (d,), "context_embedder.weight": (d, c.context_in_dim),
        "time_text_embed.text_embedder.linear_1.weight": (d, c.vec_in_dim),
    }  # fmt: skip


def hunyuan_shapes(c):
    """What tells the sizes of a HunyuanVideo in diffusers' layout."""
    d = c.hidden_size
    blocks = {f"transformer_blocks.{i}.ff.net.0.proj.bias": (4 * d,) for i in range(c.depth)}
    blocks |= {f"single_transformer_blocks.{i}.attn.norm_k.weight": (128,) for i in range(c.depth_single_blocks)}
    blocks |= {f"context_embedder.token_refiner.refiner_blocks.{i}.norm1.bias": (d,) for i in range(c.refiner_depth)}
    return blocks | {
        "x_embedder.proj.weight": (d, c.in_channels, *c.patch_size), "x_embedder.proj.bias": (d,),
        "context_embedder.proj_in.weight": (d, c.context_in_dim), "proj_out.bias": (c.token_channels,),
        "time_text_embed.text_embedder.linear_1.weight": (d, c.vec_in_dim), "transformer_blocks.0.attn.norm_k.weight": (128,),
        "time_text_embed.guidance_embedder.linear_1.weight": (d, 256),
    }  # fmt: skip


def wan_shapes(c, fc1, time, text, head, image):
    """What tells the sizes of a Wan: names of a layout."""
    images = {f"{image}.weight": (c.image_dim, c.image_dim)} if c.image_dim else {}
    return images | {f"blocks.{i}.{fc1}.bias": (c.ffn_dim,) for i in range(c.num_layers)} | {
        "patch_embedding.weight": (c.dim, c.in_dim, *c.patch_size), "patch_embedding.bias": (c.dim,),
        f"{time}.weight": (c.dim, c.freq_dim), f"{text}.weight": (c.dim, c.text_dim), f"{head}.bias": (c.patch * c.out_dim,),
    }  # fmt: skip


SHAPES = {
    "flux": flux_shapes,
    "hunyuan": hunyuan_shapes,
    "wan-original": lambda c: wan_shapes(
        c, "ffn.0", "time_embedding.0", "text_embedding.0", "head.head", "img_emb.proj.1"
    ),
    "wan-diffusers": lambda c: wan_shapes(
        c,
        "ffn.net.0.proj",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.text_embedder.linear_1",
        "proj_out",
        "condition_embedder.image_embedder.ff.net.0.proj",
    ),
}
LAYOUT_OF = {(layout.class_name, layout.name): layout for layout in layouts()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_fit_their_networks(name):
    kind, config, stated = PUBLISHED[name]
    layout = LAYOUT_OF[stated["_class_name"], "original" if kind == "wan-original" else "diffusers"]
    assert layout.configure(SHAPES[kind](config), stated) == config
    assert layout.configure(SHAPES[kind](config), {}) == config


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    """(layout, shapes, config.json) of a golden checkpoint."""
    folder = GOLDEN / request.param
    weights = read_weights(folder)
    layout = layout_of(weights.tensors)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    return layout, shapes, json.loads((folder / "config.json").read_text())


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
    "x",
    "",
    [],
    [2],
    [1, 2, 3],
    [4, 6, 8],
    {},
    {"a": 1},
    10**400,
)
WRONG = (*WRONG, float("nan"), float("inf"), "x" * 1000)
# What means the same, or what no tensor tells and is used.
NUMBERS = (0, -1, 1, 3, 1e-5, 2.0, 512)
TRIPLES = ([1, 2, 3], [4, 6, 8])
FITS = {
    "flux_vae": {
        "norm_num_groups": [1],
        "scaling_factor": [number for number in NUMBERS if number > 0],
        "shift_factor": [None, *(number for number in NUMBERS if 0 <= number <= 1)],
        "sample_size": WRONG,
        "force_upcast": WRONG,
    },
    "wan_vae": {
        "dropout": WRONG,
        "latents_mean": TRIPLES,
        "latents_std": TRIPLES,
        "patch_size": [1],
    },
    "flux": {"out_channels": [None]},
    "hunyuan_video": {"out_channels": [None], "rope_theta": [3, 2.0, 512]},
    "wan": {"qk_norm": [True], "rope_max_seq_len": WRONG},
}


def test_a_wrong_value_of_any_field_is_refused(golden):
    """3,000 of them over the seven checkpoints."""
    layout, shapes, good = golden
    layout.configure(shapes, good)
    for name in (*good, "stranger", "theta"):
        for value in WRONG:
            written = json.dumps(value)
            fits = written in map(json.dumps, FITS[layout.model].get(name, ()))
            same = name in good and written == json.dumps(good[name])
            if name.startswith("_") or fits or same:
                layout.configure(shapes, good | {name: value})
                continue
            with pytest.raises(InputError) as error:
                layout.configure(shapes, good | {name: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 300, name


COUNTED = {"flux_vae": ("latent_channels", "layers_per_block"), "wan_vae": ("base_dim", "num_res_blocks")}


def test_all_that_is_wrong_is_one_sentence(golden):
    layout, shapes, good = golden
    first, second = COUNTED.get(layout.model, ("attention_head_dim", "num_layers"))
    with pytest.raises(InputError) as error:
        layout.configure(shapes, good | {second: 7, first: "16", "stranger": 1})
    said = f"{first}='16' where the tensors have {good[first]}, {second}=7 where the tensors have {good[second]}"
    assert all(part in str(error.value) for part in (*said.split(", "), "stranger, which is unknown"))


def copy(folder, target, change=lambda tensors: None, **fields):
    """A golden checkpoint with other tensors and other fields of its config.json."""
    source = GOLDEN / folder if "/" in folder else GOLDEN / folder / "transformer"
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    tensors = change(tensors) or tensors
    target.mkdir()
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | fields))
    return target


@pytest.mark.parametrize(
    ("folder", "last"), [("wan_t2v", "blocks.1."), ("hunyuan_video", "single_transformer_blocks.1.")]
)
def test_a_model_without_its_last_block_is_refused(folder, last, tmp_path):
    def cut(tensors):
        return {name: array for name, array in tensors.items() if not name.startswith(last)}

    source = copy(folder, tmp_path / "cut", cut)
    with pytest.raises(InputError, match=r"layers=2 where the tensors have 1"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_block_that_is_missing_between_others_is_named(tmp_path):
    def cut(tensors):
        return {name: array for name, array in tensors.items() if not name.startswith("blocks.0.")}

    assert len(inspect(copy("wan_t2v", tmp_path / "cut", cut)).missing) == 27


@pytest.mark.parametrize("layer", [LAYERS, 10**9, "9" * 400])
@pytest.mark.parametrize("folder", ["wan_t2v", "hunyuan_video"])
def test_a_layer_that_no_network_has_is_refused_at_once(folder, layer, tmp_path):
    block = "blocks" if folder == "wan_t2v" else "transformer_blocks"

    def add(tensors):
        tensors[f"{block}.{layer}.attn.norm_k.weight"] = np.zeros(16, np.float32)

    with pytest.raises(InputError, match="expected fewer than 1,000 layers") as error:
        open_source(copy(folder, tmp_path / "deep", add))
    assert len(str(error.value)) < 400


PATCH = {"wan_t2v": "patch_embedding.weight", "hunyuan_video": "x_embedder.proj.weight"}


@pytest.mark.parametrize("form", ["matrix", "image"])
@pytest.mark.parametrize("folder", PATCH)
def test_a_patch_embedding_may_be_a_matrix_or_of_images(folder, form, tmp_path):
    def reshape(tensors):
        weight = tensors[PATCH[folder]]
        tensors[PATCH[folder]] = weight.reshape(len(weight), -1) if form == "matrix" else weight[:, :, 0]

    expected = read(GOLDEN / folder / "transformer", "float32")
    found = read(copy(folder, tmp_path / form, reshape), "float32")
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(expected))


@pytest.mark.parametrize("shape", [(-1,), (32, -1, 1), (32, 1, 1, 1, 1, -1), (32, 0), (32, 0, 2, 2), (32, 4, 1, 0, 2)])
@pytest.mark.parametrize("folder", PATCH)
def test_a_patch_embedding_of_another_rank_or_with_an_empty_axis_is_misshapen(folder, shape, tmp_path):
    def reshape(tensors):
        weight = tensors[PATCH[folder]]
        tensors[PATCH[folder]] = np.zeros(shape, np.float32) if 0 in shape else weight.reshape(shape)

    source = copy(folder, tmp_path / "rank", reshape)
    with pytest.raises(InputError, match=f"misshapen: {PATCH[folder]} .*, expected .D, C, frames, rows, columns"):
        convert(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "empty", [lambda shape: (0,) * len(shape), lambda shape: (*shape[:-1], 0)], ids=["all", "last"]
)
@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_tensors_with_an_empty_axis_are_one_error(folder, empty, tmp_path):
    def cut(tensors):
        return {name: np.zeros(empty(array.shape), np.float32) for name, array in tensors.items()}

    with pytest.raises(InputError):
        open_source(copy(folder, tmp_path / "empty", cut)).check()


@pytest.mark.parametrize("text", ["", "[]", "3", "[[1, 2]]", "{", '{"a": ' * 100_000])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    source = copy("wan_t2v", tmp_path / "bad")
    (source / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"^{source}/config.json: not a JSON object"):
        open_source(source)


def test_what_config_json_says_of_the_file_does_not_matter(tmp_path):
    about = dict(dtype="bfloat16", torch_dtype="float16", quantization_config=None)
    assert open_source(copy("wan_t2v", tmp_path / "about", **about)).check()


@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (os.mkfifo, "no regular file, expected a file"),
        (os.mkdir, "a folder, expected a file"),
        (lambda path: path.symlink_to("nothing"), "no regular file"),
        (lambda path: path.symlink_to(path), "no regular file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
    ],
)
def test_a_config_that_is_there_is_read_or_refused(name, make, expected, tmp_path):
    source = copy("wan_t2v", tmp_path / "bad")
    (source / name).unlink(missing_ok=True)
    make(source / name)
    with pytest.raises(InputError, match=f"^{source}/{name}: {expected}"):
        open_source(source)


def test_a_missing_tensor_is_named_rather_than_a_config_that_does_not_fit(tmp_path):
    def cut(tensors):
        del tensors["patch_embedding.weight"], tensors["proj_out.bias"]

    found = inspect(copy("wan_i2v", tmp_path / "cut", cut))
    assert sorted(found.missing) == ["patch_embedding.weight", "proj_out.bias"] and not found.misshapen
    shutil.rmtree(tmp_path / "cut")
