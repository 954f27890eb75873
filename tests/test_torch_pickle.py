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
from chipmunk_jax.convert.scales import attach_scales
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


def tensor(key: str, shape, strides=None, first=0, kind="FloatStorage", size=0) -> bytes:
    strides = strides or tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    reference = emit(("storage", f"ctorch\n{kind}\n".encode(), key, "cpu", size)) + b"Q"
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
        attach_scales(read_weights(path))


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
        (b"\x80\x02" + emit({"a": tensor("0", (2, 2), (1, 1))}) + b".", r"a \(2, 2\) has strides \(1, 1\)"),
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


def write_legacy(path, arrays, **told):
    """As torch.save wrote before PyTorch 1.6: five pickles, then every storage after its number of elements."""
    keys = {name: str(n) for n, name in enumerate(arrays)}
    state = {name: tensor(keys[name], array.shape, size=array.size) for name, array in arrays.items()}
    machine = {"protocol_version": 1001, "little_endian": True} | told
    listed = b"](" + b"".join(emit(key) for key in keys.values()) + b"e"
    magic = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    pickles = (magic, emit(1001), emit(machine), emit(state), listed)
    data = b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values())
    path.write_bytes(b"".join(b"\x80\x02" + content + b"." for content in pickles) + data)
    return path


@pytest.fixture
def arrays():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float32(7).reshape(()),
        "c": np.ones(4, np.float32),
    }


def test_what_pytorch_wrote_before_zip_archives_is_read(tmp_path, arrays):
    tensors = read_weights(write_legacy(tmp_path / "old.bin", arrays)).tensors
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array)
    whole = (tmp_path / "old.bin").read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:-30]):
        (tmp_path / "cut.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_weights(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="byte order"):
        read_weights(write_legacy(tmp_path / "big.pt", arrays, little_endian=False))


def test_bytes_that_are_not_those_written_are_found_when_they_are_read(tmp_path, arrays):
    file = write_tensors(tmp_path / "a.pt", arrays)
    file.write_bytes(file.read_bytes().replace(arrays["a"].tobytes(), arrays["a"][::-1].tobytes()))
    tensors = read_weights(file).tensors
    np.testing.assert_array_equal(tensors["c"].read(), arrays["c"])
    with pytest.raises(ValueError, match=r"a\.pt: damaged: bytes .* CRC-32"):
        tensors["a"].read()


def wrapped(path, **states):
    """An archive of dictionaries of one-element tensors, each with the values that are told."""
    values = [value for state in states.values() if isinstance(state, dict) for value in state.values()]
    storages = {str(value): np.float32([value]) for value in values}
    content = {
        key: {name: tensor(str(value), (1,)) for name, value in state.items()} if isinstance(state, dict) else state
        for key, state in states.items()
    }
    nested = {key: emit(value) if isinstance(value, dict) else value for key, value in content.items()}
    return write_archive(path, b"\x80\x02" + emit(nested) + b".", storages)


@pytest.mark.parametrize(
    ("states", "chosen", "left_out"),
    [
        ({"model": {"x": 1}, "optimizer": {"x": 2}, "epoch": 3}, 1, ("optimizer",)),
        ({"model_state_dict": {"x": 1}, "step": tensor("1", (1,))}, 1, ()),
        ({"state_dict": {"x": 1, "y": 3}, "ema": {"x": 2}}, 1, ("ema",)),
        ({"generator": {"x": 1}, "generator_ema": {"x": 2}, "critic": {"x": 3}}, 2, ("generator", "critic")),
        ({"ema": {"x": 2}}, 2, ()),
    ],
)
def test_of_a_training_checkpoint_the_network_is_read(tmp_path, states, chosen, left_out):
    weights = read_weights(wrapped(tmp_path / "a.ckpt", **states))
    assert weights.tensors["x"].read() == chosen and weights.left_out == left_out


def twice(levels):
    """A tuple of two of a tuple of two of ..: few instructions, and 2^levels values to whoever looks at them all."""
    return b")" + b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(levels))


def test_tensors_whose_axes_lie_in_another_order_are_read(tmp_path):
    """Transposed before they were saved, or channels last; a gap or an element that counts twice is still refused."""
    stored = np.arange(24, dtype=np.float32)
    strides = {
        "a": ((2, 3, 4), (12, 4, 1)),
        "b": ((4, 2, 3), (1, 12, 4)),
        "c": ((4, 1, 6), (6, 9, 1)),
        "d": ((6, 4), (1, 6)),
    }
    content = b"\x80\x02" + emit({name: tensor("0", *one) for name, one in strides.items()}) + b"."
    tensors = read_weights(write_archive(tmp_path / "a.pt", content, {"0": stored})).tensors
    for name, (shape, steps) in strides.items():
        expected = np.lib.stride_tricks.as_strided(stored, shape, [4 * step for step in steps])
        np.testing.assert_array_equal(tensors[name].read(), expected)
    for shape, steps in (((2, 3), (4, 1)), ((2, 3), (0, 1)), ((2, 3), (1, 1)), ((2, 3), (-3, 1))):
        content = b"\x80\x02" + emit({"a": tensor("0", shape, steps)}) + b"."
        with pytest.raises(ValueError, match="expected contiguous ones, in any order of the axes"):
            read_weights(write_archive(tmp_path / "b.pt", content, {"0": stored}))


HARMLESS = b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x01sb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (emit({"a": b"(" * 100_000 + b"t" * 100_000, "b": tensor("0", (2, 3))}), "goes beyond"),
        (emit({"a": b"]" * 100_000 + b"a" * 99_999, "b": tensor("0", (2, 3))}), "goes beyond"),
        (b"}" + twice(60) + emit(1) + b"s", "instruction POP|a key that is a tuple"),
        (b"}X\x01\x00\x00\x00a" + emit(1) + b"sX\x01\x00\x00\x00a" + emit(2) + b"s", "a broken pickle|twice"),
        (emit({"a": b"\x8b\xff\xff\xff\x7f"}), "a broken pickle|LONG4"),
        (b"}" + emit(1) + tensor("0", (2,)) + b"s", "name is of type int, expected a string"),
        (emit({"a": tensor("0", ("2",), (1,))}), "a shape that is no shape"),
        (emit({"a": tensor("0", (True,), (1,))}), "a shape that is no shape"),
        (emit({"a": tensor("0", (1,) * 40, (1,) * 40)}), "a shape that is no shape"),
        (emit({"a": tensor("0", (-2,), (1,))}), "a shape that no array has"),
        (emit({"a": tensor("0", (2, 2), (2,))}), "has strides"),
        (
            emit({"a": b"ctorch._utils\n_rebuild_sparse_tensor\n" + emit(()) + b"R"}),
            "torch._utils._rebuild_sparse_tensor",
        ),
        (emit({"a": b"ctorch._utils\n_rebuild_qtensor\n" + emit(()) + b"R"}), "torch._utils._rebuild_qtensor"),
        (emit({"a": HARMLESS, "b": tensor("0", (2, 3))}), "goes beyond"),
        (emit({"a": tensor("0", (2,), kind="Float\\Storage")}), "broken pickle|refers to"),
    ],
)
def test_odd_pickles_are_one_sentence(tmp_path, content, message):
    path = write_archive(tmp_path / "odd.pt", b"\x80\x02" + content + b".", {"0": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert len(str(error.value)) < 400


def test_what_is_beside_the_weights_need_not_be_built(tmp_path):
    content = emit({"args": HARMLESS, "model": emit({"a": tensor("0", (4,))})})
    path = write_archive(tmp_path / "a.pt", b"\x80\x02" + content + b".", {"0": np.zeros(4, np.float32)})
    assert list(read_weights(path).tensors) == ["a"]


def test_odd_archives_are_one_sentence(tmp_path, arrays):
    whole = write_tensors(tmp_path / "a.pt", arrays).read_bytes()
    central, local = whole.index(b"PK\x01\x02"), whole.index(b"PK\x03\x04")
    encrypted = bytearray(whole)
    encrypted[central + 8] |= 1
    encrypted[local + 6] |= 1
    second = whole.index(b"PK\x01\x02", central + 4)
    shared = whole[: second + 42] + whole[central + 42 : central + 46] + whole[second + 46 :]
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        for content in (b"", b"N."):
            archive.writestr("name/data.pkl", content)
    cases = [(bytes(encrypted), "encrypted"), (shared, "damaged"), ((tmp_path / "twice.pt").read_bytes(), "twice")]
    for content, message in cases:
        (tmp_path / "odd.pt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / "odd.pt")


def test_an_archive_with_long_sizes_is_read(tmp_path, arrays):
    """Zip64, as torch.save writes beyond 4 GB."""
    write_tensors(tmp_path / "a.pt", arrays)
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name in source.namelist():
            with archive.open(name, "w", force_zip64=True) as stream:
                stream.write(source.read(name))
    for name, found in read_weights(tmp_path / "b.pt").tensors.items():
        np.testing.assert_array_equal(found.read(), arrays[name])


def write_float8(path, name, scaled):
    """A float8 weight as of HunyuanVideo's release, and its scale in the file beside it."""
    reference = emit(("storage", b"ctorch\nUntypedStorage\n", "0", "cpu", 0)) + b"Q"
    hooks = b"ccollections\nOrderedDict\n" + emit(()) + b"R"
    weight = emit((reference, 0, (2, 2), (2, 1), False, hooks, b"ctorch\nfloat8_e4m3fn\n"))
    state = {"module": emit({f"{name}.weight": b"ctorch._utils\n_rebuild_tensor_v3\n" + weight + b"R"})}
    write_archive(path, b"\x80\x02" + emit(state) + b".", {"0": np.full(4, 0x38, np.uint8)})  # ones
    if scaled:
        write_tensors(path.with_name(f"{path.stem}_map.pt"), {name: np.float32(3).reshape(())})


def test_scales_of_a_map_beside_the_file_are_applied(tmp_path):
    write_float8(tmp_path / "fp8.pt", "x", scaled=True)
    found = attach_scales(read_weights(tmp_path / "fp8.pt")).tensors
    assert list(found) == ["x.weight"]
    np.testing.assert_array_equal(found["x.weight"].read(), np.full((2, 2), 3, np.float32))
