"""Checkpoints of torch.save: what torch wrote, archives written here from the format's description, and what is refused."""

import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.convert.source import open_source

GOLDEN = Path(__file__).parent / "golden"


def emit(value) -> bytes:
    """Pickle instructions that push a value: strings, whole numbers, tuples and dictionaries; bytes are instructions."""
    match value:
        case bytes():
            return value
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case dict():
            return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"


def tensor(key: str, shape, strides=None, first=0, kind="FloatStorage") -> bytes:
    strides = strides or tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    reference = emit(("storage", f"ctorch\n{kind}\n".encode(), key, "cpu", 0)) + b"Q"
    hooks = b"ccollections\nOrderedDict\n" + emit(()) + b"R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + emit((reference, first, tuple(shape), strides, False, hooks)) + b"R"


def write_archive(path, content: bytes, storages=(), **options):
    """The layout of torch.save: a folder, its pickle, its storages."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("name/data.pkl", content)
        for key, array in dict(storages).items():
            archive.writestr(f"name/data/{key}", np.ascontiguousarray(array).tobytes())
    return path


def write_tensors(path, arrays: dict[str, np.ndarray]):
    places = {name: str(n) for n, name in enumerate(arrays)}
    state = {name: tensor(places[name], array.shape) for name, array in arrays.items()}
    content = b"\x80\x02" + emit(state) + b"."
    return write_archive(path, content, {places[name]: array for name, array in arrays.items()})


def test_a_checkpoint_of_torch_is_read_as_it_was_written():
    tensors = read_weights(GOLDEN / "tiny.pt").tensors
    values = np.arange(12).reshape(3, 4)
    kinds = [
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "int64",
        "int32",
        "uint8",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
    ]
    assert list(tensors) == [*kinds, "part", "parameter", "scalar", "empty"]
    for kind in kinds:
        found = tensors[kind].read()
        assert found.dtype == kind and found.shape == (3, 4)
        expected = (values % 2 if kind == "bool" else values).astype(found.dtype)  # e5m2 has no 9
        np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64))
    np.testing.assert_array_equal(tensors["part"].read(), values[1:])
    np.testing.assert_array_equal(tensors["parameter"].read(), values)
    assert tensors["scalar"].read() == 7 and tensors["empty"].shape == (0, 4)


def test_the_same_model_in_either_container_is_the_same_source(tmp_path):
    (file,) = (GOLDEN / "flux_dev" / "original").glob("*.safetensors")
    plain = open_source(file)
    arrays = {name: tensor.read().astype(np.float32) for name, tensor in plain.weights.tensors.items()}
    config = GOLDEN / "flux_dev" / "original" / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    for source in (open_source(write_tensors(tmp_path / "flux.pt", arrays)), open_source(tmp_path)):
        assert source.config == plain.config and source.layout == plain.layout
        for name, array in arrays.items():
            np.testing.assert_array_equal(source.weights.tensors[name].read(), array)


def test_of_several_pickles_in_a_folder_one_must_be_named(tmp_path):
    """As in Tencent's HunyuanVideo, from the folder above."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "vae").mkdir()
    files = [tmp_path / "transformers" / f"mp_rank_00_model_states{end}.pt" for end in ("", "_fp8", "_fp8_map")]
    for file in files:
        shutil.copy(GOLDEN / "tiny.pt", file)
    names = ", ".join(file.name for file in files)
    for path in (tmp_path, tmp_path / "transformers"):
        with pytest.raises(ValueError, match=rf"transformers: holds 3 files of weights \({names}\); name the one"):
            open_source(path)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_whose_scales_are_elsewhere_is_refused(tmp_path, kind):
    """As HunyuanVideo's fp8 release, whose names are those of the other."""
    reference = emit(("storage", b"ctorch\nUntypedStorage\n", "0", "cpu", 0)) + b"Q"
    hooks = b"ccollections\nOrderedDict\n" + emit(()) + b"R"
    arguments = (reference, 0, (2, 2), (2, 1), False, hooks, f"ctorch\n{kind}\n".encode())
    weight = b"ctorch._utils\n_rebuild_tensor_v3\n" + emit(arguments) + b"R"
    state = {"module": emit({"double_blocks.0.img_mlp.fc1.weight": weight})}
    path = write_archive(tmp_path / "fp8.pt", b"\x80\x02" + emit(state) + b".", {"0": np.zeros(4, np.uint8)})
    with pytest.raises(
        ValueError, match=rf"double_blocks.0.img_mlp.fc1.weight is {kind}.*_map.pt.*expected .* bfloat16"
    ):
        open_source(path)


class Call:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch harm",)


class Thing:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": Call()}, 2), "it calls (posix|nt).system"),
        (pickle.dumps(Call(), 4), "it calls (posix|nt).system"),
        (pickle.dumps({"a": Thing()}, 2), "it makes a test_torch_pickle.Thing"),
        (pickle.dumps(Call(), 0), "it has the instruction"),
        (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00xb.", "it sets the state of a os.system"),
        (b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.", "it has the instruction INST"),
        (b"\x80\x02" + tensor("0", (2,), kind="QInt8Storage") + b".", "a storage of torch.QInt8Storage"),
        (b"\x80\x02}q\x00X", "pickle"),
        (b"\x80\x02Q.", "a broken pickle"),
        (b"\x80\x02" + emit({"a": 1}) + b".", "no dictionary of tensors.*it holds a"),
        (b"\x80\x02" + emit({"a": tensor("1", (2,))}) + b".", "a lies in storage 1, which is not in the file"),
        (b"\x80\x02" + emit({"a": tensor("0", (2, 3))}) + b".", r"a \(2, 3\) goes beyond its storage of 16 bytes"),
        (b"\x80\x02" + emit({"a": tensor("0", (2,), first=-1)}) + b".", "goes beyond its storage"),
        (b"\x80\x02" + emit({"a": tensor("0", (2, 2), (1, 2))}) + b".", r"a \(2, 2\) has strides \(1, 2\)"),
    ],
)
def test_what_is_not_tensors_alone_is_refused_in_one_sentence(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path / "bad.pt", content, {"0": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).count(str(path)) == 1
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_archive_of_torch_are_refused(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps(OrderedDict(), 2))
    whole = (GOLDEN / "tiny.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name, message in (("old.pt", "a pickle, but none of torch.save"), ("cut.pt", "truncated or damaged")):
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        read_weights(tmp_path / "other.pt")
    content = b"\x80\x02" + emit({"a": tensor("0", (4,))}) + b"."
    packed = write_archive(tmp_path / "packed.pt", content, {"0": np.zeros(4)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        read_weights(packed)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")
