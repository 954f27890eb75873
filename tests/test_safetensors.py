"""Readers of safetensors: names, shapes and dtypes from headers; bad files found before any data are read."""

import json

import ml_dtypes
import numpy as np
import pytest

from chipmunk_jax.convert.files import read_weights

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
}


def write_safetensors(path, tensors):
    """One file, written from the format's description: length, JSON, data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_shards(folder, tensors, count=2):
    """Shards that hold every count-th tensor, and their index."""
    placed = {}
    for shard in range(count):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors"
        names = list(tensors)[shard::count]
        write_safetensors(folder / name, {key: tensors[key] for key in names})
        placed |= dict.fromkeys(names, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return index


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    made = {str(dtype): random.standard_normal((3, 5)).astype(dtype) for dtype in NAMES}
    return made | {"scalar": np.float32(7).reshape(()), "empty": np.zeros((0, 4), np.float32)}


def test_every_dtype_reads_back(tmp_path, tensors):
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = read_weights(tmp_path / "a.safetensors").tensors
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        view = found[name].read()
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (array.shape, array.dtype, array.nbytes)
        assert not (view.size and view.flags.writeable)
        np.testing.assert_array_equal(view, array)


def test_shards_are_one_mapping(tmp_path, tensors):
    index = write_shards(tmp_path, tensors, count=3)
    for path in (tmp_path, index):
        found = read_weights(path).tensors
        assert found.keys() == tensors.keys()
        np.testing.assert_array_equal(found["float16"].read(), tensors["float16"])


def fails(path, *words):
    """The one sentence that reading `path` raises holds all words."""
    with pytest.raises(ValueError) as error:
        read_weights(path)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_shard_is_named(tmp_path, tensors, kept):
    write_shards(tmp_path, tensors)
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    fails(tmp_path, shard.name, "truncated")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{nonsense", ["damaged", "JSON"]),
        (b"[1, 2]", ["unknown kind"]),
        (b'{"a":' * 10_000, ["damaged", "recursion limit"]),
        (b'{"a": 3}', ["damaged", "TensorInfo"]),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', ["damaged", "data_offsets"]),
        (b'{"__metadata__": {"a": 3}}', ["damaged", "expected a string"]),
        (b'{"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}', ["damaged", "F3"]),
        (b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', ["a has dtype C64", "BF16"]),
        *(
            (b'{"a": {"dtype": "F32", "shape": %s, "data_offsets": [0, 8]}}' % shape, ["damaged"])
            for shape in (b"[3]", b"[-2]", b"[true, 2]", b"[2.0]", b"2", b"null", b"[4611686018427387904, 8]")
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]}, "b": {"dtype": "F32", '
            b'"shape": [2], "data_offsets": [0, 8]}}',
            ["a has a shape that no array has"],
        ),
    ],
)
def test_bad_header_is_named(tmp_path, text, words):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    fails(file, file.name, *words)


@pytest.mark.parametrize(
    ("spans", "size"),
    [
        ([[0, 8], [4, 12]], 12),  # overlapping
        ([[4, 12], [12, 20]], 20),  # shifted
        ([[0, 8], [12, 20]], 20),  # with a hole
        ([[0, 8], [8, 16]], 17),  # trailing
        ([[0, 8], [8, 16]], 15),  # cut
    ],
)
def test_data_are_exactly_what_the_header_covers(tmp_path, spans, size):
    header = {f"{n}": {"dtype": "F32", "shape": [2], "data_offsets": span} for n, span in enumerate(spans)}
    text = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    fails(file, "truncated or damaged")


@pytest.mark.parametrize("length", [-1, 1, 10**6, 10**9, 2**63])
def test_a_wrong_length_of_the_header_shifts_nothing(tmp_path, tensors, length):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, tensors)
    whole = file.read_bytes()
    told = int.from_bytes(whole[:8], "little") + length if abs(length) == 1 else length
    file.write_bytes(told.to_bytes(8, "little") + whole[8:])
    fails(file, "truncated", "damaged")


def test_missing_shard_is_named(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    fails(tmp_path, "index.json", "diffusion_pytorch_model-00002-of-00002.safetensors")


def test_tensor_absent_from_its_shard_is_named(tmp_path, tensors):
    index = write_shards(tmp_path, tensors)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    fails(tmp_path, "ghost", "diffusion_pytorch_model-00001-of-00002.safetensors")


def test_bad_index_is_named(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    fails(tmp_path, "index.json", "weight_map")


def test_folder_must_hold_one_network(tmp_path, tensors):
    fails(tmp_path, "no .safetensors")
    write_safetensors(tmp_path / "a.safetensors", tensors)
    write_safetensors(tmp_path / "b.safetensors", tensors)
    fails(tmp_path, "a.safetensors, b.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "c")


def test_repeated_name_is_doubled(tmp_path, tensors):
    index = write_shards(tmp_path, tensors)
    write_safetensors(tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors", tensors)
    assert set(read_weights(index).doubled) == set(list(tensors)[::2])
    text = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], '
    text += b'"data_offsets": [0, 8]}}'
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert read_weights(tmp_path / "a.safetensors").doubled == ("a",)
