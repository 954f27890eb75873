"""Wan against the PyTorch original (golden/make_wan_golden.py)."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn
from flax import nnx
from safetensors.numpy import load_file, save_file

from chipmunk_jax import AttentionSparsity, Euler, MlpSparsity, Sparsity, UniPC, sample, wan_timesteps
from chipmunk_jax.convert import convert, load, read
from chipmunk_jax.convert import wan as tables
from chipmunk_jax.layers import run_layers
from chipmunk_jax.models import wan
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.pipelines import Pipeline

GOLDEN = Path(__file__).parent / "golden"
GRID = (3, 4, 6)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["wan_t2v", "wan_i2v"])
def golden(request):
    return load_file(GOLDEN / request.param / "io.safetensors") | {"name": request.param}


@pytest.fixture(scope="module")
def model(golden):
    return read(GOLDEN / golden["name"] / "transformer", dtype="float32")


def tokens(video):
    """Latents [B, C, T, 2 h, 2 w] as tokens [B, T h w, 4 C], channels in the order (row, column, channel)."""
    batch, channels, frames, height, width = video.shape
    patches = video.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).transpose(0, 2, 3, 5, 4, 6, 1)
    return jnp.asarray(patches.reshape(batch, -1, 4 * channels))


def inputs(model, golden):
    out_dim, video = model.config.out_dim, golden["in.hidden_states"]
    cond = {"text": jnp.asarray(golden["in.encoder_hidden_states"])}
    if "in.encoder_hidden_states_image" in golden:
        cond |= {"image": jnp.asarray(golden["in.encoder_hidden_states_image"]), "latents": tokens(video[:, out_dim:])}
    return tokens(video[:, :out_dim]), jnp.asarray(golden["in.timestep"] / 1000, jnp.float32), cond


def test_output_equals_the_original(model, golden):
    x, t, cond = inputs(model, golden)
    out, _ = model(x, t, cond, model.positions(GRID))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, tokens(golden["out"]), atol=TOLERANCE, rtol=TOLERANCE)


def test_every_block_equals_the_original(model, golden, monkeypatch):
    seen = []

    def run_each(blocks, x, cache, *args, step, unroll):
        for layer in range(model.config.num_layers):
            one = jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], blocks)
            x, _ = run_layers(one, x, cache, *args, step=step)
            seen.append(x)
        return x, cache

    monkeypatch.setattr(wan, "run_layers", run_each)
    model(*inputs(model, golden), model.positions(GRID))
    assert len(seen) == model.config.num_layers == 2
    for i, x in enumerate(seen):
        np.testing.assert_allclose(x, golden[f"block.{i}"], atol=TOLERANCE, rtol=TOLERANCE)


def test_the_original_layout_gives_the_same_weights(model, golden, tmp_path):
    """Names of the original for the same tensors, by the two tables rule for rule."""
    tensors = load_file(GOLDEN / golden["name"] / "transformer/diffusion_pytorch_model.safetensors")
    renamed = {}
    for theirs, original in zip(tables.DIFFUSERS, tables.ORIGINAL, strict=True):
        assert theirs.targets == original.targets
        for a, b in zip(theirs.sources, original.sources, strict=True):
            for layer in range(2) if "*" in a else [0]:
                if a.replace("*", str(layer)) in tensors:
                    renamed[b.replace("*", str(layer))] = tensors[a.replace("*", str(layer))]
    assert len(renamed) == len(tensors)
    publish(tmp_path, renamed, model.config)
    again = read(tmp_path, dtype="float32")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, leaves_of(again), leaves_of(model))


def publish(folder, tensors, config):
    """Writes a folder as the Wan team publishes them: shards, their index, config.json, and the other networks' pickles."""
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for name, names in shards.items():
        save_file({key: tensors[key] for key in names}, folder / name)
    placed = {key: name for name, names in shards.items() for key in names}
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": placed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {key: getattr(config, key) for key in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim")}
    sizes |= {"num_heads": config.num_heads, "num_layers": config.num_layers, "text_len": 512, "eps": 1e-06}
    kind = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": "i2v" if config.image_dim else "t2v",
    }
    (folder / "config.json").write_text(json.dumps(kind | sizes))
    (folder / "Wan2.1_VAE.pth").write_bytes(b"")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"no pickle")


def test_what_the_original_keeps_in_float32_stays_so(model, golden, tmp_path):
    convert(GOLDEN / golden["name"] / "transformer", tmp_path / "wan", dtype="bfloat16")
    leaves, exact = leaves_of(load(tmp_path / "wan")), leaves_of(model)
    kept = {path for path, leaf in leaves.items() if leaf.dtype == jnp.float32}
    marks = ("time_", "final", "modulation", "cross_norm", "norm_in", "norm_out")
    assert kept == {path for path in leaves if any(mark in path for mark in marks)}
    for path in kept:
        np.testing.assert_array_equal(leaves[path], exact[path])


def test_names_of_the_published_models_are_those_of_the_original():
    names = {source for rule in tables.ORIGINAL for source in rule.sources}
    assert {
        "patch_embedding.weight", "text_embedding.0.bias", "time_projection.1.weight", "blocks.*.modulation", "head.modulation",
        "blocks.*.self_attn.norm_q.weight", "blocks.*.cross_attn.k_img.weight", "blocks.*.norm3.bias", "blocks.*.ffn.2.weight",
        "img_emb.proj.4.weight", "head.head.weight",
    } <= names  # fmt: skip


def test_with_all_keys_and_neurons_kept_sampling_is_dense_in_any_order_of_tokens():
    config = wan.WanConfig(dim=64, ffn_dim=96, freq_dim=16, in_dim=3, out_dim=3, text_dim=8, num_heads=2, num_layers=3)
    model, grid = drawn(wan.Wan, config), (3, 5, 9)
    keys = jax.random.split(jax.random.key(0), 2)
    noise, cond = jax.random.normal(keys[0], (1, 135, 12)), {"text": jax.random.normal(keys[1], (1, 5, 8))}
    run = partial(sample, model, noise, cond, timesteps=wan_timesteps(6, 5.0), grid=grid, solver=UniPC(), guidance=3.0)
    parts = dict(full_step_every=3, first_n_dense_layers=1, group=64, top_keys=1.0, max_keys=1.0)
    dense = run()
    for patches in (((2, 2, 4),), (), (2,)):
        whole = Sparsity(attention=AttentionSparsity(**parts), mlp=MlpSparsity(**parts), patches=patches)
        np.testing.assert_allclose(run(sparsity=whole), dense, atol=2e-4, rtol=2e-4)
        half = run(sparsity=dataclasses.replace(whole, attention=AttentionSparsity(**parts | {"top_keys": 0.5})))
        assert np.isfinite(half).all() and not np.allclose(half, dense, atol=1e-3)


def test_what_stands_on_the_grid_goes_where_its_tokens_go():
    """Image to video: the same sample in whatever order; without a prompt the image stays."""
    sizes = dict(dim=64, ffn_dim=96, freq_dim=16, in_dim=7, out_dim=3, text_dim=8, num_heads=2, num_layers=2)
    model = drawn(wan.Wan, wan.WanConfig(**sizes, image_dim=20))
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    noise, grid = draw(0, 1, 135, 12), (3, 5, 9)
    cond = {"text": draw(1, 1, 5, 8), "image": draw(2, 1, 4, 20), "latents": draw(3, 1, 135, 16)}
    run = partial(sample, model, noise, timesteps=wan_timesteps(3, 5.0), grid=grid, guidance=3.0)
    expected = run(cond)
    part = dict(full_step_every=1, first_n_dense_layers=1, group=64)
    ordered = Sparsity(attention=AttentionSparsity(**part), mlp=None, patches=((2, 2, 4),))
    np.testing.assert_allclose(run(cond, sparsity=ordered), expected, atol=1e-4)
    uncond = cond | {"text": jnp.zeros_like(cond["text"])}
    np.testing.assert_array_equal(run(cond, uncond=uncond), expected)
    assert not np.allclose(run(cond | {"latents": cond["latents"][:, ::-1]}), expected, atol=1e-3)


SOLVERS = {"unipc": UniPC(), "euler": Euler()}


@pytest.mark.usefixtures("compiled_thoroughly")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_small_trained_model_samples_as_by_diffusers(name):
    """16 steps with guidance 3, in float32 on both sides; values reach 2. Were UniPC's times not whole thousandths: 2e-1."""
    golden = load_file(GOLDEN / "mini_wan_8x32.safetensors")
    sigmas, latents = golden[f"{name}.sigmas"], golden[f"{name}.latents"]
    model = read(Path(__file__).parents[1] / "examples/mini-wan", dtype="float32")
    assert_samples(model, name, golden["noise"], golden["text"], sigmas, latents)


def test_the_larger_trained_model_samples_as_by_diffusers(trained):
    """20 steps of UniPC, the first of two prompts; their golden samples lie beside the weights."""
    golden = load_file(trained("mini-wan") / "golden_unipc_8x32.safetensors")
    model = read(trained("mini-wan"), dtype="float32")
    noise, text, latents = (golden[part][:1] for part in ("noise", "text", "latents"))
    assert_samples(model, "unipc", noise, text, golden["sigmas"], latents)


def assert_samples(model, name, noise, text, sigmas, latents):
    """The model samples these latents of 8 x 32 x 32 pixels with guidance 3, to 1e-3 after all steps."""
    if name == "unipc":
        np.testing.assert_allclose(wan_timesteps(len(sigmas) - 1, 3.0), sigmas, atol=1e-6)
    split = lambda video: jnp.asarray(
        video.reshape(-1, 3, 8, 8, 4, 8, 4).transpose(0, 2, 3, 5, 4, 6, 1).reshape(-1, 8 * 8 * 8, 48)
    )
    options = dict(timesteps=sigmas, grid=(8, 8, 8), guidance=3.0, solver=SOLVERS[name])
    out = sample(model, split(noise), {"text": jnp.asarray(text)}, **options)
    np.testing.assert_allclose(out, split(latents), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("noise", "cond", "message"),
    [
        ((1, 6, 11), {"text": (1, 5, 8)}, "expected 12 channels"),
        ((1, 6, 12), {}, r"expected \['text'\]"),
        ((1, 6, 12), {"text": (2, 5, 8)}, r"expected \[1, 'T', 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(noise, cond, message):
    config = wan.WanConfig(dim=64, ffn_dim=96, in_dim=3, out_dim=3, text_dim=8, num_heads=2, num_layers=1)
    model = nnx.eval_shape(lambda: wan.Wan(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        model.check(jnp.zeros(noise), {name: jnp.zeros(shape) for name, shape in cond.items()})


def test_text_of_a_published_model_has_all_of_its_rows():
    """Those behind the prompt are attended to: with fewer the sample would be another."""
    config = wan.WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=1)
    model = nnx.eval_shape(lambda: wan.Wan(config, rngs=nnx.Rngs(0)))
    noise = jnp.zeros((1, 6, 64))
    model.check(noise, {"text": jnp.zeros((1, 512, 4096))})
    for rows in (511, 513, 77, 0):
        with pytest.raises(ValueError, match=f"condition text of {rows} rows: expected exactly 512"):
            model.check(noise, {"text": jnp.zeros((1, rows, 4096))})
    with pytest.raises(ValueError, match=r"grid \(6,\): expected 3 sides"):
        model.positions((6,))


def test_prompts_without_a_word_table_are_refused(golden, tmp_path):
    convert(GOLDEN / golden["name"] / "transformer", tmp_path / "wan")
    told = (
        "no text_encoder, so"
        if golden["name"] == "wan_t2v"
        else "a wan model, whose text encoders and VAE are not here"
    )
    with pytest.raises(ValueError, match=f"wan: {told}"):
        Pipeline.from_pretrained(tmp_path / "wan").check("a fox", height=64, width=64, num_frames=5, sparsity=None)
