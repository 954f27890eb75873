"""Files by their content, folders of them, prefixes of names, and scales beside float8 weights."""

import gzip
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_safetensors import write_safetensors, write_shards
from test_torch_pickle import write_tensors

from chipmunk_jax.convert.files import STEM, read_weights
from chipmunk_jax.convert.prefix import PREFIXES, strip_prefix
from chipmunk_jax.convert.scales import attach_scales, drop_marks
from chipmunk_jax.convert.source import open_source
from chipmunk_jax.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
ORIGINAL = GOLDEN / "flux_dev" / "original" / "flux1-dev.safetensors"


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {f"{n}.weight": random.standard_normal((3, 2)).astype(np.float32) for n in "abcd"}


def assert_holds(path, arrays):
    found = read_weights(path)
    assert found.tensors.keys() == arrays.keys() and not found.doubled
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.tensors[name].read(), array)


def fails(function, *words):
    """The one sentence that a call raises holds all words."""
    with pytest.raises(InputError) as error:
        function()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".pt", ".pth", ".pth.tar", ".bin", ".ckpt", ""])
def test_a_suffix_means_nothing(tmp_path, arrays, suffix):
    for write in (write_safetensors, write_tensors):
        write(tmp_path / f"model{suffix}", arrays)
        assert_holds(tmp_path / f"model{suffix}", arrays)
        if suffix:
            assert_holds(tmp_path, arrays)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["an empty file"]),
        (b"GGUF\x03\0\0\0" + bytes(99), ["a GGUF file", "take the checkpoint as .safetensors"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", ["`git lfs pull`"]),
        (b"\n<!DOCTYPE html><html>", ["a web page", "download went wrong"]),
        (b"\xef\xbb\xbf<!DOCTYPE html>", ["a web page"]),
        (b"<!-- x --><html>", ["a web page"]),
        (b"Entry not found", ["text", "failed download"]),
        (gzip.compress(b"abc", mtime=0), ["gzip", "unpack it"]),
        (b"name".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), ["a tar archive"]),
        (b"\x93NUMPY\x01\0", ["a NumPy array"]),
        (b"\x89HDF\r\n\x1a\n", ["an HDF5 file"]),
        (b'{"error": "not found"}', ["weight_map"]),
        (bytes(100), ["unknown kind"]),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, words):
    file = tmp_path / f"{STEM}.safetensors"
    file.write_bytes(content)
    for path in (file, tmp_path):
        fails(lambda path=path: read_weights(path), str(file), *words)


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / f"{STEM}.safetensors")
    for path in (tmp_path / f"{STEM}.safetensors", tmp_path, "/dev/zero"):
        fails(lambda path=path: read_weights(path), "neither a file nor a folder")


def write_parts(folder, arrays, pattern, write=write_safetensors):
    """Two shards without an index; a pattern with the number of the shard."""
    names = list(arrays)
    for part in (1, 2):
        write(folder / pattern.format(part), {name: arrays[name] for name in names[part - 1 :: 2]})


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_shards_without_an_index_are_one_checkpoint(tmp_path, arrays, suffix):
    write = write_safetensors if suffix == "safetensors" else write_tensors
    write_parts(tmp_path, arrays, f"x-0000{{}}-of-00002.{suffix}", write)
    for path in (tmp_path, tmp_path / f"x-00002-of-00002.{suffix}"):
        assert_holds(path, arrays)
    (tmp_path / f"x-00001-of-00002.{suffix}").unlink()
    fails(lambda: read_weights(tmp_path), "1 of the 2 shards of x", "absent: 1")


def test_pickles_have_indices_too(tmp_path, arrays):
    write_parts(tmp_path, arrays, "pytorch_model-0000{}-of-00002.bin", write_tensors)
    placed = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(arrays)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    for path in (tmp_path, index):
        assert_holds(path, arrays)


def test_variants_are_read_and_the_plain_one_wins(tmp_path, arrays):
    write_parts(tmp_path, arrays, f"{STEM}.fp16-0000{{}}-of-00002.safetensors")
    assert_holds(tmp_path, arrays)
    placed = {name: f"{STEM}.fp16-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(arrays)}
    (tmp_path / f"{STEM}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": placed}))
    assert_holds(tmp_path, arrays)
    plain = {name: 2 * array for name, array in arrays.items()}
    index = write_shards(tmp_path, plain)
    assert_holds(tmp_path, plain)
    index.unlink()
    for shard in tmp_path.glob(f"{STEM}-*"):
        shard.unlink()
    for file in tmp_path.iterdir():
        file.unlink()
    write_safetensors(tmp_path / f"{STEM}.fp16.safetensors", arrays)
    assert_holds(tmp_path, arrays)
    write_safetensors(tmp_path / f"{STEM}.safetensors", plain)
    assert_holds(tmp_path, plain)
    (tmp_path / f"{STEM}.safetensors").unlink()
    write_safetensors(tmp_path / f"{STEM}.bf16.safetensors", arrays)
    fails(lambda: read_weights(tmp_path), f"{STEM}.bf16.safetensors, {STEM}.fp16.safetensors", "name the one")


@pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "..", "a/x.safetensors", "x\0"])
def test_an_index_stays_in_its_folder(tmp_path, arrays, place):
    folder = tmp_path / "a"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", arrays)
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": place}}))
    fails(lambda: read_weights(folder), "its own folder" if place != ".." else "not in its folder")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a": 1, "a": 2}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_an_odd_index_is_one_sentence(tmp_path, text):
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(text)
    fails(lambda: read_weights(tmp_path), "index.json")


@pytest.fixture(scope="module")
def flux():
    """A small FLUX by its original names, and the network that it is."""
    source = open_source(ORIGINAL)
    return {name: tensor.read().astype(np.float32) for name, tensor in source.weights.tensors.items()}


def known(names):
    return "a.weight" in names


@pytest.mark.parametrize(
    "prefix",
    [
        *PREFIXES,
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.transformer.",
        "module.model.diffusion_model._orig_mod.",
    ],
)
def test_a_prefix_of_all_names_is_stripped(tmp_path, arrays, prefix):
    write_safetensors(tmp_path / "x.safetensors", {prefix + name: array for name, array in arrays.items()})
    found = strip_prefix(read_weights(tmp_path), known)
    assert list(found.tensors) == list(arrays) and not found.left_out and not found.doubled
    np.testing.assert_array_equal(found.tensors["a.weight"].read(), arrays["a.weight"])


def test_a_prefix_of_some_names_stays(tmp_path, arrays):
    for names in (["module.a.weight", "b.weight"], ["net.x", "net.y"], []):
        write_safetensors(tmp_path / "x.safetensors", {name: arrays["a.weight"] for name in names})
        assert list(strip_prefix(read_weights(tmp_path), known).tensors) == names


def test_of_an_all_in_one_file_the_network_is_read(tmp_path, flux):
    names = ("first_stage_model.decoder.x", "text_encoders.t5xxl.y", "text_encoders.clip_l.scaled_fp8", "vae.z")
    tensors = {f"model.diffusion_model.{name}": array for name, array in flux.items()}
    write_safetensors(tmp_path / "all.safetensors", tensors | dict.fromkeys(names, np.zeros(1, np.float32)))
    shutil.copy(ORIGINAL.parent / "config.json", tmp_path)
    source = open_source(tmp_path)
    assert source.check() and source.weights.tensors.keys() == flux.keys()
    assert source.weights.left_out == ("first_stage_model", "text_encoders", "vae")


MARKS = {
    "a.scale_input": np.ones(1, np.float32),
    "a.comfy_quant": np.zeros(3, np.int64),
    "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn),
}
FORMS = {
    "scalar": ("a.scale_weight", np.float32(2).reshape(())),
    "one": ("a.weight_scale", np.float32([2])),
    "matrix": ("a.scale_weight", np.float32([[2]])),
    "rows": ("a.weight.scale_weight", np.float32([1, 2, 4])),
    "column": ("a.weight_scale", np.float32([[1], [2], [4]])),
    "bf16": ("a.scale_weight", np.asarray([0.5], ml_dtypes.bfloat16)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_scales_are_applied_on_reading(tmp_path, arrays, form, stored):
    name, scale = FORMS[form]
    weight, bias = arrays["a.weight"].astype(stored), arrays["b.weight"][0].astype(stored)
    write_safetensors(tmp_path / "x.safetensors", {"a.weight": weight, "a.bias": bias, name: scale} | MARKS)
    found = attach_scales(drop_marks(read_weights(tmp_path))).tensors
    assert list(found) == ["a.weight", "a.bias"]
    expected = weight.astype(np.float32) * scale.astype(np.float32).reshape((-1, 1) if scale.size > 1 else ())
    assert found["a.weight"].read().dtype == np.float32
    np.testing.assert_array_equal(found["a.weight"].read(), expected)
    assert found["a.bias"].read().dtype == stored


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_marks_without_scales_leave_float8_as_it_is(tmp_path, flux, prefix):
    stored = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in flux.items()}
    marks = {"scaled_fp8": MARKS["scaled_fp8"], f"{prefix}single_blocks.0.linear1.scale_input": np.ones(1, np.float32)}
    write_safetensors(tmp_path / "x.safetensors", {prefix + name: array for name, array in stored.items()} | marks)
    shutil.copy(ORIGINAL.parent / "config.json", tmp_path)
    found = open_source(tmp_path)
    assert found.check() and all(tensor.scale is None for tensor in found.weights.tensors.values())


def test_a_float8_weight_that_lost_its_scale_is_named(tmp_path, arrays):
    tensors = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in arrays.items()}
    scales = {f"{name}.scale_weight": np.ones(1, np.float32) for name in "abc"}
    write_safetensors(tmp_path / "x.safetensors", tensors | scales)
    fails(lambda: attach_scales(read_weights(tmp_path)), "1 float8 weights without a scale", "d.weight")


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_a_scale_is_a_positive_number(tmp_path, arrays, value):
    weight = arrays["a.weight"].astype(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path / "x.safetensors", {"a.weight": weight, "a.scale_weight": np.float32([1, value, 1])})
    fails(lambda: attach_scales(read_weights(tmp_path)), "a.scale_weight", "expected finite numbers above 0")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"c.scale_weight": (1,)}, ["c.scale_weight", "which is not there"]),
        ({"a.weight_scale": (2,)}, ["a.weight_scale [2]", "which is [3, 2], expected one number or one a row"]),
        ({"a.weight_scale": (1, 2)}, ["expected one number or one a row"]),
        ({"a.weight_scale": (1,), "a.scale_weight": (1,)}, ["another scale"]),
        ({"b.weight_scale": (1,)}, ["b.weight", "which is float32, expected float8"]),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(tmp_path, arrays, names, words):
    tensors = {"a.weight": arrays["a.weight"].astype(ml_dtypes.float8_e4m3fn), "b.weight": arrays["b.weight"]}
    tensors |= {name: np.ones(shape, np.float32) for name, shape in names.items()}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    fails(lambda: attach_scales(read_weights(tmp_path)), *words)


def test_a_scaled_checkpoint_is_the_network_times_its_scales(tmp_path, flux):
    """Through open_source, under a prefix, and into leaves by Piece.write."""
    name = "single_blocks.0.linear1.weight"
    tensors = flux | {
        name: flux[name].astype(ml_dtypes.float8_e4m3fn),
        name.replace(".weight", ".scale_weight"): np.float32([3]),
    }
    write_safetensors(
        tmp_path / "x.safetensors", {f"model.diffusion_model.{key}": array for key, array in tensors.items()}
    )
    shutil.copy(ORIGINAL.parent / "config.json", tmp_path)
    found = open_source(tmp_path).check()
    (piece,) = (piece for piece in found.pieces["single_blocks.mlp.fc1"] if piece.layer == 0)
    leaf = np.zeros((2, *[s.stop - s.start for s in piece.take[:1]], flux[name].shape[1]), np.float32)
    piece.write(leaf)
    np.testing.assert_array_equal(leaf[0], 3 * tensors[name].astype(np.float32)[piece.take])
