"""hf:owner/name is a folder in Hugging Face's cache; of a repository, only what conversion reads is fetched."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_pipelines import assemble

from chipmunk_jax.convert import convert, inspect, load
from chipmunk_jax.convert.folder import COMPONENTS
from chipmunk_jax.convert.hub import local_path
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.leaves import leaves_of
from chipmunk_jax.pipelines import Pipeline

hub = pytest.importorskip("huggingface_hub")
constants, errors, utils = (pytest.importorskip(f"huggingface_hub.{name}") for name in ("constants", "errors", "utils"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A FLUX.1-schnell as diffusers saves it."""
    return assemble("flux_schnell_pipeline", tmp_path_factory.mktemp("golden") / "flux")


@pytest.fixture(scope="module")
def cache(release, tmp_path_factory):
    """A cache with the release as owner/name, laid out as the hub does: files are links to blobs."""
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--owner--na-me"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for number, file in enumerate(sorted(file for file in release.rglob("*") if file.is_file())):
        blob, link = repository / f"blobs/{number:040x}", repository / "snapshots" / COMMIT / file.relative_to(release)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return cache


@pytest.fixture
def offline(cache, monkeypatch):
    """The cache in place of the user's, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_repository_in_the_cache_is_read_as_its_folder_is(release, offline, tmp_path):
    for source in ("hf:owner/na-me", f"hf:owner/na-me@{COMMIT}"):
        found = inspect(source)
        assert found.whole and list(found.components) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert Pipeline.from_pretrained("hf:owner/na-me").origin["checkpoint"] == "owner/na-me"
    convert("hf:owner/na-me", tmp_path / "hub", component="vae", progress=False)
    convert(release, tmp_path / "folder", component="vae", progress=False)
    made, expected = (leaves_of(load(tmp_path / name / "vae")) for name in ("hub", "folder"))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(made[path]), np.asarray(leaf))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:owner/other", "not whole in the cache .*, and HF_HUB_OFFLINE is set"),
        ("hf:owner/na-me@v2", "not whole in the cache .*, and HF_HUB_OFFLINE is set"),
        ("hf:owner", "expected hf:owner/name or hf:owner/name@revision"),
        ("hf:owner/name/transformer", "expected hf:owner/name or hf:owner/name@revision"),
        ("hf:owner/name@", "expected hf:owner/name or hf:owner/name@revision"),
        ("hf:owner/na..me", "expected hf:owner/name or hf:owner/name@revision"),
    ],
)
def test_a_repository_that_is_not_there_is_one_sentence(source, expected, offline):
    for read in (inspect, Pipeline.from_pretrained):
        with pytest.raises(InputError, match=f"^{source}: {expected}$"):
            read(source)


def refusal(kind):
    """An error of the package, which holds what a server answered."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error.\nRequest ID: 1")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.GatedRepoError,
            "its terms are to be accepted on https://huggingface.co/owner/name, and then `hf auth",
        ),
        (errors.RepositoryNotFoundError, "no such repository, or a private one that wants `hf auth login`"),
        (errors.RevisionNotFoundError, "no revision v2"),
        (errors.LocalEntryNotFoundError, "not whole in the cache .*, and Hugging Face cannot be reached"),
        (errors.HfHubHTTPError, "cannot be downloaded: 404 Client Error."),
        (OSError, "cannot be downloaded: 404 Client Error."),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error, expected, monkeypatch):
    def refuse(*_, **__):
        raise refusal(error)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=f"^hf:owner/name@v2: {expected}"):
        local_path("hf:owner/name@v2", COMPONENTS)


def test_without_the_package_the_line_that_installs_it_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))
    with pytest.raises(
        InputError, match=r"huggingface_hub, which is not installed \(pip install 'huggingface_hub>=1\.0'\)"
    ):
        local_path("hf:owner/name", COMPONENTS)
    assert local_path("folder", COMPONENTS) == Path("folder")  # which needs no package


def fetched(files, tmp_path, monkeypatch):
    """The files of a repository that local_path() fetches."""
    taken = set()

    def download(name, *, allow_patterns, ignore_patterns, revision):
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in utils.filter_repo_objects(files, **patterns):
            taken.add(file)
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(files[file])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert local_path("hf:owner/name", COMPONENTS) == tmp_path
    return taken


def test_of_a_diffusers_repository_only_weights_of_components_are_fetched(tmp_path, monkeypatch):
    index = '{"transformer": ["diffusers", "A"], "vae": ["diffusers", "B"], "text_encoder": [null, null]}'
    needed = {
        "model_index.json": index,
        "scheduler/scheduler_config.json": "{}",
        "tokenizer/merges.txt": "",
        "tokenizer_2/spiece.model": "",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": "",
        "transformer/diffusion_pytorch_model.safetensors.index.json": "{}",
        "vae/diffusion_pytorch_model.safetensors": "",
    }
    others = (
        *("flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "README.md", ".gitattributes"),
        *("vae/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin"),
        *("transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "safety_checker/model.safetensors"),
        *("transformer/diffusion_pytorch_model.safetensors.index.fp16.json", "text_encoder/model.safetensors"),
    )
    assert fetched(needed | dict.fromkeys(others, ""), tmp_path, monkeypatch) == set(needed)


def test_of_an_original_repository_all_weights_are_fetched(tmp_path, monkeypatch):
    needed = (
        *("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
        *("google/umt5-xxl/tokenizer.json", "google/umt5-xxl/spiece.model", "high_noise_model/config.json"),
        "high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors",
    )
    others = ("assets/logo.png", "README.md", "examples/i2v_input.JPG")
    assert fetched(dict.fromkeys((*needed, *others), "{}"), tmp_path, monkeypatch) == set(needed)
