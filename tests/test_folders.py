"""Releases of the original teams, as whole folders: what convert and Pipeline make of them is what they make of diffusers'."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from golden_pipelines import GOLDEN, assemble, cases
from safetensors.numpy import save_file
from test_torch_pickle import write_tensors

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, flux, flux_vae, inspect, open_folder, open_source, read, t5, wan, wan_vae
from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import FluxVaeConfig, WanVaeConfig
from chipmunk_jax.models.checkpoint import load
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.pipelines import Pipeline

KINDS = {"flux": "flux_schnell_pipeline", "wan21": "wan21_pipeline", "wan22": "wan22_pipeline"}
# What lies in releases beside the components.
FOREIGN = ("README.md", "LICENSE.txt", ".gitattributes", "dev_grid.jpg", "configuration.json", "assets/logo.png")


@pytest.fixture(scope="module", autouse=True)
def tiny_sizes():
    """What no tensor of a VAE tells is the published model's where no config.json says it, and here that of the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FluxVaeConfig, "norm_num_groups", 2)
        stated = json.loads((GOLDEN / "wan21_pipeline/vae/config.json").read_text())
        for name in ("latents_mean", "latents_std"):
            patch.setattr(WanVaeConfig, name, tuple(stated[name]))
        yield


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    """Kind -> the folder that diffusers saves, without its scheduler, which the original teams do not publish."""
    root = tmp_path_factory.mktemp("diffusers")
    folders = {kind: assemble(name, root / kind) for kind, name in KINDS.items()}
    for folder in folders.values():
        shutil.rmtree(folder / "scheduler")
    return folders


@pytest.fixture(scope="module")
def originals(diffusers, tmp_path_factory):
    """Kind -> the same weights as their team publishes them, with what else lies there."""
    root = tmp_path_factory.mktemp("original")
    made = {"flux": publish_flux(diffusers["flux"], root / "flux")}
    made |= {kind: publish_wan(diffusers[kind], root / kind) for kind in ("wan21", "wan22")}
    for folder in made.values():
        for name in FOREIGN:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}" if name.endswith(".json") else "# A release\n")
        vision = {"visual.transformer.0.attn.to_qkv.weight": np.ones((6, 2), np.float32)}
        write_tensors(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", vision)
    return made


def publish_flux(source, folder):
    """FLUX.1 as Black Forest Labs publish it: two files beside the folders of text encoders and tokenizers."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(source / name, folder / name)
    save_file(original_flux(read(source / "transformer", "float32")), folder / "flux1-schnell.safetensors")
    shutil.copy(source / "transformer/config.json", folder)  # no tensor tells heads of 16
    save_file(original_vae(source / "vae", flux_vae), folder / "ae.safetensors")
    return folder


def publish_wan(source, folder):
    """Wan as its team publishes it: the network in shards beside all else, or two of them in folders; .pth files."""
    names = renaming(wan.DIFFUSERS, wan.ORIGINAL)
    folder.mkdir()
    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for role, name in experts.items() if (source / "transformer_2").is_dir() else [("transformer", ".")]:
        (folder / name).mkdir(exist_ok=True)
        stated = {
            "_class_name": "WanModel",
            "model_type": "t2v",
            "num_heads": 2,
            "dim": 32,
            "text_len": 512,
            "eps": 1e-6,
        }
        (folder / name / "config.json").write_text(json.dumps(stated))
        arrays = renamed(arrays_of(source / role), names)
        if name == ".":
            save_shards(arrays, folder / name)
        else:
            save_file(arrays, folder / name / "diffusion_pytorch_model.safetensors")
    write_tensors(folder / "Wan2.1_VAE.pth", original_vae(source / "vae", wan_vae))
    names = renaming(t5.table(t5.TRANSFORMERS_NAMES), t5.table(t5.ORIGINAL_NAMES))
    write_tensors(folder / "models_t5_umt5-xxl-enc-bf16.pth", renamed(arrays_of(source / "text_encoder"), names))
    shutil.copytree(source / "tokenizer", folder / "google/umt5-xxl")
    return folder


def arrays_of(folder):
    return {name: np.array(tensor.read(), np.float32) for name, tensor in read_weights(folder).tensors.items()}


def renaming(theirs, ours):
    """Name in one layout -> in the other, of tables with the same rules; "*" stands for the layer."""
    return {a: b for x, y in zip(theirs, ours, strict=True) for a, b in zip(x.sources, y.sources, strict=True)}


def renamed(arrays, names):
    def rename(name):
        layer = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        return names[name] if name in names else names[pattern].replace("*", layer[1])

    return {rename(name): array for name, array in arrays.items()}


def original_flux(model):
    """A FLUX under its original names, whose linear layers are joined in other ways than diffusers'."""
    leaves, arrays = leaves_of(model), {}
    for rule in flux.ORIGINAL:
        (source,), paths = rule.sources, [target.removesuffix(".T") for target in rule.targets]
        if paths[0] not in leaves:
            continue
        layers = range(len(leaves[paths[0]])) if "*" in source else [None]
        for layer in layers:
            parts = [np.asarray(leaves[path] if layer is None else leaves[path][layer]) for path in paths]
            parts = [
                part.T if target.endswith(".T") else part for part, target in zip(parts, rule.targets, strict=True)
            ]
            arrays[source.replace("*", str(layer))] = np.ascontiguousarray(np.concatenate(parts, axis=rule.axis))
    return arrays


def original_vae(folder, module):
    config = open_source(folder).config
    names = renaming(module.table(module.DIFFUSERS_NAMES, config), module.table(module.ORIGINAL_NAMES, config))
    arrays = renamed(arrays_of(folder), names)
    pixel = lambda name, array: module is flux_vae and ".attn_1." in name and array.ndim == 2
    return {name: array[:, :, None, None] if pixel(name, array) else array for name, array in arrays.items()}


def save_shards(arrays, folder):
    """Two files and their index."""
    halves = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": list(arrays)[n::2] for n in range(2)}
    for file, names in halves.items():
        save_file({name: arrays[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def draw(folder, kind, **changed):
    """Pixels of the first stored call in two steps."""
    case = next(iter(cases(KINDS[kind]).values()))
    settings = case.settings | dict(
        num_inference_steps=2, latents=case.arrays["noise"], sparsity=None, output_type="np"
    )
    out = Pipeline.from_pretrained(folder, dtype="float32")(**settings | dict(progress=False) | changed)
    return out.images if out.frames is None else out.frames


def assert_same(found, expected):
    """The weights of two components are the same, bit for bit, and so is the config."""
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_of_its_team_gives_the_pixels_of_diffusers_folder(originals, diffusers, kind):
    np.testing.assert_array_equal(draw(originals[kind], kind), draw(diffusers[kind], kind))


@pytest.mark.parametrize("kind", ["flux", "wan22"])
def test_a_release_of_its_team_converts_to_what_diffusers_folder_does(originals, diffusers, kind, tmp_path):
    convert(originals[kind], tmp_path / "out", dtype="float32", progress=False)
    expected = open_folder(diffusers[kind])
    found = open_folder(tmp_path / "out")
    assert list(found.components) == list(expected.components) and not found.missing
    assert (found.network, found.boundary, found.shift) == (expected.network, expected.boundary, None)
    assert found.tokenizers.keys() == expected.tokenizers.keys()
    for role, path in expected.components.items():
        assert_same(load(tmp_path / "out" / role), read(path, "float32"))


def test_text_encoders_in_files_without_tokenizers_take_embeddings(originals, diffusers, tmp_path, capsys):
    folder = shutil.copytree(originals["flux"], tmp_path / "files")
    for role, file in (("text_encoder", "clip_l.safetensors"), ("text_encoder_2", "t5xxl_fp16.safetensors")):
        save_file(arrays_of(folder / role), folder / file)
        shutil.rmtree(folder / role)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    found = open_folder(folder)
    assert list(found.components) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert found.missing == ["tokenizer", "tokenizer_2"]
    assert_same(
        read(found.components["text_encoder_2"], "float32"), read(diffusers["flux"] / "text_encoder_2", "float32")
    )
    assert main(["inspect", str(folder)]) == 1
    assert "missing: tokenizer_2  no prompts; embeddings can be given in their place" in capsys.readouterr().out
    with pytest.raises(InputError, match="no tokenizer, so prompts cannot be read; give prompt_embeds"):
        draw(folder, "flux")
    arrays = next(iter(cases(KINDS["flux"]).values())).arrays
    given = dict(prompt=None, prompt_embeds=arrays["text"], pooled_prompt_embeds=arrays["pooled"])
    request = Pipeline.from_pretrained(folder).check(height=32, width=48, **given)
    assert request.wanted.given.keys() == {"text", "pooled"}


def test_a_network_that_is_there_twice_is_read_once(originals, diffusers, tmp_path):
    """FLUX.1-dev on the hub is both: files of the original beside diffusers' folders."""
    folder = shutil.copytree(originals["flux"], tmp_path / "both")
    for role in ("transformer", "vae"):
        shutil.copytree(diffusers["flux"] / role, folder / role)
    (folder / "config.json").unlink()
    (folder / "flux1-schnell.safetensors").write_bytes(b"half of it")
    found = open_folder(folder)
    assert (found.components["transformer"], found.components["vae"]) == (folder / "transformer", folder / "vae")
    assert not found.missing and inspect(folder).whole


@pytest.mark.parametrize(
    ("kind", "twin", "expected"),
    [
        ("flux", "ae.safetensors", r"holds 2 files of weights \(ae.safetensors, other-ae.safetensors\); name the one"),
        ("flux", "flux1-schnell.safetensors", r"holds 2 files of weights \(flux1-schnell.safetensors, other-flux1"),
        ("wan21", "Wan2.1_VAE.pth", r"holds 2 files of weights \(Wan2.1_VAE.pth, other-Wan2.1_VAE.pth\); name the one"),
    ],
)
def test_two_files_of_one_kind_are_one_sentence(originals, kind, twin, expected, tmp_path):
    folder = shutil.copytree(originals[kind], tmp_path / "twins")
    shutil.copy(folder / twin, folder / f"other-{twin}")
    for use in (inspect, Pipeline.from_pretrained, lambda path: convert(path, tmp_path / "out", progress=False)):
        with pytest.raises(InputError, match=expected) as error:
            use(folder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_beside_a_release_says_the_shift(originals, tmp_path):
    folder = shutil.copytree(originals["wan21"], tmp_path / "shifted")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"flow_shift": 3.5}))
    assert Pipeline.from_pretrained(folder).variant.shift == 3.5
    assert Pipeline.from_pretrained(originals["wan21"]).variant.shift == 8.0
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": True}))
    with pytest.raises(InputError, match="use_dynamic_shifting=True: expected False"):
        Pipeline.from_pretrained(folder)


def test_what_lies_beside_the_components_is_no_component(originals):
    names = {
        "flux": ["text_encoder", "text_encoder_2", "transformer", "vae"],
        "wan21": ["text_encoder", "transformer", "vae"],
    }
    names["wan22"] = ["text_encoder", "transformer", "transformer_2", "vae"]
    assert {kind: list(open_folder(folder).components) for kind, folder in originals.items()} == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["vae", "text_encoder"])
def test_a_release_without_a_component_says_what_that_forbids(originals, kind, role, tmp_path, capsys):
    folder = shutil.copytree(originals[kind], tmp_path / "part")
    (path,) = [open_folder(folder).components[role]]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert open_folder(folder).missing == [role]
    assert main(["inspect", str(folder)]) == 1
    assert f"missing: {role}" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"no {role}, so "):
        draw(folder, kind)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("flux", "flux1-schnell.safetensors"),
        ("flux", "ae.safetensors"),
        ("flux", "text_encoder/model.safetensors"),
        ("wan21", "Wan2.1_VAE.pth"),
        ("wan21", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("wan22", "low_noise_model/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_damaged_component_is_never_taken_for_a_missing_one(originals, kind, file, tmp_path):
    folder = shutil.copytree(originals[kind], tmp_path / "damaged")
    (folder / file).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{re.escape(file)}: a git-lfs pointer, .*: run `git lfs pull`"):
        Pipeline.from_pretrained(folder)


def test_a_damaged_file_that_nobody_needs_is_left_alone(originals, tmp_path):
    folder = shutil.copytree(originals["flux"], tmp_path / "whole")
    (folder / "flux1-schnell-Q4.gguf").write_bytes(b"GGUF" + bytes(60))
    assert inspect(folder).whole


def test_a_release_of_two_networks_is_described_as_one(originals, capsys):
    assert main(["inspect", str(originals["wan22"])]) == 0
    out = capsys.readouterr().out
    assert "40 steps of UniPC, guidance 4, guidance_2 3, " in out
    assert re.search(r"tokenizer +google/umt5-xxl/tokenizer.json\n", out)
