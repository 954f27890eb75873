"""Conversion: every tensor used once, every leaf filled once, one error naming all; a folder is whole or not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_safetensors import write_safetensors, write_shards

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, inspect, load, read, save
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.leaves import leaves_of

D, F, HEAD, DEPTH, SINGLES = 32, 48, 16, 2, 3
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 8,
    "num_layers": DEPTH,
    "num_single_layers": SINGLES,
    "attention_head_dim": HEAD,
    "num_attention_heads": D // HEAD,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


def make_diffusers(dtype=np.float32, guidance=True):
    """Random tensors in the diffusers layout."""
    random = np.random.default_rng(0)
    made = {}

    def add(name, *shape):
        made[name] = random.standard_normal(shape).astype(dtype)

    def linear(name, inputs, outputs):
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    linear("x_embedder", 8, D)
    linear("context_embedder", 12, D)
    embedders = {"timestep": 256, "text": 10} | ({"guidance": 256} if guidance else {})
    for name, width in embedders.items():
        linear(f"time_text_embed.{name}_embedder.linear_1", width, D)
        linear(f"time_text_embed.{name}_embedder.linear_2", D, D)
    for i in range(DEPTH):
        block = f"transformer_blocks.{i}"
        for norm in ("norm1", "norm1_context"):
            linear(f"{block}.{norm}.linear", D, 6 * D)
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
        for name in names:
            linear(f"{block}.attn.{name}", D, D)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            add(f"{block}.attn.{norm}.weight", HEAD)
        for ff in ("ff", "ff_context"):
            linear(f"{block}.{ff}.net.0.proj", D, F)
            linear(f"{block}.{ff}.net.2", F, D)
    for i in range(SINGLES):
        block = f"single_transformer_blocks.{i}"
        linear(f"{block}.norm.linear", D, 3 * D)
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{block}.attn.{name}", D, D)
        add(f"{block}.attn.norm_q.weight", HEAD)
        add(f"{block}.attn.norm_k.weight", HEAD)
        linear(f"{block}.proj_mlp", D, F)
        linear(f"{block}.proj_out", D + F, D)
    linear("norm_out.linear", D, 2 * D)
    linear("proj_out", D, 8)
    return made


def make_original(diffusers):
    """The same tensors in the original layout, fused by hand."""
    d, made = diffusers, {}
    for end in ("weight", "bias"):
        made[f"img_in.{end}"] = d[f"x_embedder.{end}"]
        made[f"txt_in.{end}"] = d[f"context_embedder.{end}"]
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            if f"time_text_embed.{theirs}_embedder.linear_1.{end}" in d:
                made[f"{ours}_in.in_layer.{end}"] = d[f"time_text_embed.{theirs}_embedder.linear_1.{end}"]
                made[f"{ours}_in.out_layer.{end}"] = d[f"time_text_embed.{theirs}_embedder.linear_2.{end}"]
        for i in range(DEPTH):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
            made[f"{new}.img_mod.lin.{end}"] = d[f"{old}.norm1.linear.{end}"]
            made[f"{new}.txt_mod.lin.{end}"] = d[f"{old}.norm1_context.linear.{end}"]
            made[f"{new}.img_attn.qkv.{end}"] = np.concatenate([d[f"{old}.attn.to_{x}.{end}"] for x in "qkv"])
            made[f"{new}.txt_attn.qkv.{end}"] = np.concatenate([d[f"{old}.attn.add_{x}_proj.{end}"] for x in "qkv"])
            made[f"{new}.img_attn.proj.{end}"] = d[f"{old}.attn.to_out.0.{end}"]
            made[f"{new}.txt_attn.proj.{end}"] = d[f"{old}.attn.to_add_out.{end}"]
            for ours, theirs in (("img", "ff"), ("txt", "ff_context")):
                made[f"{new}.{ours}_mlp.0.{end}"] = d[f"{old}.{theirs}.net.0.proj.{end}"]
                made[f"{new}.{ours}_mlp.2.{end}"] = d[f"{old}.{theirs}.net.2.{end}"]
        for i in range(SINGLES):
            old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            made[f"{new}.modulation.lin.{end}"] = d[f"{old}.norm.linear.{end}"]
            parts = [d[f"{old}.attn.to_{x}.{end}"] for x in "qkv"]
            made[f"{new}.linear1.{end}"] = np.concatenate([*parts, d[f"{old}.proj_mlp.{end}"]])
            made[f"{new}.linear2.{end}"] = d[f"{old}.proj_out.{end}"]
        scale, shift = np.split(d[f"norm_out.linear.{end}"], 2)
        made[f"final_layer.adaLN_modulation.1.{end}"] = np.concatenate([shift, scale])
        made[f"final_layer.linear.{end}"] = d[f"proj_out.{end}"]
    for i in range(DEPTH):
        for x, name in (("q", "query"), ("k", "key")):
            old, new = f"transformer_blocks.{i}.attn", f"double_blocks.{i}"
            made[f"{new}.img_attn.norm.{name}_norm.scale"] = d[f"{old}.norm_{x}.weight"]
            made[f"{new}.txt_attn.norm.{name}_norm.scale"] = d[f"{old}.norm_added_{x}.weight"]
    for i in range(SINGLES):
        for x, name in (("q", "query"), ("k", "key")):
            old = f"single_transformer_blocks.{i}.attn.norm_{x}.weight"
            made[f"single_blocks.{i}.norm.{name}_norm.scale"] = d[old]
    return made


def write_source(folder, tensors, config=CONFIG):
    """A folder with one file and its config.json."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(found, expected):
    found, expected = leaves_of(found), leaves_of(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.fixture(scope="module")
def diffusers():
    return make_diffusers()


@pytest.fixture
def source(tmp_path, diffusers):
    return write_source(tmp_path / "source", diffusers)


@pytest.fixture
def target(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model"


def test_leaves_are_the_tensors(source, diffusers):
    leaves, d = leaves_of(read(source, "float32")), diffusers
    block = "single_transformer_blocks.2"
    np.testing.assert_array_equal(leaves["img_in.kernel"], d["x_embedder.weight"].T)
    np.testing.assert_array_equal(leaves["single_blocks.proj.kernel"][2], d[f"{block}.proj_out.weight"][:, :D].T)
    np.testing.assert_array_equal(leaves["single_blocks.mlp.fc2"][2], d[f"{block}.proj_out.weight"][:, D:].T)
    np.testing.assert_array_equal(leaves["single_blocks.mlp.fc1"][2], d[f"{block}.proj_mlp.weight"])
    np.testing.assert_array_equal(leaves["single_blocks.mlp.b2"][2], d[f"{block}.proj_out.bias"])
    key = leaves["double_blocks.txt.attention.linear.kernel"][1, :, D : 2 * D]
    np.testing.assert_array_equal(key, d["transformer_blocks.1.attn.add_k_proj.weight"].T)
    shift, scale = np.split(np.asarray(leaves["final.linear.bias"]), 2)
    np.testing.assert_array_equal(np.concatenate([scale, shift]), d["norm_out.linear.bias"])


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_layouts_load_to_the_same_tree(tmp_path, guidance, prefix):
    tensors = make_diffusers(guidance=guidance)
    config = CONFIG | {"guidance_embeds": guidance}
    original = {prefix + name: array for name, array in make_original(tensors).items()}
    first = read(write_source(tmp_path / "diffusers", tensors, config), "float32")
    second = read(write_source(tmp_path / "original", original, config), "float32")
    assert_same(second, first)
    assert first.config == second.config
    assert first.config.guidance_embed == guidance == (first.guidance_in is not None)


def test_shards_and_parent_folder_load_to_the_same_tree(tmp_path, source, diffusers):
    folder = tmp_path / "repository" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = write_shards(folder, diffusers, count=3)
    expected = read(source, "float32")
    for path in (folder, index, folder.parent):
        assert_same(read(path, "float32"), expected)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16])
def test_stored_dtypes_are_cast_once(tmp_path, stored):
    tensors = make_diffusers(stored)
    model = leaves_of(read(write_source(tmp_path / "source", tensors)))
    expected = tensors["x_embedder.weight"].T.astype(ml_dtypes.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in model.values())
    np.testing.assert_array_equal(model["img_in.kernel"], expected)


def test_saved_model_loads_exactly(source, target):
    convert(source, target, dtype="float32", progress=False)
    expected = read(source, "float32")
    loaded = load(target)
    assert_same(loaded, expected)
    assert loaded.config == expected.config and loaded.dtype == expected.dtype
    save(loaded, target, overwrite=True)
    assert_same(load(target), expected)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_load_casts(source, target):
    convert(source, target, dtype="float32", progress=False)
    loaded = load(target, "bfloat16")
    assert loaded.dtype == jnp.bfloat16
    assert_same(loaded, read(source, "bfloat16"))


def test_word_table_travels(source, target):
    (source / "words.json").write_text('{"attributes": ["a"], "words": [["b", "c"]]}')
    write_safetensors(source / "word_embeddings.safetensors", {"embeddings": np.ones((2, 3), np.float32)})
    convert(source, target, progress=False)
    for name in ("words.json", "word_embeddings.safetensors"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "value"), [("{}", 1), ('{"attributes": ["a"], "words": [["b", 3]]}', 1), (None, np.nan), (None, 3e38)]
)
def test_a_bad_word_table_does_not_travel(source, target, words, value):
    (source / "words.json").write_text(words or '{"attributes": ["a"], "words": [["b", "c"]]}')
    write_safetensors(source / "word_embeddings.safetensors", {"embeddings": np.full((2, 3), value, np.float32)})
    fails(source, target, str(source), "bad word table")


def fails(source, target, *words):
    """convert() raises one sentence with all words, and leaves nothing behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(ValueError) as error:
        convert(source, target, progress=False)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(target.parent.rglob("*")) == before


def test_all_that_does_not_fit_is_one_error(tmp_path, target, diffusers):
    tensors = make_original(diffusers)
    del tensors["single_blocks.1.linear2.bias"], tensors["txt_in.weight"]
    tensors["stranger"] = np.zeros(3, np.float32)
    tensors["img_in.weight"] = np.zeros((D + 1, 8), np.float32)
    tensors["single_blocks.0.linear1.bias"] = np.zeros(3 * D + F, np.int64)
    tensors["model.diffusion_model.txt_in.bias"] = tensors["txt_in.bias"]
    source = write_source(tmp_path / "source", tensors)
    missing = "2 missing: txt_in.weight, single_blocks.1.linear2.bias"
    misshapen = "2 misshapen: img_in.weight [33, 8], expected [32, 8], single_blocks.0.linear1.bias int64"
    fails(source, target, missing, "1 unknown: stranger", "1 doubled: txt_in.bias", misshapen)
    found = inspect(source)
    assert found.missing == ["txt_in.weight", "single_blocks.1.linear2.bias"] and found.unknown == ["stranger"]
    assert found.doubled == ["txt_in.bias"] and len(found.misshapen) == 2 and not found.whole


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, target, stored, value):
    tensors = make_diffusers(stored)
    tensors["single_transformer_blocks.1.attn.to_k.weight"][-1, 2] = value
    source = write_source(tmp_path / "source", tensors)
    fails(source, target, "single_transformer_blocks.1.attn.to_k.weight holds NaN or infinity, expected finite numbers")
    with pytest.raises(InputError, match=r"attn\.to_k\.weight holds NaN or infinity"):
        read(source)


def test_a_value_beyond_float16_is_named_and_bfloat16_holds_it(tmp_path, target):
    tensors = make_diffusers()
    tensors["x_embedder.weight"][1, 3] = -70_000
    source = write_source(tmp_path / "source", tensors)
    with pytest.raises(InputError, match=r"x_embedder\.weight reaches 70000, and float16 ends at 65504; .* bfloat16"):
        convert(source, target, dtype="float16", progress=False)
    convert(source, target, progress=False)
    tensors["x_embedder.weight"][1, 3] = 65_504
    convert(write_source(tmp_path / "fits", tensors), target, dtype="float16", progress=False, overwrite=True)


def test_long_lists_are_cut(tmp_path, target, diffusers):
    kept = {name: array for name, array in diffusers.items() if not name.startswith("single_transformer_blocks.1.")}
    fails(write_source(tmp_path / "source", kept), target, "14 missing", "and 9 more")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 3), ("num_attention_heads", 4), ("guidance_embeds", False), ("in_channels", 64)],
)
def test_config_that_does_not_fit_is_named(tmp_path, target, diffusers, field, value):
    source = write_source(tmp_path / "source", diffusers, CONFIG | {field: value})
    fails(source, target, "config.json", f"{field}={value} where the tensors have")


def test_axes_must_be_told_and_fit(tmp_path, target, diffusers):
    without = {name: value for name, value in CONFIG.items() if name != "axes_dims_rope"}
    fails(write_source(tmp_path / "source", diffusers, without), target, "axes_dims_rope")
    wrong = CONFIG | {"axes_dims_rope": [4, 6, 8]}
    fails(write_source(tmp_path / "source", diffusers, wrong), target, "axes_dims_rope=[4, 6, 8]")


def test_other_models_are_unknown(tmp_path, target, diffusers):
    source = write_source(tmp_path / "source", {"patch_embedding.weight": np.zeros((2, 2), np.float32)})
    fails(source, target, "unknown layout", "flux (original)", "patch_embedding.weight")
    other = write_source(tmp_path / "other", diffusers, CONFIG | {"_class_name": "WanTransformer3DModel"})
    fails(other, target, "WanTransformer3DModel")


def test_truncated_source_is_named(source, target):
    file = source / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    fails(source, target, file.name, "truncated")


def test_unwritable_target_is_found_first(source, target, monkeypatch):
    def never(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr("chipmunk_jax.convert.safetensors.Tensor.read", never)
    (target.parent / "file").write_text("")
    fails(source, target.parent / "file", "a file, expected a folder")
    fails(source, target.parent / "file" / "model", "no folder")
    fails(source, target.parent / "absent" / "model", "no folder")
    fails(source, source, "not empty")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    fails(source, target, "cannot write into", "Permission denied")


def test_bad_dtype_is_named(source, target):
    for dtype in ("int8", "nonsense"):
        with pytest.raises(ValueError, match=f"dtype={dtype}: expected one of bfloat16"):
            convert(source, target, dtype=dtype, progress=False)


def test_checkpoint_is_replaced_only_when_asked(tmp_path, source, target):
    convert(source, target, progress=False)
    fails(source, target, "already a checkpoint; add --overwrite")
    convert(source, target, dtype="float32", progress=False, overwrite=True)
    assert load(target).dtype == jnp.float32
    with pytest.raises(ValueError, match="no checkpoint of this library"):
        convert(target.parent.parent / "source", tmp_path, progress=False, overwrite=True)
    fails(target, target.parent / "again", "already converted")


def test_failure_leaves_the_old_checkpoint(tmp_path, source, target, monkeypatch):
    convert(source, target, progress=False)
    expected = read(source)
    with pytest.raises(FileNotFoundError):
        save(expected, target, [tmp_path / "absent"], overwrite=True)  # found after the weights are written

    def fail(*_):
        raise RuntimeError("disk gone")

    monkeypatch.setattr("chipmunk_jax.convert.safetensors.Tensor.read", fail)
    with pytest.raises(RuntimeError):
        convert(source, target, dtype="float32", progress=False, overwrite=True)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert_same(load(target), expected)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, target):
    """A limit on the size of files, 4 KiB, ends a write as a full disk does; what Orbax's threads say, they say to the process."""
    command = [sys.executable, "-m", "chipmunk_jax.cli.main", "convert", str(source), str(target), "--quiet"]
    limited = ["bash", "-c", 'ulimit -f 4; "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"chipmunk: {target}: cannot be written: File too large\n"
    assert not list(target.parent.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_read(source, target, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(source, target, "MB needed and 0.0 MB free on its disk")
    with pytest.raises(ValueError, match=r"MB needed and 0\.0 MB free on its disk"):
        save(read(source), target)
    assert not list(target.parent.iterdir())


def test_a_checkpoint_between_the_old_and_the_new_one_is_read(source, target):
    """As after a kill between the two renames that replace it."""
    convert(source, target, progress=False)
    convert(source, target.with_name("model.chipmunk-partial"), dtype="float32", progress=False)
    target.rename(target.with_name("model.chipmunk-replaced"))
    assert inspect(target).dtype == "float32" and load(target).dtype == jnp.float32
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_path_that_is_no_utf8_is_told(tmp_path, source, target):
    convert(source, target, progress=False)
    odd = target.rename(target.with_name(os.fsdecode(b"\xff")))
    with pytest.raises(InputError, match="a path that is no UTF-8"):
        load(odd)
    fails(source, tmp_path / os.fsdecode(b"\xfe"), "a path that is no UTF-8")


def test_half_written_checkpoint_is_not_loaded(tmp_path, source, target):
    convert(source, target, progress=False)
    (target / "config.json").write_text("")
    for function in (load, inspect):
        with pytest.raises(ValueError, match=r"half-written.*--overwrite"):
            function(target)
    fails(source, target, "half a checkpoint; add --overwrite")
    convert(source, target, progress=False, overwrite=True)  # as advised
    (target / "config.json").unlink()
    for function in (load, inspect):
        with pytest.raises(ValueError, match="half-written"):
            function(target)
    convert(source, target, progress=False, overwrite=True)
    assert inspect(target).whole
    with pytest.raises(ValueError, match="not a converted checkpoint"):
        load(source)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stored", None, "stored=None: expected a whole number of bytes"),
        ("source", [1], r"source=\[1\]: expected the name of a layout"),
        ("dtype", {}, "dtype="),
        ("config", [1], r"config=\[1\]: expected sizes by name"),
        ("num_heads", 0, "num_heads"),
        ("num_heads", "2", "num_heads"),
        ("depth", [1], r"depth=.*: expected a whole number"),
        ("depth", -1, "depth=-1: expected a number above 0 and below 1,000,000"),
        ("vec_in_dim", 0, "vec_in_dim=0: expected a number above 0 and below 1,000,000"),
        ("vec_in_dim", {"a": 1}, "vec_in_dim=.*: expected a whole number"),
        ("axes_dim", ["a", 2, 2], "axes_dim=.*: expected a list of whole numbers"),
        ("mlp_ratio", 1e308, r"mlp_ratio=1e\+308: expected a number above 0 and below"),
        ("theta", -5, "theta=-5: expected a number above 0"),
        ("depth", True, "depth=True: expected a whole number"),
        ("mlp_ratio", float("nan"), "mlp_ratio=nan: expected a number above 0 and below 1,000,000"),
        ("theta", None, "theta=None: expected a whole number"),
        ("guidance_embed", [], r"guidance_embed=.*: expected true or false"),
    ],
)
def test_a_value_that_no_checkpoint_has_is_one_sentence(source, target, key, value, message):
    convert(source, target, progress=False)
    content = json.loads((target / "config.json").read_text())
    (content if key in content else content["config"])[key] = value
    (target / "config.json").write_text(json.dumps(content))
    for function in (load, inspect):
        with pytest.raises(InputError, match=rf"bad config.json: .*({message})"):
            function(target)


def test_weights_must_fit_their_config(source, target):
    convert(source, target, progress=False)
    file = target / "config.json"
    content = json.loads(file.read_text())
    content["config"] |= {"guidance_embed": False, "depth": 3}
    content["stored"] += 1  # as another model's
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"4 unknown: guidance_in.*misshapen: double_blocks.*\[2, .*expected \[3, "):
        load(target)
    content["config"]["colour"] = "red"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"bad config.json: .*colour"):
        load(target)


def test_damaged_weights_are_one_sentence(source, target):
    convert(source, target, progress=False)
    files = [file for file in (target / "weights").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged weights") as error:
        load(target)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", "[" * 100_000, "a pipe"])
def test_half_a_copy_is_damaged_and_prints_nothing(source, target, capfd, content):
    """A leaf is not there, or its header is none."""
    convert(source, target, progress=False)
    header = min((target / "weights").glob("*/.zarray"))
    capfd.readouterr()
    if content is None:
        shutil.rmtree(header.parent)
    elif content == "a pipe":
        header.unlink()
        os.mkfifo(header)
    else:
        header.write_text(content)
    with pytest.raises(ValueError, match="damaged weights: ") as error:
        load(target)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_inspect_agrees_before_and_after(source, target, diffusers):
    convert(source, target, progress=False)
    before, after = inspect(source), inspect(target)
    assert before.parameters == after.parameters == sum(array.size for array in diffusers.values())
    assert (before.layout, before.dtype, after.layout, after.dtype) == (
        "diffusers",
        "float32",
        "converted",
        "bfloat16",
    )
    assert before.config == after.config and before.whole and after.whole
    assert before.nbytes == 2 * after.nbytes


def test_command_line_converts_and_inspects(source, target, capsys):
    assert main(["convert", str(source), str(target)]) == 0
    assert main(["inspect", str(target)]) == 0
    out = capsys.readouterr().out
    assert "flux (converted)" in out and "bfloat16" in out and "depth_single_blocks" in out
    (source / "diffusion_pytorch_model.safetensors").unlink()
    tensors = make_diffusers() | {"stranger": np.zeros(1, np.float32)}
    assert main(["inspect", str(write_source(source, tensors))]) == 1
    assert "1: stranger" in capsys.readouterr().out
