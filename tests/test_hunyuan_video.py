"""HunyuanVideo against the PyTorch original (golden/make_hunyuan_video_golden.py), and the laws it obeys by itself."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_torch_pickle import emit, tensor, write_archive

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, sample, shifted_timesteps
from chipmunk_jax.convert import convert, load, open_source, read
from chipmunk_jax.convert import hunyuan_video as tables
from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.layers import run_layers
from chipmunk_jax.models import hunyuan_video, mmdit
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.pipelines import Pipeline

GOLDEN = Path(__file__).parent / "golden/hunyuan_video"
GRID = (3, 3, 4)
# As in test_flux.py: float32 knows the angle 1000 guidance = 2000 radians to 1e-4.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def model():
    return read(GOLDEN / "transformer", dtype="float32")


@pytest.fixture(scope="module")
def weights():
    """Tensors of the checkpoint, f32."""
    tensors = read_weights(GOLDEN / "transformer").tensors
    return {name: np.asarray(tensor.read(), np.float32) for name, tensor in tensors.items()}


def tokens(video):
    """Latents [B, C, T, 2 h, 2 w] as tokens [B, T h w, C 2 2], channels in the order (channel, row, column)."""
    batch, channels, frames, height, width = video.shape
    patches = video.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).transpose(0, 2, 3, 5, 1, 4, 6)
    return jnp.asarray(patches.reshape(batch, -1, channels * 4))


def inputs(golden):
    """Arguments of a HunyuanVideo, as the original was given them."""
    cond = {
        "text": golden["in.encoder_hidden_states"],
        "mask": golden["in.encoder_attention_mask"] > 0,
        "pooled": golden["in.pooled_projections"],
        "guidance": golden["in.guidance"] / 1000,
    }
    return (
        tokens(golden["in.hidden_states"]),
        jnp.asarray(golden["in.timestep"] / 1000),
        jax.tree.map(jnp.asarray, cond),
    )


@nnx.jit
def forward(model, x, t, cond):
    """The velocity alone, compiled once."""
    return model(x, t, cond, model.positions(GRID))[0]


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_output_equals_the_original(model, golden):
    out = forward(model, *inputs(golden))
    assert out.dtype == jnp.float32
    assert_close(out, tokens(golden["out"]))


def test_every_block_equals_the_original(model, golden, monkeypatch):
    """In all rows but those of padded text, which nobody reads."""
    seen = []

    def run_each(blocks, x, cache, *args, step, unroll=False, per_layer=(), first=0):
        for layer in range(2):
            one, own = jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], (blocks, tuple(per_layer)))
            x, _ = run_layers(one, x, cache, *args, step=step, per_layer=own)
            seen.append(x)
        return x, cache

    for module in (hunyuan_video, mmdit):  # the refiner is in the one, the joint blocks in the other
        monkeypatch.setattr(module, "run_layers", run_each)
    x, t, cond = inputs(golden)
    model(x, t, cond, model.positions(GRID))
    valid = np.asarray(cond["mask"])
    assert not valid.all()
    refiner, double, single = seen[:2], seen[2:4], [(x[:, :36], x[:, 36:]) for x in seen[4:]]
    for i in range(2):
        assert_close(refiner[i][valid], golden[f"refiner.{i}"][valid])
        for name, (video, text) in (("double", double[i]), ("single", single[i])):
            assert_close(video, golden[f"{name}.{i}.video"])
            assert_close(text[valid], golden[f"{name}.{i}.text"][valid])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padded_text_is_never_read(model, golden, garbage):
    x, t, cond = inputs(golden)
    other = cond | {"text": jnp.where(cond["mask"][..., None], cond["text"], garbage)}
    np.testing.assert_array_equal(forward(model, x, t, other), forward(model, x, t, cond))


def test_a_padded_prompt_equals_the_prompt_alone(model, golden):
    x, t, cond = jax.tree.map(lambda a: a[1:], inputs(golden))
    alone = cond | {"text": cond["text"][:, :4], "mask": cond["mask"][:, :4]}
    assert alone["mask"].all()
    assert_close(forward(model, x, t, cond), forward(model, x, t, alone))


def test_no_prompt_at_all_gives_a_finite_output(model, golden):
    x, t, cond = inputs(golden)
    assert np.isfinite(forward(model, x, t, cond | {"mask": jnp.zeros_like(cond["mask"])})).all()


def test_permuted_tokens_and_positions_give_the_permuted_output(model, golden):
    x, t, cond = inputs(golden)
    order = np.random.default_rng(0).permutation(36)
    out = model(x[:, order], t, cond, model.positions(GRID)[order])[0]
    assert_close(out, tokens(golden["out"])[:, order])


def test_modulations_known_already_change_nothing(model, golden):
    x, t, cond = inputs(golden)
    known = jax.tree.map(lambda a: a[1], model.modulations(jnp.stack([0 * t, t]), cond))
    out = model(x, t, cond, model.positions(GRID), modulations=known)[0]
    np.testing.assert_allclose(out, forward(model, x, t, cond), atol=1e-5)


def test_the_original_layout_gives_the_same_weights(model, weights, tmp_path):
    save_file(original(weights), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"rope_axes_dim": [4, 6, 6]}))
    assert_same(read(tmp_path, dtype="float32"), model)


def test_the_published_container_gives_the_same_weights(model, weights, tmp_path):
    """A .pt of torch.save with all tensors under "module"; and through the converted folder."""
    arrays = original(weights)
    places = {name: str(n) for n, name in enumerate(arrays)}
    state = {name: tensor(places[name], array.shape) for name, array in arrays.items()}
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "HunyuanVideoTransformer3DModel", "rope_axes_dim": [4, 6, 6]})
    )
    content = b"\x80\x02" + emit({"module": state}) + b"."
    path = tmp_path / "mp_rank_00_model_states.pt"
    write_archive(path, content, {places[name]: array for name, array in arrays.items()})
    convert(path, tmp_path / "converted", dtype="float32")
    assert_same(load(tmp_path / "converted"), model)


def test_comfyuis_names_give_the_same_weights(model, weights, tmp_path):
    """They are FLUX's but for text and patches, and are taken for FLUX no more than FLUX for HunyuanVideo."""
    made = {comfyui(name): array for name, array in original(weights).items()}
    assert {
        *FLUX_MARKS,
        "img_in.proj.weight",
        "txt_in.t_embedder.in_layer.bias",
        "time_in.out_layer.weight",
    } <= made.keys()
    save_file(made, tmp_path / "hunyuan_video_t2v_720p_bf16.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"rope_axes_dim": [4, 6, 6]}))
    assert open_source(tmp_path).layout.name == "comfyui"
    assert_same(read(tmp_path, dtype="float32"), model)
    flux = open_source(GOLDEN.parent / "flux_dev/original")
    assert (flux.layout.model, flux.layout.name) == ("flux", "original") and flux.weights.tensors.keys() >= FLUX_MARKS


FLUX_MARKS = {"double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.weight"}


def comfyui(name):
    """Tencent's name as ComfyUI's classes have it: FLUX's blocks and embedders, a refiner of its own."""
    name = re.sub(r"^(double_blocks\.\d+\.(?:img|txt))_mod\.linear", r"\1_mod.lin", name)
    name = re.sub(r"^(double_blocks\.\d+\.(?:img|txt))_attn_(qkv|proj)", r"\1_attn.\2", name)
    name = re.sub(r"^(single_blocks\.\d+)\.modulation\.linear", r"\1.modulation.lin", name)
    for letter, kind in (("q", "query"), ("k", "key")):
        name = re.sub(rf"_attn_{letter}_norm\.weight$", f"_attn.norm.{kind}_norm.scale", name)
        name = re.sub(rf"^(single_blocks\.\d+)\.{letter}_norm\.weight$", rf"\1.norm.{kind}_norm.scale", name)
    name = re.sub(r"self_attn_(qkv|proj)", r"self_attn.\1", name)
    for number, layer, index in (("1", "in_layer", 0), ("2", "out_layer", 2)):
        name = re.sub(rf"mlp\.fc{number}", f"mlp.{index}", name)
        name = re.sub(rf"(time_in|guidance_in|t_embedder)\.mlp\.{index}", rf"\1.{layer}", name)
        name = re.sub(rf"c_embedder\.linear_{number}", f"c_embedder.{layer}", name)
    return name


def assert_same(model, other):
    assert model.config == other.config
    jax.tree.map(np.testing.assert_array_equal, leaves_of(model), leaves_of(other))


def original(theirs):
    """Tensors of diffusers under Tencent's names, fused by hand."""
    made, used = {}, []

    def join(target, *sources):
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in theirs:
                names = [f"{source}.{kind}" for source in sources]
                made[f"{target}.{kind}"] = np.concatenate([theirs[name] for name in names])
                used.extend(names)

    for new, old in (("time_in.mlp", "time_text_embed.timestep_embedder"), ("guidance_in.mlp", "time_text_embed.guidance_embedder"),
                     ("txt_in.t_embedder.mlp", "context_embedder.time_text_embed.timestep_embedder")):  # fmt: skip
        join(f"{new}.0", f"{old}.linear_1")
        join(f"{new}.2", f"{old}.linear_2")
    join("img_in.proj", "x_embedder.proj")
    join("vector_in.in_layer", "time_text_embed.text_embedder.linear_1")
    join("vector_in.out_layer", "time_text_embed.text_embedder.linear_2")
    join("txt_in.input_embedder", "context_embedder.proj_in")
    join("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1")
    join("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2")
    for i in range(2):
        new, old = f"txt_in.individual_token_refiner.blocks.{i}", f"context_embedder.token_refiner.refiner_blocks.{i}"
        join(f"{new}.norm1", f"{old}.norm1")
        join(f"{new}.norm2", f"{old}.norm2")
        join(f"{new}.self_attn_qkv", *(f"{old}.attn.to_{x}" for x in "qkv"))
        join(f"{new}.self_attn_proj", f"{old}.attn.to_out.0")
        join(f"{new}.mlp.fc1", f"{old}.ff.net.0.proj")
        join(f"{new}.mlp.fc2", f"{old}.ff.net.2")
        join(f"{new}.adaLN_modulation.1", f"{old}.norm_out.linear")

        new, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for ours, norm, ff, qkv, norms, out in (
            ("img", "norm1", "ff", ("to_q", "to_k", "to_v"), "norm_", "to_out.0"),
            ("txt", "norm1_context", "ff_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out"),
        ):  # fmt: skip
            join(f"{new}.{ours}_mod.linear", f"{old}.{norm}.linear")
            join(f"{new}.{ours}_attn_qkv", *(f"{old}.attn.{name}" for name in qkv))
            join(f"{new}.{ours}_attn_q_norm", f"{old}.attn.{norms}q")
            join(f"{new}.{ours}_attn_k_norm", f"{old}.attn.{norms}k")
            join(f"{new}.{ours}_attn_proj", f"{old}.attn.{out}")
            join(f"{new}.{ours}_mlp.fc1", f"{old}.{ff}.net.0.proj")
            join(f"{new}.{ours}_mlp.fc2", f"{old}.{ff}.net.2")

        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        join(f"{new}.linear1", *(f"{old}.attn.to_{x}" for x in "qkv"), f"{old}.proj_mlp")
        join(f"{new}.linear2", f"{old}.proj_out")
        join(f"{new}.q_norm", f"{old}.attn.norm_q")
        join(f"{new}.k_norm", f"{old}.attn.norm_k")
        join(f"{new}.modulation.linear", f"{old}.norm.linear")
    join("final_layer.linear", "proj_out")
    join("final_layer.adaLN_modulation.1", "norm_out.linear")
    for name in ("weight", "bias"):  # (scale, shift) in diffusers
        scale, shift = np.split(made[f"final_layer.adaLN_modulation.1.{name}"], 2)
        made[f"final_layer.adaLN_modulation.1.{name}"] = np.concatenate([shift, scale])
    assert sorted(used) == sorted(theirs)
    return made


def test_names_of_the_published_model_are_those_of_the_original():
    names = {source for rule in tables.ORIGINAL for source in rule.sources}
    assert {
        "img_in.proj.weight", "time_in.mlp.0.weight", "guidance_in.mlp.2.bias", "vector_in.out_layer.weight",
        "txt_in.input_embedder.weight", "txt_in.t_embedder.mlp.2.weight", "txt_in.c_embedder.linear_1.bias",
        "txt_in.individual_token_refiner.blocks.*.self_attn_qkv.weight", "double_blocks.*.txt_mod.linear.weight",
        "txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1.bias", "double_blocks.*.img_attn_q_norm.weight",
        "double_blocks.*.txt_mlp.fc2.bias", "single_blocks.*.linear1.weight", "single_blocks.*.k_norm.weight",
        "single_blocks.*.modulation.linear.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.linear.bias",
    } <= names  # fmt: skip


def test_the_published_sizes_follow_from_the_shapes_alone():
    config = hunyuan_video.HunyuanVideoConfig()
    shapes = {
        "img_in.proj.weight": (3072, 16, 1, 2, 2), "img_in.proj.bias": (3072,), "vector_in.in_layer.weight": (3072, 768),
        "txt_in.input_embedder.weight": (3072, 4096), "txt_in.individual_token_refiner.blocks.1.norm1.weight": (3072,),
        "double_blocks.19.img_mlp.fc1.bias": (12288,), "double_blocks.19.img_mlp.fc2.bias": (3072,),
        "double_blocks.19.img_attn_k_norm.weight": (128,), "single_blocks.39.k_norm.weight": (128,),
        "final_layer.linear.bias": (64,), "guidance_in.mlp.0.bias": (3072,),
    }  # fmt: skip
    assert tables.configure(tables.ORIGINAL_NAMES, shapes, {}) == config
    with pytest.raises(ValueError, match="from image to video"):
        tables.configure(tables.ORIGINAL_NAMES, shapes | {"img_in.proj.weight": (3072, 33, 1, 2, 2)}, {})
    with pytest.raises(ValueError, match="image_condition_type='token_replace' where the network has None"):
        tables.configure(tables.ORIGINAL_NAMES, shapes, {"image_condition_type": "token_replace"})


SIZES = dict(
    in_channels=3, vec_in_dim=6, context_in_dim=8, hidden_size=32, num_heads=2, depth=2, depth_single_blocks=2,
    axes_dim=(4, 6, 6), guidance_embed=False,
)  # fmt: skip


def test_with_all_keys_and_neurons_kept_sampling_is_dense_in_any_order_of_tokens():
    """And half of them still never read padded text."""
    config, grid = hunyuan_video.HunyuanVideoConfig(**SIZES), (3, 5, 9)
    model = drawn(hunyuan_video.HunyuanVideo, config)
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, *shape: jax.random.normal(keys[key], shape)
    mask = jnp.arange(5) < jnp.array([5, 3])[:, None]
    noise, cond = draw(0, 2, 135, 12), {"text": draw(1, 2, 5, 8), "mask": mask, "pooled": draw(2, 2, 6)}
    run = partial(sample, model, noise, timesteps=shifted_timesteps(6, 7.0), grid=grid)
    parts = dict(full_step_every=3, first_n_dense_layers=1, group=64, top_keys=1.0, max_keys=1.0)
    garbage = cond | {"text": jnp.where(mask[..., None], cond["text"], 1e30)}
    dense = run(cond)
    for patches in (((2, 2, 4),), (), (2,)):
        whole = Sparsity(attention=AttentionSparsity(**parts), mlp=MlpSparsity(**parts), patches=patches)
        np.testing.assert_allclose(run(cond, sparsity=whole), dense, atol=2e-4, rtol=2e-4)
        half = dataclasses.replace(whole, attention=AttentionSparsity(**parts | {"top_keys": 0.5}))
        some = run(cond, sparsity=half)
        assert np.isfinite(some).all() and not np.allclose(some, dense, atol=1e-3)
        np.testing.assert_array_equal(run(garbage, sparsity=half), some)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": (1, 6, 11)}, "expected 12 channels"),
        ({"text": None}, r"conditions \['mask', 'pooled'\]: expected \['mask', 'pooled', 'text'\]"),
        ({"text": (2, 5, 8)}, r"condition text .*: expected \[1, 'T', 8\]"),
        ({"mask": (1, 4)}, r"condition mask \(1, 4\): expected \[1, 5\]"),
        ({"pooled": (1, 5)}, r"condition pooled .*: expected \[1, 6\]"),
        ({"guidance": (1,)}, "conditions .*guidance"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    model = nnx.eval_shape(
        lambda: hunyuan_video.HunyuanVideo(hunyuan_video.HunyuanVideoConfig(**SIZES), rngs=nnx.Rngs(0))
    )
    shapes = {"noise": (1, 6, 12), "text": (1, 5, 8), "mask": (1, 5), "pooled": (1, 6)} | change
    arrays = {name: jnp.zeros(shape, bool if name == "mask" else None) for name, shape in shapes.items() if shape}
    with pytest.raises(ValueError, match=message):
        model.check(arrays.pop("noise"), arrays)


def test_a_mask_that_is_not_of_bools_is_refused():
    model = nnx.eval_shape(
        lambda: hunyuan_video.HunyuanVideo(hunyuan_video.HunyuanVideoConfig(**SIZES), rngs=nnx.Rngs(0))
    )
    cond = {"text": jnp.zeros((1, 5, 8)), "mask": jnp.zeros((1, 5)), "pooled": jnp.zeros((1, 6))}
    with pytest.raises(ValueError, match="condition mask float32: expected bool"):
        model.check(jnp.zeros((1, 6, 12)), cond)


@pytest.mark.parametrize("guided", [False, True])
def test_a_mask_that_is_no_prefix_and_values_out_of_range_are_refused(guided):
    config = hunyuan_video.HunyuanVideoConfig(**SIZES | {"guidance_embed": guided})
    model = nnx.eval_shape(lambda: hunyuan_video.HunyuanVideo(config, rngs=nnx.Rngs(0)))
    guidance = {"guidance": jnp.array([6.0, 6.0])} if guided else {}
    cond = {"text": jnp.zeros((2, 5, 8)), "mask": jnp.ones((2, 5), bool), "pooled": jnp.zeros((2, 6))} | guidance
    noise = jnp.zeros((2, 6, 12))
    for valid in (0, 3, 5):
        model.check(noise, cond | {"mask": jnp.broadcast_to(jnp.arange(5) < valid, (2, 5))})
    holes = jnp.array([[True] * 5, [True, False, True, False, False]])
    with pytest.raises(ValueError, match="condition mask: row 1 has a valid token behind padding"):
        model.check(noise, cond | {"mask": holes})
    longer = {"text": jnp.zeros((2, 257, 8)), "mask": jnp.ones((2, 257), bool)}
    with pytest.raises(ValueError, match="condition text of 257 rows: expected 1 to 256"):
        model.check(noise, cond | longer)
    if guided:
        with pytest.raises(ValueError, match="condition guidance 6016: expected the plain scale, up to 100"):
            model.check(noise, cond | {"guidance": jnp.array([6.0, 6016.0])})
    with pytest.raises(ValueError, match=r"grid \(2, 3\): expected 3 sides, frames, rows, columns"):
        model.positions((2, 3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"axes_dim": (4, 6)}, r"axes_dim=\(4, 6\): expected three even widths"),
        ({"patch_size": (2, 2)}, r"patch_size=\(2, 2\): expected frames, rows and columns"),
        ({"num_heads": 3}, r"hidden_size=32, num_heads=3, axes_dim=.*: expected"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        hunyuan_video.HunyuanVideoConfig(**SIZES | sizes)


def test_prompts_are_refused(tmp_path):
    convert(GOLDEN / "transformer", tmp_path / "hunyuan")
    with pytest.raises(
        ValueError, match="hunyuan: a hunyuan_video model, whose text encoders and VAE are not here yet"
    ):
        Pipeline.from_pretrained(tmp_path / "hunyuan")
