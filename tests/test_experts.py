"""Wan2.2-A14B: a release of two networks is one checkpoint of two, and is never taken for one."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, inspect, load, open_source, read
from chipmunk_jax.convert.wan import DIFFUSERS, ORIGINAL
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import WanConfig
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.pipelines import variant_of

GOLDEN = Path(__file__).parent / "golden/wan_t2v/transformer"


def tensors(scale):
    """Those of a golden Wan with three more channels in, which are its image's, times a number."""
    found = load_file(GOLDEN / "diffusion_pytorch_model.safetensors")
    found["patch_embedding.weight"] = np.repeat(found["patch_embedding.weight"], 2, axis=1)
    return {name: array * np.float32(scale) for name, array in found.items()}


def publish(folder, names, arrays, **fields):
    """Writes two networks into folders of these names, the second one's weights twice the first one's."""
    config = json.loads((GOLDEN / "config.json").read_text()) | {"in_channels": 8} | fields
    for name, scale in zip(names, (1, 2), strict=True):
        (folder / name).mkdir(parents=True)
        save_file(arrays(scale), folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A release in diffusers' layout."""
    folder = publish(tmp_path_factory.mktemp("release") / "a14b", ("transformer", "transformer_2"), tensors)
    index = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def pair(release, tmp_path_factory):
    """The release converted."""
    target = tmp_path_factory.mktemp("converted") / "pair"
    convert(release, target, dtype="float32", progress=False)
    return target


def test_both_networks_are_there(release, pair):
    names = ["transformer", "transformer_2"]
    assert sorted(path.name for path in pair.iterdir()) == ["config.json", *names]
    index = {"network": "wan", "components": names, "boundary": 0.9, "shift": None}
    assert json.loads((pair / "config.json").read_text()) == index
    for expert in names:
        found, expected = load(pair / expert), read(release / expert, "float32")
        assert found.config == expected.config and found.config.in_dim == 8 and found.config.image_dim is None
        jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(expected))
        assert found.conditions(6, 5)["latents"] == (6, 16) and "image" not in found.conditions(6, 5)


def test_the_folders_of_the_team_give_the_same(pair, tmp_path):
    names = {
        theirs: ours for a, b in zip(DIFFUSERS, ORIGINAL, strict=True) for theirs, ours in zip(a.sources, b.sources, strict=True)
    }  # fmt: skip

    def original(scale):
        return {rename(names, name): array for name, array in tensors(scale).items()}

    source = publish(tmp_path / "source", ("high_noise_model", "low_noise_model"), original)
    for name in ("high_noise_model", "low_noise_model"):
        stated = dict(_class_name="WanModel", model_type="i2v", num_heads=2, in_dim=8, text_len=512)
        (source / name / "config.json").write_text(json.dumps(stated))
    convert(source, tmp_path / "out", dtype="float32", progress=False)
    assert (tmp_path / "out/config.json").read_text() == (pair / "config.json").read_text()
    low = leaves_of(load(tmp_path / "out/transformer_2"))
    jax.tree.map(np.testing.assert_array_equal, low, leaves_of(load(pair / "transformer_2")))


def rename(names, name):
    """The original's name of a tensor of diffusers."""
    start, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    return names[name] if name in names else names[f"{start}.*.{rest}"].replace("*", layer)


def test_a_pair_is_never_taken_for_one(release, pair, tmp_path, capsys):
    with pytest.raises(InputError, match=r"two networks, one for times from 1 to 0.9 .* expected .*transformer or"):
        load(pair)
    for path in (pair, release):
        found = inspect(path)
        assert (list(found.components), found.boundary) == (["transformer", "transformer_2"], 0.9) and not found.whole
    for use in (open_source, read):
        with pytest.raises(InputError, match="two networks, transformer for much noise and transformer_2 for little"):
            use(release)
    with pytest.raises(InputError, match="already converted"):
        convert(pair, tmp_path / "again", progress=False)
    assert main(["inspect", str(pair)]) == 1
    assert "transformer_2 samples from t = 0.9 down" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
@pytest.mark.parametrize("kept", [0, 1])
def test_half_of_a_pair_is_never_taken_for_a_model(release, names, kept, tmp_path):
    source, absent = tmp_path / "source", names[1 - kept]
    shutil.copytree(release / "transformer", source / names[kept])
    (source / absent).mkdir()
    shutil.copy(release / "model_index.json", source)
    for use in (read, inspect, lambda path: convert(path, tmp_path / "out", progress=False)):
        with pytest.raises(InputError, match=f"half of two networks, {absent} holds no weights"):
            use(source)
    assert inspect(source / names[kept]).whole  # on purpose
    if kept == 0:
        convert(source, tmp_path / "out", component="transformer", dtype="float32", progress=False)
        assert "transformer_2" in inspect(tmp_path / "out").missing


def test_a_release_of_one_network_may_say_that_there_is_no_second(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "transformer")
    index = {"_class_name": "WanPipeline", "boundary_ratio": None, "transformer_2": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert inspect(tmp_path).whole


def test_a_pair_that_is_there_is_kept_and_one_of_another_dtype_replaced_when_asked_for(release, pair, tmp_path, capsys):
    target = tmp_path / "pair"
    shutil.copytree(pair, target)
    made = (target / "transformer/config.json").stat().st_mtime_ns
    convert(release, target, dtype="float32", progress=False)
    assert (target / "transformer/config.json").stat().st_mtime_ns == made
    with pytest.raises(InputError, match="already converted from other files or to another dtype; add --overwrite"):
        convert(release, target, progress=False)
    assert main(["convert", str(release), str(target), "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert said.count("wan, ") == 2 and f"{target}/transformer_2: " in said
    assert load(target / "transformer_2").dtype == "bfloat16"


@pytest.mark.parametrize("boundary", [0, 1, 1.5, "0.9", True, None, [0.9]])
def test_a_boundary_that_is_none_is_refused(release, boundary, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(release, source)
    (source / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    with pytest.raises(InputError, match="boundary_ratio="):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_networks_of_different_sizes_are_no_pair(release, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(release, source)
    shutil.rmtree(source / "transformer_2")
    shutil.copytree(GOLDEN, source / "transformer_2")
    with pytest.raises(InputError, match="two networks of different sizes"):
        convert(source, tmp_path / "out", progress=False)


def test_an_expert_is_sampled_as_its_team_does():
    found = variant_of(WanConfig(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40, in_dim=36))
    assert (found.steps, found.shift, found.guidance, found.frames) == (40, 5.0, 3.5, 81)
    _, noise, cond = found.shapes(found.complete(), 1, "bfloat16")
    assert noise.shape == (1, 75_600, 64) and cond["latents"].shape == (1, 75_600, 80) and "image" not in cond
    small = variant_of(WanConfig(dim=3072, ffn_dim=14_336, num_heads=24, in_dim=48, out_dim=48))
    assert small.grid() == (31, 22, 40) and (small.frames, small.fps) == (121, 24)  # a fourth of Wan2.1's tokens
